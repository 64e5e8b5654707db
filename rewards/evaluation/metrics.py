"""What is measured of score gaps against verdicts: pure functions of numbers.

A gap is score(a) - score(b); a verdict is +1 where people preferred a, -1 where b, 0 for a tie. A gap that is NaN belongs to a
clip that could not be scored: it counts as wrong wherever a share is taken, and is left out where a number is needed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BOOTSTRAP_SAMPLES = 2000
CLASSES = (-1, 0, 1)
"""Verdicts, in the order of a confusion matrix's rows and columns."""


def right(gaps: Tensor, verdicts: Tensor) -> Tensor:
    """1 where the gap points at the preferred clip, 1/2 where it is exactly 0, else 0; [N], for verdicts that are no ties."""
    signed = gaps.double() * verdicts
    return torch.where(signed == 0, 0.5, (signed > 0).double())  # NaN > 0 is false


def accuracy_without_ties(gaps: Tensor, verdicts: Tensor) -> float | None:
    """Share of the verdicts other than "tie" that the gap predicts; None when there are none."""
    decided = verdicts != 0
    return float(right(gaps[decided], verdicts[decided]).mean()) if decided.any() else None


def predicted(gaps: Tensor, threshold: float) -> Tensor:
    """Verdicts that gaps stand for when one of at most `threshold` is a tie; 2, which is never right, where NaN."""
    sign = torch.where(gaps.abs() <= threshold, 0, torch.where(gaps > 0, 1, -1))
    return torch.where(gaps.isnan(), 2, sign)


def accuracy_with_ties(gaps: Tensor, verdicts: Tensor, threshold: float) -> float | None:
    """Share of all verdicts, ties included, that are predicted: three classes."""
    return float((predicted(gaps, threshold) == verdicts).double().mean()) if len(gaps) else None


def best_tie_threshold(gaps: Tensor, verdicts: Tensor) -> float:
    """The threshold of the highest accuracy with ties on these pairs: choose it on validation pairs, use it on others.

    Tried are 0, every midpoint between neighbouring sizes of gap, and the largest; the smallest of equals wins.
    Source: Deutsch et al., "Ties Matter", 2305.14324, Algorithm 1, with midpoints.
    """
    known = gaps.isfinite()
    sizes, order = gaps[known].double().abs().sort()
    if len(sizes) == 0:
        return 0.0
    verdicts = verdicts[known][order]
    concordant = (gaps[known][order] * verdicts > 0).double()
    ties = (verdicts == 0).double()
    # right when the k smallest gaps are called ties
    zero = torch.zeros(1, dtype=torch.double)
    hits = torch.cat([zero, ties.cumsum(0)]) + torch.cat(
        [concordant.flip(0).cumsum(0).flip(0), zero]
    )
    edges = torch.cat([zero - 1, sizes, zero + torch.inf])
    allowed = edges[1:] > edges[:-1]  # equal gaps are called the same
    k = int(hits.masked_fill(~allowed, -1).argmax())
    if k == 0:
        return 0.0 if sizes[0] > 0 else -1.0  # below every gap
    return float(sizes[-1]) if k == len(sizes) else float((sizes[k - 1] + sizes[k]) / 2)


def confusion(gaps: Tensor, verdicts: Tensor, threshold: float) -> list[list[int]]:
    """Counts of (verdict, prediction) in the order of `CLASSES`; pairs that could not be scored are in no column."""
    said = predicted(gaps, threshold)
    return [[int(((verdicts == row) & (said == col)).sum()) for col in CLASSES] for row in CLASSES]


def balanced_accuracy(gaps: Tensor, verdicts: Tensor, threshold: float) -> float | None:
    """Mean over the verdicts that occur of the share predicted: 1/3 is knowing nothing, however common ties are."""
    said = predicted(gaps, threshold)
    shares = [(said[verdicts == c] == c).double().mean() for c in CLASSES if (verdicts == c).any()]
    return float(torch.stack(shares).mean()) if shares else None


@dataclass(frozen=True)
class ReliabilityBin:
    """Predictions whose confidence lies in one stretch."""

    low: float
    high: float
    confidence: float
    """Mean predicted probability of the favoured clip."""
    accuracy: float
    """Share of them in which people preferred it."""
    count: int


def reliability(
    gaps: Tensor, verdicts: Tensor, *, temperature: float = 1.0, num_bins: int = 10
) -> list[ReliabilityBin]:
    """How often the favoured clip wins, by how sure sigma(|gap| / temperature) is; bins of equal width over [0.5, 1], empty ones left out.

    Ties and pairs that could not be scored are left out.
    """
    used = (verdicts != 0) & gaps.isfinite()
    gaps, verdicts = gaps[used].double(), verdicts[used]
    confidence, hit = torch.sigmoid(gaps.abs() / temperature), right(gaps, verdicts)
    place = ((confidence - 0.5) * 2 * num_bins).long().clamp(0, num_bins - 1)
    bins = []
    for index in range(num_bins):
        inside = place == index
        if inside.any():
            low, high = (0.5 + 0.5 * i / num_bins for i in (index, index + 1))
            sure, accuracy = (float(x[inside].mean()) for x in (confidence, hit))
            bins.append(ReliabilityBin(low, high, sure, accuracy, int(inside.sum())))
    return bins


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float | None:
    """Mean over predictions of |share right - confidence|, bin by bin; 0 is calibrated. Source: Naeini et al. (2015)."""
    total = sum(b.count for b in bins)
    return sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / total if total else None


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, equal values sharing the mean of theirs, [N]."""
    _, place, counts = values.double().unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[place]


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Correlation of ranks over the entries finite in both; None when there are fewer than two or one is constant."""
    known = x.isfinite() & y.isfinite()
    a, b = ranks(x[known]), ranks(y[known])
    a, b = a - a.mean(), b - b.mean()
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / scale) if len(a) > 1 and scale > 0 else None


def mean_interval(
    values: Sequence[float], groups: Sequence[str], *, seed: int = 0
) -> tuple[float, float] | None:
    """95 % bootstrap interval of the mean, resampling whole groups: what belongs to one prompt is not independent."""
    by_group: dict[str, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        by_group[group].append(value)
    if not by_group:
        return None
    sums = torch.tensor([sum(v) for v in by_group.values()])
    counts = torch.tensor([float(len(v)) for v in by_group.values()])
    means = _resampled(lambda draw: sums[draw].sum(-1) / counts[draw].sum(-1), len(sums), seed)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def _resampled(statistic: Callable[[Tensor], Tensor], count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return statistic(torch.randint(count, (BOOTSTRAP_SAMPLES, count), generator=generator))


def paired_interval(
    ours: Sequence[float], theirs: Sequence[float], groups: Sequence[str], *, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of mean(ours) - mean(theirs) over the same pairs; above 0 the first is better than the second."""
    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
    return mean_interval(gains, groups, seed=seed)


def flip_rate(forward: Tensor, backward: Tensor) -> float | None:
    """Share of pairs whose winner depends on which clip is shown first; 0 for anything that scores clips one by one.

    Args:
        forward, backward: evidence that the FIRST clip shown is better, for (a, b) and for (b, a), [N].
    """
    known = forward.isfinite() & backward.isfinite() & (forward != 0) & (backward != 0)
    if not known.any():
        return None
    return float((forward[known].sign() == backward[known].sign()).double().mean())


def published_accuracy_with_ties(gaps: Sequence[float], verdicts: Sequence[int]) -> float:
    """Accuracy with ties as VideoGen-RewardBench prints it: the best tie threshold of the very pairs it is reported on.

    Optimistic, and never below the share of ties: a scorer of noise gets that share. For comparison with published tables only.
    Source: VideoAlign 2501.13918 (its released evaluation) after 2305.14324: over every k >= 1, the k smallest gaps, equal
    ones in the order given, are called ties. A gap that is NaN counts as the largest, and as wrong unless called a tie.
    """
    if not gaps:
        raise ValueError("expected at least one pair, got none")
    order = sorted(
        range(len(gaps)), key=lambda i: math.inf if math.isnan(gaps[i]) else abs(gaps[i])
    )
    hits = sum(gaps[i] * verdicts[i] > 0 for i in order)
    best = 0
    for i in order:
        hits += (verdicts[i] == 0) - (gaps[i] * verdicts[i] > 0)
        best = max(best, hits)
    return best / len(order)


def published_accuracy_without_ties(gaps: Sequence[float], verdicts: Sequence[int]) -> float | None:
    """Accuracy over verdicts that are no ties, as VideoGen-RewardBench prints it: an exact 0 is wrong there."""
    decided = [(gap, verdict) for gap, verdict in zip(gaps, verdicts, strict=True) if verdict]
    return sum(g * v > 0 for g, v in decided) / len(decided) if decided else None

"""Which model is better, by how much, and how sure is that: Bradley-Terry with ties, GSB, mean opinion scores, dimension weights.

Every interval resamples prompts, since the votes of one prompt are not independent.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from annotation.quality.agreement import NUM_BOOTSTRAP, bootstrap_weights, interval
from annotation.quality.votes import Row, Vote

if TYPE_CHECKING:
    import numpy as np

ELO_SCALE = 400 / math.log(10)
ELO_CENTRE = 1000.0
PRIOR = 0.01
"""Precision of the normal prior on strengths: keeps a model that never lost at a finite place."""
MAX_STEPS = 100
MAX_STRIDE = (
    2.0  # of one Newton step, in logits: far from the optimum the quadratic model overshoots
)


@dataclass(frozen=True)
class Rank:
    """One model's line of a leaderboard."""

    name: str
    rating: float
    """400 / ln 10 times the strength in logits, around 1000."""
    low: float | None
    high: float | None
    """95 % bootstrap interval over prompts."""
    wins: int
    ties: int
    losses: int


def fit_bradley_terry(
    wins: np.ndarray, ties: np.ndarray, *, prior: float = PRIOR
) -> tuple[np.ndarray, float | None]:
    """Strengths in logits, summing to zero, and the tie parameter log nu (None without ties).

    P(i over j) = e^si / Z and P(tie) = nu e^((si + sj) / 2) / Z, with Z the sum of the three; without ties plain Bradley-Terry.

    Args:
        wins: wins[i, j] times i beat j, [M, M]; may be weighted.
        ties: symmetric, ties[i, j] times neither won, [M, M].
        prior: precision of a normal prior on the strengths; 0 is maximum likelihood, which some tables do not have.
    Source: Davidson (1970); Newton's method on the concave log-likelihood.
    """
    import numpy as np

    num_models = len(wins)
    left, right = np.triu_indices(num_models, 1)
    won, lost, tied = wins[left, right], wins[right, left], ties[left, right]
    total = won + lost + tied
    with_ties = bool(tied.sum() > 0)
    design = np.zeros((len(left), num_models))
    design[np.arange(len(left)), left] = 1.0
    design[np.arange(len(left)), right] = -1.0
    strength, log_nu = np.zeros(num_models), 0.0
    for _ in range(MAX_STEPS):
        gap = design @ strength
        logits = np.stack([gap / 2, -gap / 2, np.full_like(gap, log_nu if with_ties else -np.inf)])
        p = np.exp(logits - logits.max(axis=0))
        p_win, p_lose, p_tie = p / p.sum(axis=0)
        # gap enters the three log-weights by +1/2, -1/2, 0; log nu by 0, 0, 1
        slope = (won - lost) / 2 - total * (p_win - p_lose) / 2
        curve = total * ((p_win + p_lose) - (p_win - p_lose) ** 2) / 4
        gradient = design.T @ slope - prior * strength
        hessian = (design.T * curve) @ design + prior * np.eye(num_models)
        hessian += np.full_like(hessian, 1.0 / num_models)  # the strengths' sum is free: hold it
        if with_ties:
            cross = design.T @ (-total * p_tie * (p_win - p_lose) / 2)
            corner = (total * p_tie * (1 - p_tie)).sum()
            gradient = np.append(gradient, (tied - total * p_tie).sum())
            hessian = np.block([[hessian, cross[:, None]], [cross[None, :], np.array([[corner]])]])
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        step *= min(1.0, MAX_STRIDE / max(np.abs(step).max(), 1e-300))
        strength = strength + step[:num_models]
        strength -= strength.mean()
        log_nu += step[num_models] if with_ties else 0.0
        if np.abs(step).max() < 1e-10:
            break
    return strength, log_nu if with_ties else None


def leaderboard(
    votes: Iterable[Vote],
    model_of: Mapping[str, str],
    *,
    num_bootstrap: int = NUM_BOOTSTRAP,
    seed: int = 0,
) -> list[Rank]:
    """Ratings of the models behind the clips, best first. Votes between two clips of one model are left out.

    Args:
        model_of: sha256 of a clip -> the name it competes under (a model, a stage).
    """
    import numpy as np

    names, prompts, table = _tables(votes, model_of)
    if len(names) < 2:
        return []
    wins, ties = table.sum(axis=1)  # [2, P, M, M] -> [2, M, M]
    strength, _ = fit_bradley_terry(wins, ties)
    ratings = []
    weights = bootstrap_weights(len(prompts), num_bootstrap, seed) if num_bootstrap else []
    for weight in weights:
        some_wins, some_ties = np.tensordot(table, weight, axes=([1], [0]))
        ratings.append(fit_bradley_terry(some_wins, some_ties)[0])
    found = []
    for place, name in enumerate(names):
        low, high = interval([rating[place] for rating in ratings])
        found.append(
            Rank(
                name,
                elo(float(strength[place])),
                None if low is None else elo(low),
                None if high is None else elo(high),
                round(wins[place].sum()),
                round(ties[place].sum()),
                round(wins[:, place].sum()),
            )
        )
    return sorted(found, key=lambda rank: -rank.rating)


def elo(strength: float) -> float:
    """A strength in logits on the scale of Elo, where 400 points are odds of ten to one."""
    return ELO_CENTRE + ELO_SCALE * strength


@dataclass(frozen=True)
class Gsb:
    """Good / same / bad of one model against another."""

    name: str
    against: str
    good: int
    same: int
    bad: int
    low: float | None
    high: float | None

    @property
    def score(self) -> float:
        """(good - bad) / all: +1 always better, 0 as good, -1 always worse."""
        return (self.good - self.bad) / (self.good + self.same + self.bad)


def gsb(
    votes: Iterable[Vote],
    model_of: Mapping[str, str],
    *,
    num_bootstrap: int = NUM_BOOTSTRAP,
    seed: int = 0,
) -> list[Gsb]:
    """Good, same and bad of every pair of models that met, with bootstrap intervals over prompts."""
    import numpy as np

    names, prompts, (wins, ties) = _tables(votes, model_of)
    found = []
    weights = bootstrap_weights(len(prompts), num_bootstrap, seed) if prompts else np.zeros((0, 0))
    for i, name in enumerate(names):
        for j in range(i + 1, len(names)):
            good, bad, same = wins[:, i, j], wins[:, j, i], ties[:, i, j]
            number = good + bad + same
            if not number.sum():
                continue
            drawn = weights @ number
            scores = (weights @ (good - bad))[drawn > 0] / drawn[drawn > 0]
            low, high = interval(scores)
            counts = (round(good.sum()), round(same.sum()), round(bad.sum()))
            found.append(Gsb(name, names[j], *counts, low, high))
    return found


def _tables(
    votes: Iterable[Vote], model_of: Mapping[str, str]
) -> tuple[list[str], list[str], np.ndarray]:
    """Model names, prompt ids, and wins and ties per prompt, [2, P, M, M]."""
    import numpy as np

    met = [
        (vote.prompt_id, model_of[vote.clip_a], model_of[vote.clip_b], vote.label)
        for vote in votes
        if model_of[vote.clip_a] != model_of[vote.clip_b]
    ]
    names = sorted({name for _, a, b, _ in met for name in (a, b)})
    prompts = sorted({prompt for prompt, *_ in met})
    place = {name: index for index, name in enumerate(names)}
    row = {prompt: index for index, prompt in enumerate(prompts)}
    table = np.zeros((2, len(prompts), len(names), len(names)))
    for prompt, model_a, model_b, label in met:
        a, b = place[model_a], place[model_b]
        if label == 0:
            table[1, row[prompt], [a, b], [b, a]] += 1
        else:
            winner, loser = (a, b) if label > 0 else (b, a)
            table[0, row[prompt], winner, loser] += 1
    return names, prompts, table


@dataclass(frozen=True)
class OpinionScore:
    """Mean opinion score of one model in one dimension."""

    name: str
    dimension: str
    mean: float
    low: float | None
    high: float | None
    number: int


def opinion_scores(
    judgments: Iterable[Row],
    model_of: Mapping[str, str],
    *,
    num_bootstrap: int = NUM_BOOTSTRAP,
    seed: int = 0,
) -> list[OpinionScore]:
    """Mean of the scores per model and dimension, with bootstrap intervals over prompts."""
    sums: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(
        lambda: defaultdict(lambda: [0.0, 0.0])
    )
    for row in judgments:
        for clip, score in zip(row["candidates"], row["scores"] or (), strict=False):
            entry = sums[row["dimension"], model_of[clip]][row["prompt_id"]]
            entry[0] += score
            entry[1] += 1
    found = []
    for (dimension, name), by_prompt in sorted(sums.items()):
        totals = [by_prompt[prompt] for prompt in sorted(by_prompt)]
        low, high = _ratio_interval(totals, num_bootstrap, seed)
        number = sum(count for _, count in totals)
        mean = sum(total for total, _ in totals) / number
        found.append(OpinionScore(name, dimension, mean, low, high, round(number)))
    return found


def _ratio_interval(
    totals: Sequence[Sequence[float]], num_bootstrap: int, seed: int
) -> tuple[float | None, float | None]:
    import numpy as np

    if not num_bootstrap:
        return None, None
    sums = bootstrap_weights(len(totals), num_bootstrap, seed) @ np.asarray(totals, float)
    return interval(sums[:, 0] / sums[:, 1])


@dataclass(frozen=True)
class DimensionWeight:
    """How much one dimension counts for the overall verdict."""

    dimension: str
    coefficient: float
    """Logits of winning per point of score difference."""
    low: float | None
    high: float | None
    share: float
    """Of all positive coefficients: the weight for a composite reward."""


def dimension_weights(
    dimensions: Sequence[str],
    deltas: Sequence[Sequence[float]],
    won: Sequence[bool],
    prompts: Sequence[str],
    *,
    prior: float = PRIOR,
    num_bootstrap: int = 200,
    seed: int = 0,
) -> list[DimensionWeight]:
    """Logistic regression, without intercept, of an overall win on the score difference in each dimension.

    Args:
        deltas: score of a less that of b, per decided pair and dimension, [N, D].
        won: whether a won overall, [N].
        prompts: of each pair; resampled for the intervals.
    Source: Magic-Bench-377 (arXiv 2509.17907) weighs its dimensions so.
    """
    import numpy as np

    x, y = np.asarray(deltas, float), np.asarray(won, float)
    names = sorted(set(prompts))
    row = {name: index for index, name in enumerate(names)}
    which = np.array([row[prompt] for prompt in prompts])
    fitted = fit_logistic(x, y, np.ones(len(y)), prior=prior)
    draws = bootstrap_weights(len(names), num_bootstrap, seed) if num_bootstrap else []
    sampled = np.array([fit_logistic(x, y, draw[which], prior=prior) for draw in draws])
    positive = float(fitted.clip(min=0).sum())
    found = []
    for place, dimension in enumerate(dimensions):
        low, high = interval(sampled[:, place]) if len(sampled) else (None, None)
        share = max(0.0, float(fitted[place])) / positive if positive else 0.0
        found.append(DimensionWeight(dimension, float(fitted[place]), low, high, share))
    return found


def fit_logistic(
    x: np.ndarray, y: np.ndarray, weight: np.ndarray, *, prior: float = PRIOR
) -> np.ndarray:
    """Coefficients [D] of a weighted logistic regression without intercept, by Newton's method.

    Args:
        x: [N, D]; y: 0 or 1, [N]; weight: of each row, [N].
        prior: precision of a normal prior on the coefficients.
    """
    import numpy as np

    beta = np.zeros(x.shape[1])
    for _ in range(MAX_STEPS):
        p = 1 / (1 + np.exp(-(x @ beta).clip(-500, 500)))
        gradient = x.T @ (weight * (y - p)) - prior * beta
        hessian = (x.T * (weight * p * (1 - p))) @ x + prior * np.eye(len(beta))
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        step *= min(1.0, MAX_STRIDE / max(np.abs(step).max(), 1e-300))
        beta = beta + step
        if np.abs(step).max() < 1e-10:
            break
    return beta


def best_worst_scores(judgments: Iterable[Row]) -> dict[tuple[str, str], float]:
    """(clip, dimension) -> (times best - times worst) / times shown: the quick score of best-worst scaling, -1 to 1."""
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for row in judgments:
        if row["constrained"] or row["scores"] is not None:
            continue
        if row["best"] is None and not row["tie"]:
            continue
        for place, clip in enumerate(row["candidates"]):
            entry = counts[clip, row["dimension"]]
            entry[0] += (place == row["best"]) - (place == row["worst"])
            entry[1] += 1
    return {key: total / shown for key, (total, shown) in counts.items()}

"""Losses on human verdicts: pure functions of reward logits, one value per row; the caller masks and averages."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def _same_shape(*tensors: Tensor) -> None:
    shapes = [tuple(t.shape) for t in tensors]
    if len(set(shapes)) != 1:  # [B, 1] against [B] would broadcast to B * B pairs
        raise ValueError(f"expected tensors of one shape, got {', '.join(map(str, shapes))}")


def bradley_terry_loss(
    score_chosen: Tensor, score_rejected: Tensor, *, margin: float = 0.0
) -> Tensor:
    """-log sigma(chosen - rejected - margin) in nats, same shape as the scores [B].

    Source: Bradley & Terry (1952), as used for reward models in 2203.02155 eq. 1; the margin is that of Llama 2,
    2307.09288 eq. 2, constant as in VideoAlign's trainer (there 0.57).
    """
    _same_shape(score_chosen, score_rejected)
    return -F.logsigmoid(score_chosen - score_rejected - margin)


def bradley_terry_ties_loss(
    score_a: Tensor,
    score_b: Tensor,
    preference: Tensor,
    *,
    tie_width: float | Tensor,
    margin: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of pairwise votes when annotators may answer "tie".

    Args:
        score_a, score_b: reward of each clip in logits, no fixed zero, one shape, [B] or [B, D].
        preference: +1 where A won, -1 where B won, 0 for a tie; same shape.
        tie_width: the score gap, in logits, at which the better clip wins half its votes; > 0, broadcastable.
        margin: by how much more than that the winner has to lead. Above 0 this is a hinge and no likelihood: the three
            answers' probabilities then sum to less than one.
    Returns: loss per pair in nats, the scores' shape.
    Raises: ValueError if the shapes differ.
    Source: Rao & Kupper (1967) with theta = exp(tie_width), VideoAlign 2501.13918 eq. 2.
    """
    _same_shape(score_a, score_b, preference)
    gap = score_a - score_b - margin * preference
    width = torch.as_tensor(tie_width, dtype=gap.dtype, device=gap.device)
    log_p_a, log_p_b = F.logsigmoid(gap - width), F.logsigmoid(-gap - width)
    log_p_tie = log_p_a + log_p_b + torch.log(torch.expm1(2 * width))
    return -log_p_tie.where(preference == 0, log_p_a.where(preference > 0, log_p_b))


@lru_cache(maxsize=4)
def _gauss_hermite(num_nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and log-weights of the expectation over a standard normal, [num_nodes] each, in double precision."""
    nodes, weights = np.polynomial.hermite.hermgauss(num_nodes)
    return torch.tensor(nodes * math.sqrt(2)), torch.tensor(weights).log() - 0.5 * math.log(math.pi)


def gaussian_preference_loss(
    mean_a: Tensor,
    mean_b: Tensor,
    std_a: Tensor,
    std_b: Tensor,
    preference: Tensor,
    *,
    tie_width: float | Tensor,
    num_nodes: int = 32,
) -> Tensor:
    """-log E[P(vote)] in nats, the reward of each clip being a Gaussian, by Gauss-Hermite quadrature; the means' shape.

    The expectation stands inside the logarithm: a model that is wrong gains by admitting a larger spread. With it outside, as
    HPSv3 has it (2508.03789), the loss is convex in the gap and the spread can only shrink.
    P(vote) is Rao & Kupper's (`bradley_terry_ties_loss`); as tie_width goes to 0, E[sigma(z)] of a decided vote.
    """
    _same_shape(mean_a, mean_b, std_a, std_b, preference)
    nodes, log_weights = (x.to(mean_a) for x in _gauss_hermite(num_nodes))
    spread = (std_a.square() + std_b.square()).sqrt()
    gap = (mean_a - mean_b)[..., None] + spread[..., None] * nodes  # [..., num_nodes]
    width = torch.as_tensor(tie_width, dtype=gap.dtype, device=gap.device).expand(mean_a.shape)
    losses = bradley_terry_ties_loss(
        gap,
        torch.zeros_like(gap),
        preference[..., None].expand_as(gap),
        tie_width=width[..., None],
    )
    return -torch.logsumexp(log_weights - losses, dim=-1)


def chance_corrected(agreement: float, chance: float = 1 / 3) -> float:
    """How far an agreement lies from chance (0) to certainty (1), as in Cohen's kappa; never negative.

    Cohen (1960). Chance is 1/3 for the answers first, second and tie.
    """
    return max(0.0, (agreement - chance) / (1 - chance))


def tie_width_from_rate(tie_rate: float) -> float:
    """The tie width at which two equal clips tie with this probability: tanh(width / 2) = rate.

    Source: Rao & Kupper at zero gap, P(tie) = (theta - 1) / (theta + 1). The rate is clamped to [0.02, 0.98].
    """
    return 2.0 * math.atanh(min(0.98, max(0.02, tie_rate)))


def masked_mean(
    values: Tensor, mask: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted mean over the rows where `mask` holds, and how many there are.

    Masked rows may hold NaN. The sum is divided by the weight of the valid rows alone, not of all rows; 0 rows give 0.
    """
    _same_shape(values, mask)
    weight = mask.to(values.dtype) if weight is None else weight.to(values.dtype) * mask
    total = (
        values.masked_fill(~mask, 0.0) * weight
    ).sum()  # a missing label leaves NaN, and NaN * 0 is still NaN
    return total / weight.sum().clamp_min(torch.finfo(values.dtype).tiny), mask.sum()


def best_worst_loss(
    scores: Tensor, best: Tensor, worst: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Sequential best-then-worst likelihood of one judgment of K clips: softmax for the best, then for the worst.

    Args:
        scores: reward of each candidate in logits, [N, K].
        best, worst: indices into K, long [N], different from one another.
        mask: bool [N, K], False at padding where tasks of fewer clips share the batch.
    Returns: -log P(best, worst) in nats, [N].
    Source: best-worst scaling, Marley & Louviere (2005), the sequential best-worst form: after the best is taken, the
        worst is drawn from the rest by softmax of the negated scores.
    """
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    log_best = F.log_softmax(scores.masked_fill(~mask, -torch.inf), dim=1).gather(1, best[:, None])
    rest = mask.scatter(1, best[:, None], False)
    log_worst = F.log_softmax((-scores).masked_fill(~rest, -torch.inf), dim=1).gather(
        1, worst[:, None]
    )
    return -(log_best + log_worst).squeeze(1)

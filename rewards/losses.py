"""Losses on human verdicts: pure functions of reward logits, one value per row; the caller masks and averages."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _same_shape(*tensors: Tensor) -> None:
    shapes = [tuple(t.shape) for t in tensors]
    if len(set(shapes)) != 1:  # [B, 1] against [B] would broadcast to B * B pairs
        raise ValueError(f"expected tensors of one shape, got {', '.join(map(str, shapes))}")


def bradley_terry_loss(score_chosen: Tensor, score_rejected: Tensor) -> Tensor:
    """-log sigma(chosen - rejected) in nats, same shape as the scores [B].

    Source: Bradley & Terry (1952), as used for reward models in 2203.02155 eq. 1.
    """
    _same_shape(score_chosen, score_rejected)
    return -F.logsigmoid(score_chosen - score_rejected)


def bradley_terry_ties_loss(
    score_a: Tensor, score_b: Tensor, preference: Tensor, *, tie_width: float | Tensor
) -> Tensor:
    """Negative log-likelihood of pairwise votes when annotators may answer "tie".

    Args:
        score_a, score_b: reward of each clip in logits, no fixed zero, one shape, [B] or [B, D].
        preference: +1 where A won, -1 where B won, 0 for a tie; same shape.
        tie_width: the score gap, in logits, at which the better clip wins half its votes; > 0, broadcastable.
    Returns: loss per pair in nats, the scores' shape.
    Raises: ValueError if the shapes differ.
    Source: Rao & Kupper (1967) with theta = exp(tie_width), VideoAlign 2501.13918 eq. 2.
    """
    _same_shape(score_a, score_b, preference)
    gap = score_a - score_b
    width = torch.as_tensor(tie_width, dtype=gap.dtype, device=gap.device)
    log_p_a, log_p_b = F.logsigmoid(gap - width), F.logsigmoid(-gap - width)
    log_p_tie = log_p_a + log_p_b + torch.log(torch.expm1(2 * width))
    return -log_p_tie.where(preference == 0, log_p_a.where(preference > 0, log_p_b))


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

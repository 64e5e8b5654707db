"""Frozen statistics that make raw reward logits comparable: mean, spread, validated range, temperature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewards.losses import bradley_terry_loss

MIN_CLIPS = 24
"""Fewer validation clips than this give no usable spread; the caller then adds the training clips."""


def spread(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, standard deviation, minimum and maximum per dimension of values [N, D]; rows with NaN are left out."""
    values = values[values.isfinite().all(dim=1)]
    std = values.std(dim=0, correction=0).clamp_min(1e-4)
    return values.mean(0), std, values.amin(0), values.amax(0)


def fit_temperature(gaps: Tensor, *, candidates: Sequence[float] | None = None) -> float:
    """The divisor of logits at which sigma(gap / T) says best who won: argmin of the mean negative log-likelihood.

    Args:
        gaps: score of the chosen clip minus that of the rejected one, [N], without ties.
        candidates: temperatures tried; by default 41 of them from 0.1 to 10, evenly in the logarithm.
    Returns: 1 when there are no pairs. Source: Guo et al. 1706.04599 sec. 4.2, for pairs.
    """
    gaps = gaps[gaps.isfinite()]
    if len(gaps) == 0:
        return 1.0
    tried = torch.logspace(-1, 1, 41) if candidates is None else torch.tensor(candidates)
    scaled = gaps[None].float() / tried[:, None]
    losses = bradley_terry_loss(scaled, torch.zeros_like(scaled)).mean(1)
    return float(tried[losses.argmin()])

"""Classifier-free guidance around any network call: both predictions in one batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from generator.base import Condition, Task
from generator.flow import guided_velocity, rescale_guidance

Predict = Callable[[Tensor, Tensor, Condition, Task], Tensor]
"""(noisy [B, C, T, h, w], sigma [B] or [B, T], condition, task) -> velocity fp32 like noisy."""


def is_guided(guidance_scale: float | None) -> bool:
    """Whether this scale asks for a second prediction; None and 1 do not."""
    return guidance_scale is not None and guidance_scale != 1.0


def guided(
    predict: Predict,
    noisy: Tensor,
    sigma: Tensor,
    condition: Condition,
    task: Task,
    *,
    guidance_scale: float | None,
    guidance_rescale: float = 0.0,
    negative: Condition | None = None,
) -> Tensor:
    """The velocity with guidance, [B, C, T, h, w].

    Args:
        negative: what to move away from, a row per sample or one for all; the dropped prompt by default.
    """
    if guidance_scale is None or not is_guided(guidance_scale):
        return predict(noisy, sigma, condition, task)
    if negative is None:
        negative = condition.dropped()
    elif len(negative) == 1:
        negative = negative[[0] * len(condition)]
    elif len(negative) != len(condition):
        raise ValueError(f"{len(negative)} negative prompts for {len(condition)} samples")
    both = predict(
        torch.cat((noisy, noisy)),
        torch.cat((sigma, sigma)),
        Condition.cat((condition, negative)),
        Task.cat((task, task)),
    )
    conditional, unconditional = both.chunk(2)
    velocity = guided_velocity(conditional, unconditional, guidance_scale)
    return (
        rescale_guidance(velocity, conditional, guidance_rescale) if guidance_rescale else velocity
    )

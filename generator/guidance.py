"""Classifier-free guidance around any network call: both predictions in one batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from generator.base import Condition, Task
from generator.flow import guided_velocity, rescale_guidance


def is_guided(guidance_scale: float | None) -> bool:
    """Whether this scale asks for a second prediction; None and 1 do not."""
    return guidance_scale is not None and guidance_scale != 1.0


class GuidedVelocity(ABC):
    """`VideoBackbone.velocity` of a one-time model, made of its single prediction."""

    @abstractmethod
    def unguided(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        sigma: Tensor,
        condition: Condition,
        task: Task,
        features: Sequence[int] = (),
    ) -> Tensor:
        """One evaluation of the denoiser: the velocity, fp32 like noisy; with `features`, what the denoiser hands out beside it."""

    def velocity(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        sigma: Tensor,
        condition: Condition,
        task: Task,
        *,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        negative: Condition | None = None,
        sigma_target: Tensor | None = None,
        features: Sequence[int] = (),
    ) -> Tensor:
        """See `VideoBackbone.velocity`. `negative` has a row per sample, or one for all."""
        if guidance_scale is None or not is_guided(guidance_scale):
            return self.unguided(denoiser, noisy, sigma, condition, task, features)
        if features:
            raise ValueError("features are those of one evaluation: ask for them without guidance")
        if negative is None:
            negative = condition.dropped()
        elif len(negative) == 1:
            negative = negative[[0] * len(condition)]
        elif len(negative) != len(condition):
            raise ValueError(f"{len(negative)} negative prompts for {len(condition)} samples")
        both = self.unguided(
            denoiser,
            torch.cat((noisy, noisy)),
            torch.cat((sigma, sigma)),
            Condition.cat((condition, negative)),
            Task.cat((task, task)),
        )
        conditional, unconditional = both.chunk(2)
        velocity = guided_velocity(conditional, unconditional, guidance_scale)
        if not guidance_rescale:
            return velocity
        return rescale_guidance(velocity, conditional, guidance_rescale)

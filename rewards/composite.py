"""Several rewards as one bounded, calibrated number whose gradient RLHF may follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelhf.errors import UserError, did_you_mean
from rewards.base import CompositeScores, FrameSelection, RewardModel

MODEL_FOLDERS = ("foundational", "motion", "aesthetic")
SCORED_FOLDERS = (*MODEL_FOLDERS, "texture")
"""Models that learn from verdicts, and the one that learns without (`rewards.texture`)."""


def soft_cap(z: Tensor, cap: float) -> Tensor:
    """Linear below zero, cap * tanh(z / cap) above: what is bad keeps its full slope, what is good saturates.

    Source: design contract 2; the cap is the smooth form of ImageReward's relu(2 - r).
    """
    return torch.where(z <= 0, z, cap * torch.tanh(z / cap))


class _ClipGradient(torch.autograd.Function):
    """Identity on frames; backward rescales each clip's gradient to at most max_norm * |d loss / d total|."""

    @staticmethod
    def forward(ctx: Any, frames: Tensor, max_norm: float, scale: dict[str, Tensor]) -> Tensor:
        ctx.max_norm, ctx.scale = max_norm, scale
        return frames.view_as(frames)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0]
        norm = grad.flatten(1).norm(dim=1)
        limit = ctx.max_norm * ctx.scale["total"].abs().to(norm)
        factor = (limit / norm.clamp_min(1e-30)).clamp_max(1.0)
        return grad * factor.view(-1, *[1] * (grad.dim() - 1)), None, None


class CompositeReward(nn.Module):
    """A weighted sum over dimensions of bounded z-scores of several frozen reward models.

    Args:
        models: loaded reward models with `mean` and `std` buffers [D]; their dimensions must not overlap.
        weights: dimension -> weight; dimensions left out weigh 0 and are still reported.
        cap: bound of each z-score above zero (`soft_cap`).
        max_gradient_norm: largest L2 norm of d total / d clip, per clip, whatever the loss is scaled by; None is off.
        pessimism: how many standard deviations, of a reward that knows its own (an ensemble), come off its z-score; 0 is off.
    """

    def __init__(
        self,
        models: Sequence[RewardModel],
        weights: Mapping[str, float],
        cap: float = 2.0,
        max_gradient_norm: float | None = None,
        *,
        pessimism: float = 0.0,
    ) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)  # type: ignore[arg-type]
        self.dimensions: tuple[str, ...] = tuple(
            name for model in models for name in model.dimensions
        )
        if len(set(self.dimensions)) != len(self.dimensions):
            raise ValueError(f"two reward models score the same dimension: {self.dimensions}")
        for name in weights:
            if name not in self.dimensions:
                raise UserError(
                    f"reward weights name {name!r}; the loaded rewards score {', '.join(self.dimensions)}."
                    + did_you_mean(name, self.dimensions)
                )
        self.cap, self.max_gradient_norm, self.pessimism = cap, max_gradient_norm, pessimism
        self.weights: dict[str, float] = {
            name: float(weights.get(name, 0.0)) for name in self.dimensions
        }

    def select(
        self, num_frames: int, fps: float, generator: torch.Generator | None = None
    ) -> list[FrameSelection]:
        """One selection per model, in order."""
        return [model.select(num_frames, fps, generator) for model in self.models]

    def needed_frames(self, selections: Sequence[FrameSelection], num_frames: int) -> Tensor:
        """Ascending union of the selected frame indices: what has to be decoded."""
        return torch.unique(torch.cat([s.needed(num_frames) for s in selections]))

    def encode_prompts(self, prompts: Sequence[str]) -> list[tuple[Any, ...]]:
        """One entry per prompt, holding each model's encoding; cacheable."""
        return list(zip(*(model.encode_prompts(prompts) for model in self.models), strict=True))

    def score(
        self,
        frames: Tensor,
        *,
        fps: Tensor | float,
        prompts: Sequence[Any],
        selections: Sequence[FrameSelection] | None = None,
        first_frame: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> CompositeScores:
        """Score frames [B, 3, F, H, W]; `selections` None means each model's fixed evaluation choice."""
        if selections is None:
            selections = self.select(frames.shape[2], float(torch.as_tensor(fps).flatten()[0]))
        scale: dict[str, Tensor] = {}
        if self.max_gradient_norm is not None and frames.requires_grad:
            frames = _ClipGradient.apply(frames, self.max_gradient_norm, scale)
        values, z_scores, valid = (
            [],
            [],
            torch.ones(len(frames), dtype=torch.bool, device=frames.device),
        )
        parts: dict[str, Tensor] = {}
        spreads: list[Tensor | None] = []
        for index, (model, selection) in enumerate(zip(self.models, selections, strict=True)):
            own = [p if isinstance(p, str) else p[index] for p in prompts]
            scores = model.score(
                frames,
                selection=selection,
                fps=fps,
                prompts=own,
                first_frame=first_frame,
                reference=reference,
            )
            values.append(scores.values)
            spreads.append(scores.std)
            z = (scores.values - model.mean) / model.std
            if self.pessimism and scores.std is not None:
                z = z - self.pessimism * scores.std / model.std
            z_scores.append(z)
            valid &= scores.valid
            parts |= scores.parts
        if self.pessimism and all(spread is None for spread in spreads):
            raise UserError(
                f"pessimism is {self.pessimism:g}, but none of these rewards knows how sure it is; expected an ensemble or a reward "
                "with a spread of its own, or pessimism 0"
            )
        z = soft_cap(torch.cat(z_scores, dim=1), self.cap)  # [B, D]
        weights = torch.tensor(
            [self.weights[name] for name in self.dimensions], device=z.device, dtype=z.dtype
        )
        # masked before the sum: NaN * 0 is still NaN
        total = (z.masked_fill(~valid[:, None], 0.0) * weights).sum(1)
        if self.max_gradient_norm is not None and total.requires_grad:
            total.register_hook(lambda grad: scale.__setitem__("total", grad))
        return CompositeScores(
            total,
            z,
            self.dimensions,
            torch.cat(values, dim=1),
            valid,
            parts,
            _joined(spreads, values),
        )

    forward = score


def _joined(spreads: Sequence[Tensor | None], values: Sequence[Tensor]) -> Tensor | None:
    """Detached spreads [B, D], NaN for rewards without one; None where none has."""
    if all(spread is None for spread in spreads):
        return None
    filled = [
        torch.full_like(value, float("nan")) if spread is None else spread
        for spread, value in zip(spreads, values, strict=True)
    ]
    return torch.cat(filled, dim=1).detach()


def load_composite(
    folder: Path | str,
    weights: Mapping[str, float],
    cap: float = 2.0,
    max_gradient_norm: float | None = None,
    *,
    pessimism: float = 0.0,
) -> CompositeReward:
    """The frozen composite of whichever of foundational/, motion/, aesthetic/ and texture/ the folder holds."""
    from rewards.checkpoint import load_reward

    found = [Path(folder) / name for name in SCORED_FOLDERS if (Path(folder) / name).is_dir()]
    if not found:
        raise UserError(
            f"{folder} holds no reward model; expected one of {', '.join(SCORED_FOLDERS)}/"
        )
    models = [load_reward(path) for path in found]
    return CompositeReward(models, weights, cap, max_gradient_norm, pessimism=pessimism)

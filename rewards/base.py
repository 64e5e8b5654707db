"""What a reward model is: the protocol and the dataclasses that cross folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class FrameSelection:
    """Which frames of a clip a reward looks at, decided before anything is decoded.

    Frames that no selection names need not be decoded: they may hold any finite filling and get a zero gradient.
    """

    indices: Tensor | None = None
    """Ascending frame indices, long [F'], shared by the batch; None means every frame."""

    def apply(self, frames: Tensor) -> Tensor:
        """The selected frames [B, 3, F', H, W] of frames [B, 3, F, H, W]."""
        return frames if self.indices is None else frames[:, :, self.indices.to(frames.device)]

    def rate(self, fps: Any) -> Any:
        """Frames per second of the selected frames, of clips at `fps` (a number or [B])."""
        if self.indices is None or len(self.indices) < 2:
            return fps
        return fps * (len(self.indices) - 1) / (self.indices[-1] - self.indices[0])

    def needed(self, num_frames: int) -> Tensor:
        """The indices as a long tensor, also when every frame is needed."""
        return torch.arange(num_frames) if self.indices is None else self.indices


@dataclass(frozen=True)
class RewardScores:
    """One reward model's answer for a batch of clips."""

    values: Tensor
    """Raw logits [B, D], no fixed zero or unit; NaN (without gradient) where the clip is invalid."""
    valid: Tensor
    """bool [B]; False where the clip could not be scored (non-finite pixels). Exclude and count, never fill in."""
    std: Tensor | None = None
    """Uncertainty of each value in the same logits [B, D], where the model has one."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """Named detached sub-scores [B], for logs."""


@runtime_checkable
class RewardModel(Protocol):
    """A scorer of clips, differentiable with respect to their pixels.

    Implementations are `nn.Module`s. A loaded one is frozen but stays in `train()` mode, every dropout 0, so that
    gradient checkpointing recomputes instead of storing (in `eval()` it is silently off).
    """

    dimensions: tuple[str, ...]

    def select(
        self, num_frames: int, fps: float, generator: torch.Generator | None = None
    ) -> FrameSelection:
        """Choose the frames to look at; `generator` None means the fixed choice used in evaluation."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> list[Any]:
        """Everything about the prompts that does not depend on frames: cacheable, one entry per prompt."""
        ...

    def score(
        self,
        frames: Tensor,
        *,
        selection: FrameSelection,
        fps: Tensor | float,
        prompts: Sequence[Any],
        first_frame: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> RewardScores:
        """Score clips.

        Args:
            frames: [B, 3, F, H, W] float in [0, 1], any size; values outside are clamped, their gradient kept.
            selection: what `select` answered for this F.
            fps: frames per second of each clip, [B] or one number.
            prompts: B strings, or B entries of `encode_prompts`.
            first_frame: [B, 3, H, W], image-to-video only; reference: [B, 3, F, H, W], comparative rewards only.
        """
        ...

    def save(self, folder: Path) -> Path: ...


@dataclass(frozen=True)
class CompositeScores:
    """Several reward models' answers, calibrated, bounded and summed."""

    total: Tensor
    """Weighted sum of bounded z-scores [B]; 0 without gradient where invalid, so divide sums by the valid count."""
    z: Tensor
    """Bounded z-scores [B, D] in the order of `dimensions`; NaN where invalid."""
    dimensions: tuple[str, ...]
    values: Tensor
    """Raw logits [B, D] in the order of `dimensions`; NaN where invalid."""
    valid: Tensor
    """bool [B]: every model could score the clip."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    std: Tensor | None = None
    """Detached uncertainty of the raw values [B, D], NaN for models without one; None where none has."""

    @property
    def valid_count(self) -> Tensor:
        return self.valid.sum()

    def mean_total(self) -> Tensor:
        """Mean of `total` over the valid clips; 0 when there are none."""
        return self.total.sum() / self.valid.sum().clamp_min(1)

    def metrics(self, prefix: str = "reward") -> dict[str, float]:
        """Mean raw value per dimension and mean total over valid clips, plus the valid fraction."""
        count = int(self.valid.sum())
        out = {"valid_fraction": count / max(1, len(self.valid))}
        if count:
            means = self.values.detach()[self.valid].mean(0)
            out |= {
                f"{prefix}/{name}": float(m) for name, m in zip(self.dimensions, means, strict=True)
            }
            out[f"{prefix}/total"] = float(self.total.detach()[self.valid].mean())
        return out

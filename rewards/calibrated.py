"""What every reward has, be it one model or several: dimensions, frozen statistics, a checkpoint folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from reelhf.errors import UserError
from rewards.base import FrameSelection, RewardScores

if TYPE_CHECKING:
    from typing_extensions import Self


class CalibratedReward(nn.Module, ABC):
    """A reward (`rewards.base.RewardModel`) with the statistics that make its raw values comparable; they travel with the checkpoint.

    `mean` and `std` [D] are the validation statistics that z-scores use, `low` and `high` [D] the validated range (values beyond it are
    extrapolation: a sign of hacking); logits divided by `temperature` [D] are calibrated.
    """

    kind: ClassVar[str]
    compares: bool = False
    """Whether it scores a clip against a `reference`."""
    dimensions: tuple[str, ...]
    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor
    temperature: Tensor

    def __init__(self, dimensions: Sequence[str]) -> None:
        super().__init__()
        self.dimensions = tuple(dimensions)
        self.data_hash: str | None = None
        for name, value in (
            ("mean", 0.0),
            ("std", 1.0),
            ("low", -float("inf")),
            ("high", float("inf")),
            ("temperature", 1.0),
        ):
            self.register_buffer(name, torch.full((len(self.dimensions),), value))

    @abstractmethod
    def select(
        self, num_frames: int, fps: float, generator: torch.Generator | None = None
    ) -> FrameSelection:
        """See `rewards.base.RewardModel.select`."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> list[Any]:
        """See `rewards.base.RewardModel.encode_prompts`."""

    @abstractmethod
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
        """See `rewards.base.RewardModel.score`."""

    @abstractmethod
    def recompute_layers(self) -> None:
        """Keep no activations inside the backbone's layers; the backward pass computes them again. Needs train() mode."""

    @abstractmethod
    def save(self, folder: Path) -> Path:
        """Write the checkpoint, sealed."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path) -> Self:
        """The reward of a folder written by `save`, trainable."""

    def out_of_range(self, values: Tensor) -> Tensor:
        """How far values [B, D] lie beyond the validated range, in standard deviations; 0 inside."""
        return ((values - self.high).clamp_min(0) + (self.low - values).clamp_min(0)) / self.std

    def freeze(self) -> Self:
        """No parameter trains, but the module stays in train() so that gradient checkpointing still recomputes."""
        self.requires_grad_(False)
        self.train()
        live = [name for name, m in self.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
        if live:
            raise UserError(
                f"a frozen reward must be deterministic in train(); dropout is on in {', '.join(live)}"
            )
        return self


def bound(value: Tensor) -> float | None:
    """A limit as JSON can say it: null where there is none."""
    return float(value) if value.isfinite() else None

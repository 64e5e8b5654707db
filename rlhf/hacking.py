"""Is the policy improving, or is it learning to please the reward models?

Five signs, all measured on validation clips and none differentiated: the reward leaves the range it showed on real
validation pairs; the training rewards rise while a held-out judge falls; judges that agreed no longer do; motion
collapses; pixels saturate. The variance of the reward inside a batch is no sign at all: it does not move under a
blatant attack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from reelhf.config import Config

if TYPE_CHECKING:
    from rewards import CompositeReward


class HackingConfig(Config):
    """When a validation counts as hacked, and how many in a row end the run."""

    range_margin: float = Field(0.5, ge=0)
    """Tolerated excess of a mean reward over its validation range, as a fraction of that range's width."""
    max_held_out_fall: float = Field(0.1, ge=0)
    """Tolerated fall of the held-out total below its start, in weighted z units, while the training total rises."""
    min_motion_ratio: float = Field(0.5, ge=0, le=1)
    """Smallest mean motion amplitude, relative to the start."""
    max_saturation_rise: float = Field(0.05, ge=0)
    """Largest rise of the fraction of pixels outside [0, 1] by more than 2 %."""
    max_spread_ratio: float | None = Field(None, ge=1)
    """Largest mean disagreement of the training and the held-out rewards about a clip, relative to the start; None is off."""
    patience: int = Field(2, ge=1)
    """Validations in a row with an alarm after which the run stops."""


SMALLEST_SPREAD = 0.05
"""Disagreement in z below which judges count as agreeing, so that a ratio to it means something."""
SATURATION_MARGIN = 0.02
"""How far outside [0, 1] a pixel value lies before it counts as saturated; a VAE overshoots by less on real clips."""


def motion_amplitude(frames: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring frames, per clip [B]; 0 for a single frame. frames [B, 3, F, H, W]."""
    if frames.shape[2] < 2:
        return frames.new_zeros(len(frames))
    return frames.diff(dim=2).abs().flatten(1).mean(1)


def saturated_fraction(frames: Tensor) -> Tensor:
    """Fraction of unclamped pixel values clearly outside [0, 1], per clip [B]."""
    outside = (frames > 1 + SATURATION_MARGIN) | (frames < -SATURATION_MARGIN)
    return outside.flatten(1).float().mean(1)


def validation_ranges(reward: CompositeReward) -> dict[str, tuple[float, float]]:
    """Dimension -> range of the raw reward on its validation clips, as frozen with each reward model."""
    ranges: dict[str, tuple[float, float]] = {}
    for model in reward.models:
        bounds = zip(model.low.tolist(), model.high.tolist(), strict=True)
        ranges |= dict(zip(model.dimensions, bounds, strict=True))
    return ranges


@dataclass(frozen=True)
class ValidationReading:
    """Means over the valid validation clips at one step."""

    rewards: Mapping[str, float]
    """Raw reward per dimension of the training rewards."""
    total: float
    """Composite of the training rewards, weighted bounded z."""
    held_out_total: float
    """The same composite by the held-out rewards."""
    motion: float
    saturation: float
    spread: float = 0.0
    """Mean over clips of the standard deviation over judges (`ensemble_spread`)."""


def range_excess(value: float, validation_range: tuple[float, float]) -> float:
    """How far `value` lies outside the range, as a fraction of the range's width; 0 inside."""
    low, high = validation_range
    return max(value - high, low - value, 0.0) / max(high - low, 1e-6)


def alarms(
    now: ValidationReading,
    start: ValidationReading,
    ranges: Mapping[str, tuple[float, float]],
    config: HackingConfig,
) -> list[str]:
    """The names of the signs that fire: `range:<dimension>`, `held_out_gap`, `ensemble_gap`, `motion_collapse`, `saturation`.

    Only an excess beyond the start's own counts: a weak generator may begin outside the range of good clips.
    """
    fired = []
    for name, validation_range in ranges.items():
        excess = range_excess(now.rewards[name], validation_range)
        if excess > config.range_margin + range_excess(start.rewards[name], validation_range):
            fired.append(f"range:{name}")
    fell = start.held_out_total - now.held_out_total
    if now.total > start.total and fell > config.max_held_out_fall:
        fired.append("held_out_gap")
    ratio = config.max_spread_ratio
    if ratio is not None and now.spread > ratio * max(start.spread, SMALLEST_SPREAD):
        fired.append("ensemble_gap")
    if now.motion < config.min_motion_ratio * start.motion:
        fired.append("motion_collapse")
    if now.saturation > start.saturation + config.max_saturation_rise:
        fired.append("saturation")
    return fired


@dataclass
class HackingMonitor:
    """Remembers the start and counts the alarmed validations in a row; its state travels in the checkpoint."""

    config: HackingConfig
    ranges: Mapping[str, tuple[float, float]]
    """Training dimension -> range of its raw reward on validation clips, frozen with the reward's checkpoint."""
    start: ValidationReading | None = None
    alarmed: int = 0
    fired: list[str] = field(default_factory=list)

    def observe(self, reading: ValidationReading) -> list[str]:
        """Names of the signs that fire now; the first reading is the start and fires none."""
        if self.start is None:
            self.start = reading
        self.fired = alarms(reading, self.start, self.ranges, self.config)
        self.alarmed = self.alarmed + 1 if self.fired else 0
        return self.fired

    @property
    def should_stop(self) -> bool:
        return self.alarmed >= self.config.patience

    def state_dict(self) -> dict[str, Any]:
        return {
            "start": None if self.start is None else asdict(self.start),
            "alarmed": self.alarmed,
            "fired": list(self.fired),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.start = None if state["start"] is None else ValidationReading(**state["start"])
        self.alarmed, self.fired = state["alarmed"], list(state["fired"])


def ensemble_spread(totals: Sequence[Tensor]) -> Tensor:
    """Standard deviation over several judges of each clip's z total, [B]; it grows at once when one judge is attacked."""
    return torch.stack(list(totals)).std(dim=0, unbiased=False)

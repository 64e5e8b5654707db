"""Progressive training: what one stage of a run sees, how fast it learns, when it stops.

Seedance 1.0 (2506.09113, 4.1-4.3): small pictures, then small clips, then larger and longer ones; continued training with more
image-to-video, long and motion-only captions and an annealed rate; fine-tuning per curated subset, stopped early.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from generator.data.buckets import BucketConfig
from generator.data.manifest import CAPTION_KINDS, CaptionKind
from generator.refiner import LowResConfig
from generator.training.latents import SigmaConfig, TaskMixConfig
from reelhf.config import Config


class CaptionMixConfig(Config):
    """Which caption a sample is shown, as shares of any scale. A clip without the kind that was drawn shows its `caption`."""

    caption: float = Field(1.0, ge=0)
    """The caption that every clip has."""
    long_caption: float = Field(0.0, ge=0)
    """Dense description."""
    motion_caption: float = Field(0.0, ge=0)
    """What moves, and nothing else."""

    @model_validator(mode="after")
    def _some_share(self) -> CaptionMixConfig:
        if not self.caption + self.long_caption + self.motion_caption > 0:
            raise ValueError("the shares of the captions are all 0; expected one above")
        return self

    def pick(self, uniform: float) -> CaptionKind:
        """The kind that a number from [0, 1) stands for."""
        shares = [getattr(self, kind) for kind in CAPTION_KINDS]
        point = uniform * math.fsum(shares)
        for kind, share in zip(CAPTION_KINDS, shares, strict=True):
            if point < share:
                return kind
            point -= share
        return max(CAPTION_KINDS, key=lambda kind: getattr(self, kind))  # rounding at the end


class EarlyStopConfig(Config):
    """When more training makes the loss on clips kept out worse."""

    patience: PositiveInt = 3
    """Validations in a row without a better loss, after which the run ends; the best weights are kept."""
    min_improvement: float = Field(0.0, ge=0, lt=1)
    """Share by which a loss must lie below the best so far to count as better."""


class StageConfig(Config):
    """One stage: its clips, its mix of tasks, its rate. What is left out is as the run has it."""

    name: str = Field(min_length=1)
    """In metrics and messages."""
    buckets: BucketConfig
    """Sizes, lengths and rate of its clips, as `reelhf generator data encode` made them."""
    subset: str | None = None
    """Only clips with this tag."""
    num_steps: PositiveInt
    """Optimizer steps."""
    micro_batch_tokens: PositiveInt = 8192
    """Latent positions per forward pass of the largest bucket; smaller ones get as many samples as take as long."""
    tasks: TaskMixConfig | None = None
    """Shares of text-to-image and image-to-video. Text-to-image takes the stage's pictures, or single frames where it has none."""
    captions: CaptionMixConfig = CaptionMixConfig()
    """Shares of the kinds of caption."""
    sigma: SigmaConfig | None = None
    """Noise levels."""
    prompt_dropout: float | None = Field(None, ge=0, le=1)
    """Share of samples without a prompt."""
    lr: PositiveFloat | None = None
    """Learning rate after the warmup."""
    final_lr: float | None = Field(None, ge=0)
    """Rate at the stage's last step, reached along a half cosine; the rate is constant by default."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the rate rises linearly from 0 at the start of the stage."""
    low_res: LowResConfig | None = None
    """Of a refiner: how its input is made, such as from how much smaller a clip."""
    early_stop: EarlyStopConfig | None = None
    """Of the last stage only."""


def check_stages(stages: Sequence[StageConfig]) -> None:
    """Raises: ValueError for two stages of a name, or an early stop before the last."""
    names = [stage.name for stage in stages]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two stages are called {twice[0]}; give each a name of its own")
    early = [stage.name for stage in stages[:-1] if stage.early_stop is not None]
    if early:
        raise ValueError(
            f"stage {early[0]} has early_stop, and another follows; only the last may stop early"
        )


def learning_rate(
    step: int, num_steps: int, *, lr: float, final_lr: float | None = None, warmup_steps: int = 0
) -> float:
    """Rate at a step (from 0) of a stage: linear warmup from 0, then constant, or a half cosine to `final_lr` at the last step."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if final_lr is None:
        return lr
    length = num_steps - 1 - warmup_steps
    share = (step - warmup_steps) / length if length > 0 else 1.0
    return final_lr + (lr - final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


class EarlyStop:
    """Watches the validation loss; its state travels with the checkpoint."""

    def __init__(self, config: EarlyStopConfig | None) -> None:
        self.config = config
        self.best_loss: float | None = None
        self.best_step: int | None = None
        """Of the run, counted from 1."""
        self.worse = 0
        """Validations since then."""

    @property
    def stopped(self) -> bool:
        return self.config is not None and self.worse >= self.config.patience

    def observe(self, step: int, loss: float) -> bool:
        """Whether this is the best loss so far; one that is not finite never is."""
        if self.config is None:
            return False
        bar = math.inf if self.best_loss is None else self.best_loss
        if loss < bar * (1 - self.config.min_improvement) if bar < math.inf else loss < math.inf:
            self.best_loss, self.best_step, self.worse = loss, step, 0
            return True
        self.worse += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss, "best_step": self.best_step, "worse": self.worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_loss, self.best_step = state["best_loss"], state["best_step"]
        self.worse = state["worse"]

"""Settings of the pre-training of the three backbones."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from reelhf.config import Config
from rewards.aesthetic import AestheticConfig
from rewards.foundational import FoundationalConfig
from rewards.generative import GenerativeConfig
from rewards.motion import MotionConfig


class StageConfig(Config):
    """How long one backbone is pre-trained."""

    num_steps: PositiveInt
    """Optimizer steps."""
    batch_size: PositiveInt
    """Clips per step."""
    lr: PositiveFloat = 2e-3
    """Peak learning rate of what is no matrix; matrices use Muon at ten times this. Warm-up, then a cosine."""


class PretrainConfig(Config):
    """The three backbones and how each is pre-trained."""

    foundational: FoundationalConfig = FoundationalConfig()
    """The vision-language model."""
    generative: GenerativeConfig | None = None
    """The vision-language model that answers yes or no, in place of `foundational`; a tiny one is pre-trained as that is."""
    motion: MotionConfig = MotionConfig()
    """The video encoder."""
    aesthetic: AestheticConfig = AestheticConfig()
    """The image encoder."""
    foundational_stage: StageConfig = StageConfig(num_steps=200, batch_size=16)
    """Captioning and its heads."""
    motion_stage: StageConfig = StageConfig(num_steps=220, batch_size=16)
    """Masked prediction and its probe."""
    aesthetic_stage: StageConfig = StageConfig(num_steps=150, batch_size=16)
    """Contrastive learning and its head."""
    num_frames: PositiveInt = 9
    """Frames per window cut from the clips."""
    fps: PositiveFloat = 8.0
    """Frames per second of the windows."""
    size: PositiveInt = 128
    """Height and width of the windows in pixels."""
    max_windows: PositiveInt = 1024
    """Windows used at most."""
    spoil: float = Field(0.7, ge=0, le=1)
    """How far clips are spoiled at most while learning to caption them: generated clips are not clean either."""
    masked_share: float = Field(0.3, ge=0, le=1)
    """Share of the motion steps spent on masked prediction and words, before the probe learns to rank."""
    words_share: float = Field(0.75, ge=0, le=1)
    """Share of the foundational steps in which the vision tower alone learns words and spoiled bodies."""
    side_by_side: PositiveInt = 1
    """Backbones that are pre-trained at once, each in a process of its own with its share of the threads."""
    ensemble: PositiveInt = 1
    """How many of each, with `seed`, `seed + 1`, …: what the members of an ensemble of rewards begin from, so that they do not share what a
    single backbone cannot see."""
    seed: int = 0
    """Of weights and batches."""

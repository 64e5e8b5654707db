"""The aesthetic reward: a SigLIP image encoder on a few keyframes, blind to the prompt.

Frames are drawn one per equal stretch of the clip, afresh at each training step, from the caller's generator: no live
selector that a generator could game. The clip's score is the mean over keyframes with a small soft-min, so that one
ugly frame costs more than its share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from reelhf.config import Config
from rewards.backbones import IMAGE, build
from rewards.base import FrameSelection
from rewards.heads import every_head
from rewards.module import RewardModule
from rewards.preprocess import stratified_frames
from rewards.recipes import PixelRecipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast


class AestheticConfig(Config):
    """Size of the tiny image encoder, or the folder of a real one."""

    dimensions: tuple[Literal["aesthetic_quality", "texture_quality"], ...] = ("aesthetic_quality",)
    """What it scores; texture_quality is taught by `reelhf rewards texture`, without votes."""
    backbone: str | None = None
    """A local folder or hub id of a SigLIP, SigLIP 2 or CLIP; None builds the tiny SigLIP below, to be pre-trained on captioned clips."""
    hidden_size: PositiveInt = 96
    """Width of the image encoder."""
    num_layers: PositiveInt = 3
    """Layers of the image encoder."""
    num_heads: PositiveInt = 4
    """Attention heads."""
    patch_size: PositiveInt = 16
    """Side of a patch in pixels."""
    area: PositiveInt = 128 * 128
    """Pixels per keyframe after the resize: large enough that the refiner's detail is visible."""
    preprocessing: Literal["area", "processor"] | PixelRecipe = "area"
    """How frames are made to fit: about `area` pixels; as the backbone's own processor does, whose numbers are then kept with the checkpoint; or these."""
    num_keyframes: PositiveInt = 3
    """Frames looked at per clip."""
    softmin_share: float = Field(0.3, ge=0, le=1)
    """Share of the soft-min over keyframes in the clip's score; the rest is their mean."""
    softmin_temperature: PositiveFloat = 0.5
    """Width of the soft-min, in logits."""
    uncertainty: bool = False
    """Also say how sure each score is, for a `loss.kind: gaussian` training."""
    max_text_tokens: PositiveInt = 128
    """Longer captions are cut; the text tower serves pre-training only."""
    long_prompts: Literal["cut", "refuse"] = "cut"
    """What happens to a prompt of more tokens: its beginning is scored, with a warning, or it is refused."""
    vocab_size: PositiveInt = 640
    """Tokens of the tokenizer trained on the captions."""


def mean_with_softmin(scores: Tensor, *, share: float, temperature: float) -> Tensor:
    """(1 - share) * mean + share * soft-min over the last axis; equal scores give that score."""
    count = math.log(scores.shape[-1])
    softmin = -temperature * (torch.logsumexp(-scores / temperature, dim=-1) - count)
    return (1 - share) * scores.mean(-1) + share * softmin


class AestheticReward(RewardModule):
    """SigLIP, SigLIP 2 or CLIP image encoder on keyframes: aesthetic_quality."""

    kind: ClassVar[str] = "siglip_aesthetic"
    reads_prompt: ClassVar[bool] = False
    readouts: ClassVar[tuple[str, ...]] = ("head", "spread")
    config_class: ClassVar[type[Config]] = AestheticConfig
    settings: AestheticConfig

    def __init__(
        self,
        config: AestheticConfig,
        tokenizer: PreTrainedTokenizerFast,
        *,
        backbone_config: PretrainedConfig | None = None,
    ) -> None:
        super().__init__(config, tokenizer)
        self.family, self.backbone = build(
            IMAGE, config.backbone, backbone_config, tiny="siglip", settings=config
        )
        size = self.backbone.config
        self.recipe = self.make_recipe(
            self.family.recipe(size), multiple=size.patch_size, area_kernel="bicubic"
        )
        for name, part in self.new_readouts().items():
            self.add_module(name, part)

    def new_readouts(self) -> dict[str, nn.Module]:
        hidden = self.backbone.config.hidden_size
        out: dict[str, nn.Module] = {
            "head": nn.Sequential(
                nn.Linear(2 * hidden, hidden), nn.GELU(), nn.Linear(hidden, len(self.dimensions))
            )
        }
        if self.settings.uncertainty:
            out["spread"] = self.spread_head(2 * hidden)
        return out

    def select(
        self, num_frames: int, fps: float, generator: torch.Generator | None = None
    ) -> FrameSelection:
        return FrameSelection(stratified_frames(num_frames, self.settings.num_keyframes, generator))

    def features(self, images: Tensor) -> Tensor:
        """Pooled and mean-of-patches features [N, 2 H] of images [N, 3, H, W] in [0, 1]."""
        pixels = self.recipe(images[:, :, None]).squeeze(2)
        pooled, patches = self.family.states(self.backbone, pixels)
        return torch.cat([pooled, patches.mean(1)], dim=1)

    def values(
        self, frames: Tensor, fps: Tensor, prompts: list[list[int]]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        images = frames.transpose(1, 2).flatten(0, 1)  # [B * F', 3, H, W]
        features = self.features(images).unflatten(0, (len(frames), -1))  # [B, F', 2 H]
        values, worst = zip(*(self.judge(features, head) for head in every_head(self)), strict=True)
        return list(values), {"worst_keyframe": torch.stack(worst).mean(0)}

    def judge(self, features: Tensor, head: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Values [B, D] of one head for features [B, F', 2 H] of the keyframes, and its lowest score of one [B]."""
        batch, count = features.shape[:2]
        per_frame = head["head"](features.flatten(0, 1)).view(batch, count, -1)
        per_frame = per_frame.transpose(1, 2)  # [B, D, F']
        values = mean_with_softmin(
            per_frame,
            share=self.settings.softmin_share,
            temperature=self.settings.softmin_temperature,
        )
        if self.settings.uncertainty:
            values = torch.cat([values, head["spread"](features.mean(1))], dim=1)
        return values, per_frame[:, 0].detach().amin(-1)

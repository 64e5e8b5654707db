"""What the rewards that stand on a vision-language model share: its settings, its frames, its prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from reelhf.config import Config
from reelhf.errors import UserError
from rewards.backbones import LANGUAGE, build
from rewards.base import FrameSelection
from rewards.module import RewardModule
from rewards.preprocess import fixed_rate_frames, stratified_frames
from rewards.recipes import PixelRecipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast


class VisionLanguageConfig(Config):
    """Size of the tiny vision-language model, or the folder of a real one."""

    backbone: str | None = None
    """A local folder or hub id of a Qwen2.5-VL, Qwen3-VL or InternVL; None builds the tiny one below, to be pre-trained on captioned clips."""
    family: Literal["qwen2_5_vl", "qwen3_vl", "internvl"] = "qwen2_5_vl"
    """Of the tiny one; a folder says its own."""
    hidden_size: PositiveInt = 96
    """Width of the language model and of the vision tower."""
    num_layers: PositiveInt = 3
    """Layers of the language model."""
    vision_layers: PositiveInt = 2
    """Layers of the vision tower."""
    num_heads: PositiveInt = 4
    """Attention heads of both."""
    patch_size: PositiveInt = 8
    """Side of a vision patch in pixels; 2x2 of them and 2 frames make one token."""
    area: PositiveInt = 64 * 64
    """Pixels per frame after the resize; the aspect ratio is kept."""
    preprocessing: Literal["area", "processor"] | PixelRecipe = "area"
    """How frames are made to fit: about `area` pixels; as the backbone's own processor does, whose numbers are then kept with the checkpoint; or these."""
    num_frames: PositiveInt = 6
    """Frames looked at per clip, one per equal stretch of it; at most so many with `sample_fps`."""
    sample_fps: PositiveFloat | None = None
    """Frames looked at per second, at fixed seconds whatever the clip's rate; None takes `num_frames` of any clip."""
    vocab_size: PositiveInt = 640
    """Tokens of the tokenizer trained on the captions."""
    uncertainty: bool = False
    """Also say how sure each score is, for a `loss.kind: gaussian` training."""
    max_text_tokens: PositiveInt = 128
    """Longer prompts are cut."""
    long_prompts: Literal["cut", "refuse"] = "cut"
    """What happens to a prompt of more tokens: its beginning is scored, with a warning, or it is refused."""


class VisionLanguageReward(RewardModule):
    """A vision-language model of some family, as the backbone of a reward."""

    settings: Any

    def __init__(
        self,
        config: VisionLanguageConfig,
        tokenizer: PreTrainedTokenizerFast,
        *,
        backbone_config: PretrainedConfig | None = None,
    ) -> None:
        super().__init__(config, tokenizer)
        self.family, self.backbone = build(
            LANGUAGE,
            config.backbone,
            backbone_config,
            tiny=config.family,
            settings=config,
            tokenizer=tokenizer,
        )
        if backbone_config is None and config.backbone is not None:
            self.backbone.resize_token_embeddings(len(tokenizer))
        self.backbone.config.use_cache = False
        patch, self.merge, self.temporal = self.family.sizes(self.backbone.config)
        self.recipe = self.make_recipe(
            self.family.recipe_of(self.backbone.config),
            multiple=patch * self.merge,
            area_kernel="bicubic",
        )

    def select(
        self, num_frames: int, fps: float, generator: torch.Generator | None = None
    ) -> FrameSelection:
        count, rate = self.settings.num_frames, self.settings.sample_fps
        if rate is None:
            return FrameSelection(stratified_frames(num_frames, count, generator))
        return FrameSelection(
            fixed_rate_frames(num_frames, fps, rate=rate, at_most=count, generator=generator)
        )

    def patches(self, frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """The vision tower's patches of frames [B, 3, F, H, W] and the grid (t, h, w) of one clip."""
        return self.family.patches(self.backbone.config, self.recipe(frames))

    def video_tokens(self, grid: tuple[int, int, int], num_frames: int, fps: float) -> list[int]:
        """The token ids that stand for one clip."""
        return self.family.video_tokens(
            grid,
            merge=self.merge,
            temporal=self.temporal,
            num_frames=num_frames,
            fps=fps,
            tokenizer=self.tokenizer,
        )

    def check_context(self, length: int) -> None:
        """UserError when clip and prompt together are longer than the backbone can read."""
        most = self.backbone.config.text_config.max_position_embeddings
        if length > most:
            raise UserError(
                f"clip and prompt are {length} tokens, the backbone reads {most}; lower num_frames, the pixels per frame or max_text_tokens"
            )

"""The motion reward: a V-JEPA 2 video encoder, an attentive probe over time, and the motion its prompt calls for.

The question put to people is "which moves more naturally and as the prompt asks". Natural: the probe pools each tubelet
time by itself and reads level, velocity, speed and unrest of what it finds there and where. As the prompt asks: the same features predict
words (`rewards.words`) in pre-training, and the prompt is held against the paths. Odd clips are padded to whole tubelets, otherwise V-JEPA 2
drops the last frame silently. Source: V-JEPA 2, 2506.09985, attentive probe of sec. 4; the reading over time is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt, field_validator
from torch import Tensor, nn

from reelhf.config import Config
from rewards.backbones import VIDEO, build
from rewards.base import FrameSelection
from rewards.heads import every_head, own_readouts
from rewards.module import RewardModule
from rewards.preprocess import fixed_rate_frames, pad_frames
from rewards.recipes import PixelRecipe
from rewards.temporal import PromptAim, TemporalProbe
from rewards.words import WordHead

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast


class MotionConfig(Config):
    """Size of the tiny video encoder, or the folder of a real one."""

    dimensions: tuple[
        Literal["motion_quality", "motion_artefacts", "motion_amplitude", "motion_vividness"], ...
    ] = ("motion_quality",)
    """What it scores, motion_quality first. Sub-scores learn where a verdict names them and weigh nothing unless a weight does: artefacts (fewer are better),
    amplitude and vividness as people see them, never the size of a measured flow, which prefers either no motion or the most."""
    backbone: str | None = None
    """A local folder or hub id of a V-JEPA 2 or a VideoMAE; None builds the tiny V-JEPA 2 below, to be pre-trained on captioned clips."""
    hidden_size: PositiveInt = 96
    """Width of the video encoder."""
    num_layers: PositiveInt = 3
    """Layers of the video encoder."""
    num_heads: PositiveInt = 4
    """Attention heads."""
    patch_size: PositiveInt = 16
    """Side of a patch in pixels; 2 frames make one tubelet."""
    area: PositiveInt = 64 * 64
    """Pixels per frame after the resize; the aspect ratio is kept."""
    preprocessing: Literal["area", "processor"] | PixelRecipe = "area"
    """How frames are made to fit: about `area` pixels; as the backbone's own processor does, whose numbers are then kept with the checkpoint; or these."""
    sample_fps: PositiveFloat | None = None
    """Frames looked at per second, at fixed seconds whatever the clip's rate; None looks at every frame."""
    num_queries: PositiveInt = 4
    """Queries of the attentive pooling."""
    vocab_size: PositiveInt = 640
    """Tokens of the tokenizer trained on the captions."""
    uncertainty: bool = False
    """Also say how sure each score is, for a `loss.kind: gaussian` training."""
    max_text_tokens: PositiveInt = 128
    """Longer prompts are cut."""
    long_prompts: Literal["cut", "refuse"] = "cut"
    """What happens to a prompt of more tokens: its beginning is scored, with a warning, or it is refused."""

    @field_validator("dimensions")
    @classmethod
    def _quality_first(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value[:1] != ("motion_quality",) or len(set(value)) != len(value):
            raise ValueError(
                f"dimensions are {', '.join(value) or 'none'}; expected motion_quality first and each once"
            )
        return value


class MotionReward(RewardModule):
    """V-JEPA 2 or VideoMAE encoder, a probe over time and the prompt's words: motion_quality."""

    kind: ClassVar[str] = "vjepa2_motion"
    readouts: ClassVar[tuple[str, ...]] = (
        "head",
        "aim",
        "read",
        "spread",
    )
    config_class: ClassVar[type[Config]] = MotionConfig
    settings: MotionConfig

    def __init__(
        self,
        config: MotionConfig,
        tokenizer: PreTrainedTokenizerFast,
        *,
        backbone_config: PretrainedConfig | None = None,
    ) -> None:
        super().__init__(config, tokenizer)
        self.family, self.backbone = build(
            VIDEO, config.backbone, backbone_config, tiny="vjepa2", settings=config
        )
        size = self.backbone.config
        self.recipe = self.make_recipe(
            self.family.recipe(size), multiple=size.patch_size, area_kernel="bilinear"
        )
        hidden = size.hidden_size
        self.probe = TemporalProbe(hidden, config.num_queries, config.num_heads)
        self.words = WordHead(self.probe.features, len(tokenizer))
        for name, part in self.new_readouts().items():
            self.add_module(name, part)

    def new_readouts(self) -> dict[str, nn.Module]:
        hidden, course = self.backbone.config.hidden_size, self.probe.course
        out: dict[str, nn.Module] = {
            "head": nn.Sequential(nn.Linear(course, hidden), nn.GELU()),
            "aim": PromptAim(course, len(self.tokenizer), hidden),
        }
        read = nn.Linear(hidden + 1, len(self.dimensions), bias=False)
        nn.init.normal_(read.weight[:, :hidden], std=0.02)
        nn.init.constant_(read.weight[:, hidden:], 0.25)  # begins as agreement with the prompt
        out["read"] = read
        if self.settings.uncertainty:
            out["spread"] = self.spread_head(course)
        return out

    def select(
        self, num_frames: int, fps: float, generator: torch.Generator | None = None
    ) -> FrameSelection:
        rate = self.settings.sample_fps
        if rate is None:
            return FrameSelection(None)
        return FrameSelection(fixed_rate_frames(num_frames, fps, rate=rate, generator=generator))

    def features(self, frames: Tensor, fps: Tensor) -> Tensor:
        """The probe's features [B, 4 * Q * H + course] of frames [B, 3, F, H, W] in [0, 1] shown at `fps` [B]."""
        pixels = self.pixels(frames)
        tokens = self.family.tokens(self.backbone, pixels)
        config = self.backbone.config
        rows, columns = (side // config.patch_size for side in pixels.shape[-2:])
        grid = (pixels.shape[1] // config.tubelet_size, rows, columns)
        return self.probe(tokens, grid, config.tubelet_size / fps)

    def pixels(self, frames: Tensor) -> Tensor:
        """What the encoder takes: resized, normalised, whole tubelets, time first [B, F, 3, h, w]."""
        tubelet = self.backbone.config.tubelet_size
        return pad_frames(self.recipe(frames), tubelet).transpose(1, 2)

    def values_and_words(
        self, frames: Tensor, fps: Tensor, prompts: list[list[int]]
    ) -> tuple[Tensor, Tensor]:
        """Raw logits [B, D] of the first head and log-probabilities of words [B, V]."""
        features = self.features(frames, fps)
        return self.judge(features, prompts, own_readouts(self)), self.words(features)

    def values(
        self, frames: Tensor, fps: Tensor, prompts: list[list[int]]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        features = self.features(frames, fps)
        return [self.judge(features, prompts, head) for head in every_head(self)], {}

    def judge(self, features: Tensor, prompts: list[list[int]], head: Mapping[str, Any]) -> Tensor:
        """Raw logits [B, D] of one head."""
        course = features[:, -self.probe.course :]
        # lengths and speeds lose their last digits in bfloat16, and the distance of two near points all of them
        with torch.autocast(course.device.type, enabled=False):
            aim = head["aim"](course, self.words.bag(prompts) * self.words.idf)
            values = head["read"](torch.cat([head["head"](course), -aim], dim=1))
            if self.settings.uncertainty:
                values = torch.cat([values, head["spread"](course)], dim=1)
        return values

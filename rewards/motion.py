"""The motion reward: a V-JEPA 2 video encoder, an attentive probe over time, and the words its motion calls for.

The question put to people is "which moves more naturally and as the prompt asks". Natural: the probe pools each tubelet
time by itself and reads level, velocity, speed and unrest of what it finds there. As the prompt asks: the same features predict
words (`rewards.words`), and the prompt is held against them. Odd clips are padded to whole tubelets, otherwise V-JEPA 2
drops the last frame silently. Source: V-JEPA 2, 2506.09985, attentive probe of sec. 4; the reading over time is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, field_validator
from torch import Tensor, nn

from reelhf.config import Config
from rewards.backbones import VIDEO, build
from rewards.base import FrameSelection
from rewards.heads import every_head, own_readouts
from rewards.module import RewardModule
from rewards.preprocess import fixed_rate_frames, pad_frames
from rewards.recipes import PixelRecipe
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


class TemporalProbe(nn.Module):
    """Queries attend within each tubelet time; what they find is read as level, velocity, speed and unrest over time.

    RoPE leaves no absolute place in the encoder's states, and a path is places over times: so the place of each patch
    is added before pooling. Velocity is change per second, not per clip: the same frames shown twice as fast move twice as fast.
    Speed is its size, whichever way: "slowly" is linear in it and not in the velocity.
    """

    FREQUENCIES = (0.5, 1.0, 2.0)

    def __init__(self, hidden_size: int, num_queries: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(hidden_size)
        self.queries = nn.Parameter(torch.randn(num_queries, hidden_size) * 0.5)
        self.place = nn.Linear(2 * (1 + 2 * len(self.FREQUENCIES)), hidden_size)
        self.mix = nn.Sequential(
            nn.Linear(hidden_size, 2 * hidden_size),
            nn.GELU(),
            nn.Linear(2 * hidden_size, hidden_size),
        )
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size)
        self.features = 4 * num_queries * hidden_size

    def places(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Coordinates in [-1, 1] and their sines and cosines, [rows * columns, 2 + 4 * frequencies]."""
        axes = [(torch.arange(n, device=device) + 0.5) / n * 2 - 1 for n in (rows, columns)]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        waves = [f(torch.pi * k * grid) for k in self.FREQUENCIES for f in (torch.sin, torch.cos)]
        return torch.cat([grid, *waves], dim=1)

    def forward(self, tokens: Tensor, grid: tuple[int, int, int], interval: Tensor) -> Tensor:
        """Tokens [B, T * h * w, H] on a grid (T, h, w), `interval` [B] seconds between times -> features [B, 4 * Q * H]."""
        times, rows, columns = grid
        batch = len(tokens)
        tokens = self.norm(tokens).view(batch * times, rows * columns, -1)
        place = self.places(rows, columns, tokens.device).to(tokens.dtype)
        tokens = self.mix(tokens + self.place(place))

        def split(x: Tensor) -> Tensor:  # [N, L, H] -> [N, heads, L, H / heads]
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        key, value = self.key_value(tokens).chunk(2, dim=-1)
        queries = self.queries.expand(batch * times, -1, -1)
        found = F.scaled_dot_product_attention(split(queries), split(key), split(value))
        found = found.transpose(1, 2).reshape(batch, times, -1)  # [B, T, Q * H]
        velocity = found.new_zeros(found.shape[0], found.shape[2])
        if times > 1:
            step = torch.arange(times, device=tokens.device) - (times - 1) / 2
            slope = (found * step[:, None]).sum(1) / step.square().sum()  # least squares, per time
            velocity = slope / interval[:, None]
        speed = (velocity.square() + 1e-6).sqrt()
        unrest = found.new_zeros(found.shape[0], found.shape[2])
        if times > 2:
            bend = found[:, 2:] - 2 * found[:, 1:-1] + found[:, :-2]
            unrest = (bend.square() + 1e-6).sqrt().mean(1)
        return torch.cat([found.mean(1), velocity, speed, unrest], dim=1)


class PromptAim(nn.Module):
    """How far a clip's motion is from what the prompt asks: both become points in one small space.

    Words alone are one-sided: nothing is ever too fast for "quickly". Near a point there is too little and too much.
    """

    def __init__(self, features: int, vocab_size: int, hidden_size: int, size: int = 16) -> None:
        super().__init__()
        self.shown = nn.Sequential(
            nn.LayerNorm(features),
            nn.Linear(features, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, size),
        )
        self.asked = nn.Sequential(
            nn.Linear(vocab_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, size),
        )

    def forward(self, features: Tensor, words: Tensor) -> Tensor:
        """Features [B, H] and weighted words of the prompt [B, V] -> squared distance [B, 1]."""
        gap = self.shown(features) - self.asked(F.normalize(words, dim=1) * words.shape[1] ** 0.25)
        return gap.square().mean(1, keepdim=True)


class MotionReward(RewardModule):
    """V-JEPA 2 or VideoMAE encoder, a probe over time and the prompt's words: motion_quality."""

    kind: ClassVar[str] = "vjepa2_motion"
    readouts: ClassVar[tuple[str, ...]] = (
        "head",
        "aim",
        "read",
        "words.weight",
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
        self.words = WordHead(self.probe.features, len(tokenizer), num_matches=4)
        for name, part in self.new_readouts().items():
            self.add_module(name, part)

    def new_readouts(self) -> dict[str, nn.Module]:
        hidden, features = self.backbone.config.hidden_size, self.probe.features
        out: dict[str, nn.Module] = {
            "head": nn.Sequential(nn.LayerNorm(features), nn.Linear(features, hidden), nn.GELU()),
            "aim": PromptAim(features, len(self.tokenizer), hidden),
        }
        read = nn.Linear(hidden + 5, len(self.dimensions))
        nn.init.normal_(read.weight[:, :hidden], std=0.02)
        nn.init.constant_(read.weight[:, hidden:], 0.25)  # begins as agreement with the prompt
        out["read"] = read
        if self.settings.uncertainty:
            out["spread"] = self.spread_head(features)
        return out

    def select(
        self, num_frames: int, fps: float, generator: torch.Generator | None = None
    ) -> FrameSelection:
        rate = self.settings.sample_fps
        if rate is None:
            return FrameSelection(None)
        return FrameSelection(fixed_rate_frames(num_frames, fps, rate=rate, generator=generator))

    def features(self, frames: Tensor, fps: Tensor) -> Tensor:
        """The probe's features [B, 4 * Q * H] of frames [B, 3, F, H, W] in [0, 1] shown at `fps` [B]."""
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
        words = self.words(features)
        return self.judge(features, words, prompts, own_readouts(self)), words

    def values(
        self, frames: Tensor, fps: Tensor, prompts: list[list[int]]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        features = self.features(frames, fps)
        words = self.words(features)
        return [self.judge(features, words, prompts, head) for head in every_head(self)], {}

    def judge(
        self, features: Tensor, words: Tensor, prompts: list[list[int]], head: Mapping[str, Any]
    ) -> Tensor:
        """Raw logits [B, D] of one head."""
        bag = self.words.bag(prompts) * self.words.idf
        match = self.words.match(words, prompts, head["words.weight"])
        agreement = [match, -head["aim"](features, bag)]
        values = head["read"](torch.cat([head["head"](features), *agreement], dim=1))
        if self.settings.uncertainty:
            values = torch.cat([values, head["spread"](features)], dim=1)
        return values

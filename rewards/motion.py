"""The motion reward: a V-JEPA 2 video encoder, an attentive probe over time, and the words its motion calls for.

The question put to people is "which moves more naturally and as the prompt asks". Natural: the probe pools each tubelet
time by itself and reads level, velocity, speed and unrest of what it finds there. As the prompt asks: the same features predict
words (`rewards.words`), and the prompt is held against them. Odd clips are padded to whole tubelets, otherwise V-JEPA 2
drops the last frame silently. Source: V-JEPA 2, 2506.09985, attentive probe of sec. 4; the reading over time is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from reelhf.config import Config
from rewards.module import RewardModule
from rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, fit_area, normalise, pad_frames, resize
from rewards.words import WordHead

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, VJEPA2Config


class MotionConfig(Config):
    """Size of the tiny video encoder, or the folder of a real one."""

    dimensions: tuple[Literal["motion_quality"], ...] = ("motion_quality",)
    """What it scores."""
    backbone: str | None = None
    """A local folder or hub id of a V-JEPA 2; None builds the tiny one below, to be pre-trained on captioned clips."""
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
    num_queries: PositiveInt = 4
    """Queries of the attentive pooling."""
    vocab_size: PositiveInt = 640
    """Tokens of the tokenizer trained on the captions."""
    uncertainty: bool = False
    """Also say how sure each score is, for a `loss.kind: gaussian` training."""
    max_text_tokens: PositiveInt = 128
    """Longer prompts are cut."""


def tiny_vjepa2_config(config: MotionConfig) -> VJEPA2Config:
    """A V-JEPA 2 of a few hundred thousand parameters."""
    from transformers import VJEPA2Config

    return VJEPA2Config(
        patch_size=config.patch_size,
        crop_size=int(config.area**0.5),
        frames_per_clip=16,
        tubelet_size=2,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_hidden_layers=config.num_layers,
        mlp_ratio=3.0,
        pred_hidden_size=config.hidden_size // 2,
        pred_num_attention_heads=config.num_heads // 2,
        pred_num_hidden_layers=1,
        pred_mlp_ratio=2.0,
        pred_zero_init_mask_tokens=False,
    )


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
    """V-JEPA 2 encoder, a probe over time and the prompt's words: motion_quality."""

    kind: ClassVar[str] = "vjepa2_motion"
    readouts: ClassVar[tuple[str, ...]] = (
        "head.",
        "read.",
        "aim.",
        "words.weight",
        "spread.",
        "log_tie_width",
    )
    config_class: ClassVar[type[Config]] = MotionConfig
    settings: MotionConfig

    def __init__(
        self,
        config: MotionConfig,
        tokenizer: PreTrainedTokenizerFast,
        *,
        backbone_config: VJEPA2Config | None = None,
    ) -> None:
        from transformers import VJEPA2Model

        super().__init__(config, tokenizer)
        if backbone_config is None and config.backbone is not None:
            self.backbone = VJEPA2Model.from_pretrained(config.backbone)
        else:
            self.backbone = VJEPA2Model(backbone_config or tiny_vjepa2_config(config))
        size = self.backbone.config
        hidden = size.hidden_size
        self.probe = TemporalProbe(hidden, config.num_queries, config.num_heads)
        self.words = WordHead(self.probe.features, len(tokenizer), num_matches=4)
        self.head = nn.Sequential(
            nn.LayerNorm(self.probe.features),
            nn.Linear(self.probe.features, hidden),
            nn.GELU(),
        )
        self.aim = PromptAim(self.probe.features, len(tokenizer), hidden)
        self.read = nn.Linear(hidden + 5, len(self.dimensions))
        nn.init.normal_(self.read.weight[:, :hidden], std=0.02)
        nn.init.constant_(self.read.weight[:, hidden:], 0.25)  # begins as agreement with the prompt
        if config.uncertainty:
            self.spread = self.spread_head(self.probe.features)

    def features(self, frames: Tensor, fps: Tensor) -> Tensor:
        """The probe's features [B, 4 * Q * H] of frames [B, 3, F, H, W] in [0, 1] shown at `fps` [B]."""
        pixels = self.pixels(frames)
        tokens = self.backbone(pixels, skip_predictor=True).last_hidden_state
        config = self.backbone.config
        rows, columns = (side // config.patch_size for side in pixels.shape[-2:])
        grid = (pixels.shape[1] // config.tubelet_size, rows, columns)
        return self.probe(tokens, grid, config.tubelet_size / fps)

    def pixels(self, frames: Tensor) -> Tensor:
        """What V-JEPA 2 takes: resized, normalised, whole tubelets, time first [B, F, 3, h, w]."""
        config = self.backbone.config
        size = fit_area(*frames.shape[-2:], area=self.settings.area, multiple=config.patch_size)
        frames = normalise(resize(frames, size, "bilinear"), IMAGENET_MEAN, IMAGENET_STD)
        return pad_frames(frames, config.tubelet_size).transpose(1, 2)

    def values_and_words(
        self, frames: Tensor, fps: Tensor, prompts: list[list[int]]
    ) -> tuple[Tensor, Tensor]:
        """Raw logits [B, D] and log-probabilities of words [B, V]."""
        features = self.features(frames, fps)
        words = self.words(features)
        bag = self.words.bag(prompts) * self.words.idf
        agreement = [self.words.match(words, prompts), -self.aim(features, bag)]
        values = self.read(torch.cat([self.head(features), *agreement], dim=1))
        if self.settings.uncertainty:
            values = torch.cat([values, self.spread(features)], dim=1)
        return values, words

    def values(
        self, frames: Tensor, fps: Tensor, prompts: list[list[int]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.values_and_words(frames, fps, prompts)[0], {}

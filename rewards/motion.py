"""The motion reward: a V-JEPA 2 video encoder, read by attention that knows what the prompt asked to move.

The question put to people is "which moves more naturally and as the prompt asks", so the pooling queries are shifted by
the prompt's embedding. Odd clips are padded to whole tubelets, otherwise V-JEPA 2 drops the last frame silently.
Source: V-JEPA 2, 2506.09985, attentive probe of sec. 4; conditioning the probe's queries on text is ours.
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
from rewards.tokens import pad_right

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, VJEPA2Config


class MotionConfig(Config):
    """Size of the tiny video encoder, or the folder of a real one."""

    dimensions: tuple[Literal["motion_quality"], ...] = ("motion_quality",)
    """What it scores."""
    backbone: str | None = None
    """A local folder or hub id of a V-JEPA 2; None builds the tiny one below, to be pre-trained on captioned clips."""
    hidden_size: PositiveInt = 96
    """Width of the video encoder and the text tower."""
    num_layers: PositiveInt = 3
    """Layers of the video encoder."""
    text_layers: PositiveInt = 1
    """Layers of the text tower."""
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


class TextTower(nn.Module):
    """A tiny SigLIP text encoder: token ids -> one embedding [B, H]."""

    def __init__(
        self, *, vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, max_tokens: int
    ) -> None:
        from transformers import SiglipTextConfig, SiglipTextModel

        super().__init__()
        self.encoder = SiglipTextModel(
            SiglipTextConfig(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                intermediate_size=2 * hidden_size,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                max_position_embeddings=max_tokens,
                pad_token_id=0,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        nn.init.normal_(self.encoder.embeddings.position_embedding.weight, std=0.02)
        nn.init.normal_(self.encoder.embeddings.token_embedding.weight, std=0.5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return (states * mask[..., None]).sum(1) / mask.sum(
            1, keepdim=True
        )  # mean over the real tokens


class AttentivePool(nn.Module):
    """Queries, shifted by a condition, attend over tokens: ([B, N, H], [B, H] | None) -> [B, Q * H]."""

    def __init__(self, hidden_size: int, num_queries: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.queries = nn.Parameter(torch.randn(num_queries, hidden_size) * 0.5)
        self.shift = nn.Linear(hidden_size, num_queries * hidden_size)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size)

    def forward(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        batch = len(tokens)
        queries = self.queries.expand(batch, -1, -1)
        if condition is not None:
            queries = queries + self.shift(condition).view_as(queries)

        def split(x: Tensor) -> Tensor:  # [B, N, H] -> [B, heads, N, H / heads]
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        key, value = self.key_value(tokens).chunk(2, dim=-1)
        pooled = F.scaled_dot_product_attention(split(queries), split(key), split(value))
        return pooled.transpose(1, 2).reshape(batch, -1)


class MotionReward(RewardModule):
    """V-JEPA 2 encoder with a prompt-aware attentive probe: motion_quality."""

    type: ClassVar[str] = "vjepa2_motion"
    config_class: ClassVar[type[Config]] = MotionConfig
    config: MotionConfig

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
        self.text = TextTower(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_layers=config.text_layers,
            num_heads=config.num_heads,
            max_tokens=config.max_text_tokens,
        )
        self.pool = AttentivePool(hidden, config.num_queries, config.num_heads)
        self.head = nn.Sequential(
            nn.Linear((config.num_queries + 1) * hidden, 2 * hidden),
            nn.GELU(),
            nn.Linear(2 * hidden, len(self.dimensions)),
        )

    def tokens(self, frames: Tensor) -> Tensor:
        """Encoder states [B, N, H] of frames [B, 3, F, H, W] in [0, 1]."""
        return self.backbone(self.pixels(frames), skip_predictor=True).last_hidden_state

    def pixels(self, frames: Tensor) -> Tensor:
        """What V-JEPA 2 takes: resized, normalised, whole tubelets, time first [B, F, 3, h, w]."""
        config = self.backbone.config
        size = fit_area(*frames.shape[-2:], area=self.config.area, multiple=config.patch_size)
        frames = normalise(resize(frames, size, "bilinear"), IMAGENET_MEAN, IMAGENET_STD)
        return pad_frames(frames, config.tubelet_size).transpose(1, 2)

    def prompt_embeds(self, prompts: list[list[int]], device: torch.device) -> Tensor:
        return self.text(*pad_right(prompts, self.tokenizer.pad_token_id, device=device))

    def values(
        self, frames: Tensor, fps: Tensor, prompts: list[list[int]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        text = self.prompt_embeds(prompts, frames.device)
        pooled = self.pool(self.tokens(frames), text)
        return self.head(torch.cat([pooled, text], dim=1)), {}

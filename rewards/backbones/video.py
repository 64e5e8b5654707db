"""Video encoders: V-JEPA 2 and VideoMAE."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from rewards.preprocess import HALF_MEAN, HALF_STD, IMAGENET_MEAN, IMAGENET_STD
from rewards.recipes import PixelRecipe


class VJepa2:
    """V-JEPA 2: rotary positions, so any number of tubelets and patches."""

    model_type: ClassVar[str] = "vjepa2"
    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def model_class(self) -> Any:
        from transformers import VJEPA2Model

        return VJEPA2Model

    def tiny_config(self, settings: Any) -> Any:
        """An encoder and predictor of a few hundred thousand parameters."""
        from transformers import VJEPA2Config

        return VJEPA2Config(
            patch_size=settings.patch_size,
            crop_size=int(settings.area**0.5),
            frames_per_clip=16,
            tubelet_size=2,
            hidden_size=settings.hidden_size,
            num_attention_heads=settings.num_heads,
            num_hidden_layers=settings.num_layers,
            mlp_ratio=3.0,
            pred_hidden_size=settings.hidden_size // 2,
            pred_num_attention_heads=settings.num_heads // 2,
            pred_num_hidden_layers=1,
            pred_mlp_ratio=2.0,
            pred_zero_init_mask_tokens=False,
        )

    def recipe(self, config: Any) -> PixelRecipe:
        """Shorter side 256/224 of the crop, then the middle."""
        side = config.crop_size
        return PixelRecipe(
            sizing="crop",
            kernel="bilinear",
            mean=self.mean,
            std=self.std,
            side=int(side * 256 / 224),
            crop=side,
        )

    def tokens(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """States [B, T * h * w, H] of pixels [B, F, 3, H, W]."""
        return model(pixels, skip_predictor=True).last_hidden_state


class VideoMae:
    """VideoMAE: a table of positions of one size, stretched here to the clip's."""

    model_type: ClassVar[str] = "videomae"
    mean, std = HALF_MEAN, HALF_STD

    def model_class(self) -> Any:
        from transformers import VideoMAEModel

        return VideoMAEModel

    def recipe(self, config: Any) -> PixelRecipe:
        """Shorter side, then the middle, of the size it was trained on."""
        side = config.image_size
        return PixelRecipe(
            sizing="crop", kernel="bilinear", mean=self.mean, std=self.std, side=side, crop=side
        )

    def tokens(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """States [B, T * h * w, H] of pixels [B, F, 3, H, W]; transformers' forward refuses any size but its own."""
        config, embeddings = model.config, model.embeddings
        patches = embeddings.patch_embeddings.projection(pixels.transpose(1, 2))  # [B, H, T, h, w]
        grid = patches.shape[2:]
        side = config.image_size // config.patch_size
        own = (config.num_frames // config.tubelet_size, side, side)
        table = embeddings.position_embeddings.to(patches)  # [1, N, H]
        if tuple(grid) != own:
            table = table.transpose(1, 2).unflatten(2, own)
            table = F.interpolate(table, size=tuple(grid), mode="trilinear", align_corners=False)
            table = table.flatten(2).transpose(1, 2)
        states = patches.flatten(2).transpose(1, 2) + table
        states = model.encoder(states).last_hidden_state
        return states if model.layernorm is None else model.layernorm(states)

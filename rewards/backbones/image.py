"""Image encoders: SigLIP, SigLIP 2 (naflex) and CLIP. Each gives a pooled state and the states of its patches."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rewards.preprocess import CLIP_MEAN, CLIP_STD, HALF_MEAN, HALF_STD, patchify_naflex
from rewards.recipes import PixelRecipe


class Siglip:
    """SigLIP, and SigLIP 2 of one resolution: squares; positions are interpolated for another size."""

    mean, std = HALF_MEAN, HALF_STD
    model_type: ClassVar[str] = "siglip_vision_model"

    def model_class(self) -> Any:
        from transformers import SiglipVisionModel

        return SiglipVisionModel

    def tiny_config(self, settings: Any) -> Any:
        """A vision tower of a few hundred thousand parameters."""
        from transformers import SiglipVisionConfig

        return SiglipVisionConfig(
            hidden_size=settings.hidden_size,
            intermediate_size=3 * settings.hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            image_size=int(settings.area**0.5),
            patch_size=settings.patch_size,
        )

    def recipe(self, config: Any) -> PixelRecipe:
        """A square of the size it was trained on."""
        side = config.image_size
        return PixelRecipe(
            sizing="square", kernel="bicubic", mean=self.mean, std=self.std, side=side, clamp=True
        )

    def states(self, model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled [N, H] and patch states [N, L, H] of normalised images [N, 3, H, W]."""
        out = model(pixels, interpolate_pos_encoding=True)
        return out.pooler_output, out.last_hidden_state


class Siglip2:
    """SigLIP 2 naflex: any aspect ratio, as a sequence of at most so many patches."""

    mean, std = HALF_MEAN, HALF_STD
    model_type: ClassVar[str] = "siglip2_vision_model"

    def model_class(self) -> Any:
        from transformers import Siglip2VisionModel

        return Siglip2VisionModel

    def recipe(self, config: Any) -> PixelRecipe:
        """As many patches as it has positions, bilinear (alone among the SigLIPs)."""
        return PixelRecipe(
            sizing="patches",
            kernel="bilinear",
            mean=self.mean,
            std=self.std,
            multiple=config.patch_size,
            max_patches=config.num_patches,
        )

    def states(self, model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `Siglip.states`. Images of a batch have one size, so no patch is padding."""
        patch = model.config.patch_size
        patches = patchify_naflex(pixels, patch=patch)
        shape = torch.tensor([[side // patch for side in pixels.shape[-2:]]] * len(pixels))
        everywhere = torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device)
        out = model(patches, pixel_attention_mask=everywhere, spatial_shapes=shape)
        return out.pooler_output, out.last_hidden_state


class Clip:
    """CLIP: shorter side, then the middle; positions are interpolated for another size."""

    mean, std = CLIP_MEAN, CLIP_STD
    model_type: ClassVar[str] = "clip_vision_model"

    def model_class(self) -> Any:
        from transformers import CLIPVisionModel

        return CLIPVisionModel

    def recipe(self, config: Any) -> PixelRecipe:
        """The middle of the size it was trained on."""
        side = config.image_size
        return PixelRecipe(
            sizing="crop",
            kernel="bicubic",
            mean=self.mean,
            std=self.std,
            side=side,
            crop=side,
            clamp=True,
        )

    def states(self, model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `Siglip.states`; the pooled state is the class token's."""
        out = model(pixels, interpolate_pos_encoding=True)
        return out.pooler_output, out.last_hidden_state[:, 1:]

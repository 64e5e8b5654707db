"""Vision-language models: Qwen2.5-VL and Qwen3-VL. What all of them have in common is in `VisionLanguage`; InternVL has a file of its own."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rewards.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    HALF_MEAN,
    HALF_STD,
    pad_frames,
    patchify_qwen,
    timestamps,
)
from rewards.recipes import PixelRecipe
from rewards.tokens import IMAGE_PAD, PAD, VIDEO_PAD, VISION_END, VISION_START

INITIALIZER_RANGE = 0.08
"""Of weights: about 1 / sqrt(hidden size); the usual 0.02 suits models ten times wider and learns far slower here."""
Grid = tuple[int, int, int]
"""Times, rows and columns of patches of one clip."""


class VisionLanguage(ABC):
    """A family of vision-language models: how clips enter it, and what it is told beside them."""

    model_type: ClassVar[str]
    recipe: ClassVar[PixelRecipe]
    causal_class: ClassVar[str]
    """Name in transformers of the model with a vocabulary's logits."""

    @abstractmethod
    def model_class(self) -> Any:
        """The model without them."""

    @abstractmethod
    def tiny_config(self, settings: Any, tokenizer: Any) -> Any:
        """A model of a few hundred thousand parameters for this tokenizer."""

    def recipe_of(self, config: Any) -> PixelRecipe:
        """What its own processor does, with the sizes of this model."""
        return self.recipe

    @abstractmethod
    def sizes(self, config: Any) -> tuple[int, int, int]:
        """Side of a patch in pixels, patches merged along each side, frames merged."""

    @abstractmethod
    def patches(self, config: Any, frames: Tensor) -> tuple[Tensor, Grid]:
        """What the vision tower takes for normalised frames [B, 3, F, H, W], and the grid of one clip."""

    @abstractmethod
    def look(self, model: nn.Module, patches: Sequence[Tensor], grids: Sequence[Grid]) -> Any:
        """The vision tower on batches of `patches`, one size each; its `pooler_output` holds the tokens [L, H] of each clip.

        Args:
            grids: of each clip, through all batches.
        """

    @abstractmethod
    def read(
        self, model: nn.Module, ids: Tensor, mask: Tensor, seen: Any, grids: Sequence[Grid], fps: Tensor, tokenizer: Any
    ) -> Tensor:  # fmt: skip
        """Hidden states [N, L, H] of rows of tokens [N, L] in which the clips of `seen` stand in order, with their grids and frame rates."""

    @abstractmethod
    def video_tokens(
        self,
        grid: Grid,
        *,
        merge: int,
        temporal: int,
        num_frames: int,
        fps: float,
        tokenizer: Any,
    ) -> list[int]:
        """The token ids that stand for one clip."""

    def in_order(self, seen: Any, order: Sequence[int]) -> Any:
        """What `look` gave with the clips in another order, some of them more than once."""
        out = copy.copy(seen)
        out.pooler_output = tuple(seen.pooler_output[i] for i in order)
        if getattr(seen, "deepstack_features", None) is not None:
            out.deepstack_features = [
                tuple(layer[i] for i in order) for layer in seen.deepstack_features
            ]
        return out

    def output_embeddings(self, source: str, vocab_size: int) -> Tensor:
        """Weights of the vocabulary's logits [V, H] of a folder or hub id whose embeddings are not tied to them."""
        import transformers

        kind = getattr(transformers, self.causal_class)
        model = kind.from_pretrained(source, dtype=torch.float32)
        model.resize_token_embeddings(vocab_size)
        return model.get_output_embeddings().weight.detach()


class QwenVL(VisionLanguage):
    """What Qwen2.5-VL and Qwen3-VL share."""

    def sizes(self, config: Any) -> tuple[int, int, int]:
        vision = config.vision_config
        return vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size

    def patches(self, config: Any, frames: Tensor) -> tuple[Tensor, Grid]:
        patch, merge, temporal = self.sizes(config)
        frames = pad_frames(frames, temporal)
        return patchify_qwen(frames, patch=patch, merge=merge, temporal=temporal)

    def look(self, model: Any, patches: Sequence[Tensor], grids: Sequence[Grid]) -> Any:
        everything = torch.cat(list(patches))
        sizes = torch.tensor(grids, device=everything.device)
        return model.get_video_features(everything, sizes, return_dict=True)

    def read(
        self, model: nn.Module, ids: Tensor, mask: Tensor, seen: Any, grids: Sequence[Grid], fps: Tensor, tokenizer: Any
    ) -> Tensor:  # fmt: skip
        return model(
            input_ids=ids,
            attention_mask=mask.long(),
            mm_encoder_outputs={"video": seen},
            video_grid_thw=torch.tensor(grids, device=ids.device),
            mm_token_type_ids=video_token_types(ids, tokenizer),
            **self.timing(fps, self.sizes(model.config)[2]),
        ).last_hidden_state

    @abstractmethod
    def timing(self, fps: Tensor, temporal: int) -> dict[str, Any]:
        """What the model is told of time beside the tokens."""


class Qwen25(QwenVL):
    """Qwen2.5-VL: the frame rate enters through the temporal positions (`second_per_grid_ts`)."""

    model_type: ClassVar[str] = "qwen2_5_vl"
    causal_class: ClassVar[str] = "Qwen2_5_VLForConditionalGeneration"
    recipe: ClassVar[PixelRecipe] = PixelRecipe(
        sizing="pixels",
        kernel="bicubic",
        mean=CLIP_MEAN,
        std=CLIP_STD,
        multiple=28,
        min_pixels=128 * 28 * 28,
        max_pixels=768 * 28 * 28,
        clamp=True,
    )

    def model_class(self) -> Any:
        from transformers import Qwen2_5_VLModel

        return Qwen2_5_VLModel

    def tiny_config(self, settings: Any, tokenizer: Any) -> Any:
        from transformers import Qwen2_5_VLConfig

        text, vision, tokens = _tiny_parts(settings, tokenizer)
        vision |= {
            "window_size": 1024,
            "fullatt_block_indexes": list(range(settings.vision_layers)),
        }
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)

    def video_tokens(
        self,
        grid: Grid,
        *,
        merge: int,
        temporal: int,
        num_frames: int,
        fps: float,
        tokenizer: Any,
    ) -> list[int]:
        """Start, a place per merged patch, end."""
        start, pad, end = _vision_ids(tokenizer)
        return [start, *[pad] * (grid[0] * grid[1] * grid[2] // merge**2), end]

    def timing(self, fps: Tensor, temporal: int) -> dict[str, Any]:
        """Seconds from one temporal position to the next, per clip: without them the model takes one second."""
        return {"second_per_grid_ts": temporal / fps}


class Qwen3(QwenVL):
    """Qwen3-VL: each chunk of frames stands behind its time as text, between a vision start and end of its own."""

    model_type: ClassVar[str] = "qwen3_vl"
    causal_class: ClassVar[str] = "Qwen3VLForConditionalGeneration"
    recipe: ClassVar[PixelRecipe] = PixelRecipe(
        sizing="clip_pixels",
        kernel="bicubic",
        mean=HALF_MEAN,
        std=HALF_STD,
        multiple=32,
        min_pixels=128 * 32 * 32,
        max_pixels=768 * 32 * 32,
        clamp=True,
    )

    def model_class(self) -> Any:
        from transformers import Qwen3VLModel

        return Qwen3VLModel

    def tiny_config(self, settings: Any, tokenizer: Any) -> Any:
        from transformers import Qwen3VLConfig

        text, vision, tokens = _tiny_parts(settings, tokenizer)
        text |= {"head_dim": settings.hidden_size // settings.num_heads}
        text["rope_parameters"]["mrope_interleaved"] = True
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        return Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)

    def video_tokens(
        self,
        grid: Grid,
        *,
        merge: int,
        temporal: int,
        num_frames: int,
        fps: float,
        tokenizer: Any,
    ) -> list[int]:
        """Per chunk its time in words, start, a place per merged patch, end."""
        start, pad, end = _vision_ids(tokenizer)
        ids: list[int] = []
        for seconds in timestamps(num_frames, fps, temporal=temporal):
            ids += tokenizer(f"<{seconds:.1f} seconds>", add_special_tokens=False)["input_ids"]
            ids += [start, *[pad] * (grid[1] * grid[2] // merge**2), end]
        return ids

    def timing(self, fps: Tensor, temporal: int) -> dict[str, Any]:
        """Nothing beside the times in words."""
        return {}


def video_token_types(ids: Tensor, tokenizer: Any) -> Tensor:
    """2 at a clip's patches and 0 at text, as m-rope needs it: without, Qwen2.5-VL silently takes 1-D positions."""
    return 2 * (ids == tokenizer.convert_tokens_to_ids(VIDEO_PAD)).long()


def _vision_ids(tokenizer: Any) -> tuple[int, int, int]:
    return tuple(map(tokenizer.convert_tokens_to_ids, (VISION_START, VIDEO_PAD, VISION_END)))


def tiny_text(settings: Any, tokenizer: Any) -> dict[str, Any]:
    """What the tiny language models of all families have in common."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": settings.hidden_size,
        "intermediate_size": 3 * settings.hidden_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_heads,
        "initializer_range": INITIALIZER_RANGE,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": tokenizer.convert_tokens_to_ids(PAD),
    }


def _tiny_parts(
    settings: Any, tokenizer: Any
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What the tiny text and vision configs and the token ids of both Qwens have in common."""
    token = tokenizer.convert_tokens_to_ids
    head = settings.hidden_size // settings.num_heads
    text = tiny_text(settings, tokenizer) | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [head // 2 - 2 * (head // 6), head // 6, head // 6],
        },
    }
    vision = {
        "depth": settings.vision_layers,
        "hidden_size": settings.hidden_size,
        "intermediate_size": 3 * settings.hidden_size,
        "num_heads": settings.num_heads,
        "patch_size": settings.patch_size,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": settings.hidden_size,
        "initializer_range": INITIALIZER_RANGE,
    }
    tokens = {
        "image_token_id": token(IMAGE_PAD),
        "video_token_id": token(VIDEO_PAD),
        "vision_start_token_id": token(VISION_START),
        "vision_end_token_id": token(VISION_END),
        "tie_word_embeddings": True,
    }
    return text, vision, tokens

"""Vision-language models: Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from rewards.preprocess import CLIP_MEAN, CLIP_STD, HALF_MEAN, HALF_STD, timestamps
from rewards.recipes import PixelRecipe
from rewards.tokens import IMAGE_PAD, PAD, VIDEO_PAD, VISION_END, VISION_START

INITIALIZER_RANGE = 0.08
"""Of weights: about 1 / sqrt(hidden size); the usual 0.02 suits models ten times wider and learns far slower here."""


class Qwen25:
    """Qwen2.5-VL: the frame rate enters through the temporal positions (`second_per_grid_ts`)."""

    model_type: ClassVar[str] = "qwen2_5_vl"
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

    def output_embeddings(self, source: str, vocab_size: int) -> Tensor:
        """Weights of the vocabulary's logits [V, H] of a folder or hub id whose embeddings are not tied to them."""
        from transformers import Qwen2_5_VLForConditionalGeneration

        return _output_embeddings(Qwen2_5_VLForConditionalGeneration, source, vocab_size)

    def tiny_config(self, settings: Any, tokenizer: Any) -> Any:
        """A model of a few hundred thousand parameters for this tokenizer."""
        from transformers import Qwen2_5_VLConfig

        text, vision, tokens = _tiny_parts(settings, tokenizer)
        vision |= {
            "window_size": 1024,
            "fullatt_block_indexes": list(range(settings.vision_layers)),
        }
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)

    def video_tokens(
        self,
        grid: tuple[int, int, int],
        *,
        merge: int,
        temporal: int,
        num_frames: int,
        fps: float,
        tokenizer: Any,
    ) -> list[int]:
        """The token ids of one clip: start, a place per merged patch, end."""
        start, pad, end = _vision_ids(tokenizer)
        return [start, *[pad] * (grid[0] * grid[1] * grid[2] // merge**2), end]

    def timing(self, fps: Tensor, temporal: int) -> dict[str, Any]:
        """Seconds from one temporal position to the next, per clip: without them the model takes one second."""
        return {"second_per_grid_ts": temporal / fps}


class Qwen3:
    """Qwen3-VL: each chunk of frames stands behind its time as text, between a vision start and end of its own."""

    model_type: ClassVar[str] = "qwen3_vl"
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

    def output_embeddings(self, source: str, vocab_size: int) -> Tensor:
        """Weights of the vocabulary's logits [V, H] of a folder or hub id whose embeddings are not tied to them."""
        from transformers import Qwen3VLForConditionalGeneration

        return _output_embeddings(Qwen3VLForConditionalGeneration, source, vocab_size)

    def tiny_config(self, settings: Any, tokenizer: Any) -> Any:
        """A model of a few hundred thousand parameters for this tokenizer."""
        from transformers import Qwen3VLConfig

        text, vision, tokens = _tiny_parts(settings, tokenizer)
        text |= {"head_dim": settings.hidden_size // settings.num_heads}
        text["rope_parameters"]["mrope_interleaved"] = True
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        return Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)

    def video_tokens(
        self,
        grid: tuple[int, int, int],
        *,
        merge: int,
        temporal: int,
        num_frames: int,
        fps: float,
        tokenizer: Any,
    ) -> list[int]:
        """The token ids of one clip: per chunk its time in words, start, a place per merged patch, end."""
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


def _output_embeddings(model_class: Any, source: str, vocab_size: int) -> Tensor:
    model = model_class.from_pretrained(source, dtype=torch.float32)
    model.resize_token_embeddings(vocab_size)
    return model.get_output_embeddings().weight.detach()


def _vision_ids(tokenizer: Any) -> tuple[int, int, int]:
    return tuple(map(tokenizer.convert_tokens_to_ids, (VISION_START, VIDEO_PAD, VISION_END)))


def _tiny_parts(
    settings: Any, tokenizer: Any
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What the tiny text and vision configs and the token ids of both families have in common."""
    token = tokenizer.convert_tokens_to_ids
    head = settings.hidden_size // settings.num_heads
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": settings.hidden_size,
        "intermediate_size": 3 * settings.hidden_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_heads,
        "initializer_range": INITIALIZER_RANGE,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [head // 2 - 2 * (head // 6), head // 6, head // 6],
        },
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": token(PAD),
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

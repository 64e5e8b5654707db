"""InternVL (3 and later, transformers' own): frames one by one as pictures, `Frame1: <img>…</img>`, and no word of time.

The frame rate reaches it through the choice of frames alone (`sample_fps`). Its own processor squeezes a frame into a square; with
`preprocessing: area` the aspect ratio stays and the vision tower's positions are interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reelhf.errors import UserError
from rewards.backbones.language import INITIALIZER_RANGE, Grid, VisionLanguage, tiny_text
from rewards.preprocess import CLIP_MEAN, CLIP_STD
from rewards.recipes import PixelRecipe
from rewards.tokens import IMAGE_PAD, INTERNVL_MARKS, VISION_END, VISION_START


class InternVL(VisionLanguage):
    """InternVL with a Qwen2 (or any) language model, as `InternVLForConditionalGeneration` has it."""

    model_type: ClassVar[str] = "internvl"
    causal_class: ClassVar[str] = "InternVLForConditionalGeneration"
    recipe: ClassVar[PixelRecipe] = PixelRecipe(
        sizing="square", kernel="bicubic", mean=CLIP_MEAN, std=CLIP_STD, side=448, clamp=True
    )

    def model_class(self) -> Any:
        from transformers import InternVLModel

        return InternVLModel

    def tiny_config(self, settings: Any, tokenizer: Any) -> Any:
        from transformers import InternVLConfig

        text = tiny_text(settings, tokenizer) | {"model_type": "qwen2"}
        vision = {
            "hidden_size": settings.hidden_size,
            "intermediate_size": 3 * settings.hidden_size,
            "num_hidden_layers": settings.vision_layers,
            "num_attention_heads": settings.num_heads,
            "image_size": int(settings.area**0.5),
            "patch_size": settings.patch_size,
            "initializer_range": INITIALIZER_RANGE,
        }
        return InternVLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=tokenizer.convert_tokens_to_ids(marks(tokenizer)[1]),
            tie_word_embeddings=True,
        )

    def recipe_of(self, config: Any) -> PixelRecipe:
        return self.recipe.model_copy(update={"side": config.vision_config.image_size[0]})

    def sizes(self, config: Any) -> tuple[int, int, int]:
        return config.vision_config.patch_size[0], round(1 / config.downsample_ratio), 1

    def patches(self, config: Any, frames: Tensor) -> tuple[Tensor, Grid]:
        """The frames themselves: its convolution makes the patches."""
        patch, merge, _ = self.sizes(config)
        num_frames, height, width = frames.shape[2:]
        if height % (patch * merge) or width % (patch * merge):
            raise UserError(
                f"frames are {height} x {width} after preprocessing; this InternVL takes multiples of {patch * merge}. Set another `side`, or preprocessing: area"
            )
        return frames, (num_frames, height // patch, width // patch)

    def look(self, model: Any, patches: Sequence[Tensor], grids: Sequence[Grid]) -> Any:
        """As `get_image_features`, which knows squares alone; pictures of one size go through the tower together."""
        clips = [clip.transpose(0, 1) for batch in patches for clip in batch]  # each [F, 3, H, W]
        same: dict[tuple[int, int], list[int]] = {}
        for place, (_, rows, columns) in enumerate(grids):
            same.setdefault((rows, columns), []).append(place)
        tokens: dict[int, Tensor] = {}
        for (rows, columns), places in same.items():
            states = self._states(model, torch.cat([clips[i] for i in places]))
            if model.config.vision_feature_select_strategy == "default":
                states = states[:, 1:]  # without the class token
            states = states.unflatten(1, (rows, columns))
            states = model.pixel_shuffle(states, scale_factor=model.config.downsample_ratio)
            projected = model.multi_modal_projector(states.flatten(1, 2))  # [sum F, L, H]
            own = projected.split([len(clips[i]) for i in places])
            tokens |= {i: part.flatten(0, 1) for i, part in zip(places, own, strict=True)}
        return SimpleNamespace(pooler_output=tuple(tokens[i] for i in range(len(clips))))

    def _states(self, model: Any, pictures: Tensor) -> Tensor:
        layer = model.config.vision_feature_layer
        if layer == -1:
            return model.vision_tower(pixel_values=pictures).last_hidden_state
        return model.vision_tower(pixel_values=pictures, output_hidden_states=True).hidden_states[
            layer
        ]

    def read(
        self, model: nn.Module, ids: Tensor, mask: Tensor, seen: Any, grids: Sequence[Grid], fps: Tensor, tokenizer: Any
    ) -> Tensor:  # fmt: skip
        everything = SimpleNamespace(pooler_output=torch.cat(list(seen.pooler_output))[None])
        return model(
            input_ids=ids, attention_mask=mask.long(), mm_encoder_outputs={"image": everything}
        ).last_hidden_state

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
        """Per frame its number in words, start, a place per merged patch, end; a new line between frames."""
        start, pad, end = map(tokenizer.convert_tokens_to_ids, marks(tokenizer))
        ids: list[int] = []
        for number in range(1, grid[0] + 1):
            words = f"Frame{number}: " if number == 1 else f"\nFrame{number}: "
            ids += tokenizer(words, add_special_tokens=False)["input_ids"]
            ids += [start, *[pad] * (grid[1] * grid[2] // merge**2), end]
        return ids


def marks(tokenizer: Any) -> tuple[str, str, str]:
    """Start, place and end of a picture: InternVL's own where the tokenizer has them, else those of our tokenizers."""
    known = tokenizer.get_vocab()
    own = all(mark in known for mark in INTERNVL_MARKS)
    return INTERNVL_MARKS if own else (VISION_START, IMAGE_PAD, VISION_END)

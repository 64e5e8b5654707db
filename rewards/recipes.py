"""What a backbone wants its pixels to look like: the numbers of its processor, which travel with a reward's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt, model_validator
from torch import Tensor

from reelhf.config import Config
from rewards.preprocess import clamp_straight_through, normalise, resize
from rewards.sizes import fit_area, fit_patches, fit_pixels, fit_short_side

PROCESSOR_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
"""Where a folder of weights says how its pixels were prepared; the first that is there."""
KERNELS = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers of the resampling kernels."""

NEEDED = {
    "area": ("area",),
    "pixels": ("min_pixels", "max_pixels"),
    "clip_pixels": ("min_pixels", "max_pixels"),
    "crop": ("side", "crop"),
    "square": ("side",),
    "patches": ("max_patches",),
}
"""The numbers that each kind of sizing cannot do without."""


class PixelRecipe(Config):
    """From frames in [0, 1] of any size to what a vision tower takes."""

    sizing: Literal["area", "pixels", "clip_pixels", "crop", "square", "patches"]
    """area: about so many pixels, whatever the model was trained on. pixels: Qwen2.5-VL's bounds per frame. clip_pixels: Qwen3-VL's bounds for all
    frames together. crop: shorter side, then the middle. square: one size, the aspect ratio lost. patches: at most so many, the aspect ratio kept."""
    kernel: Literal["bicubic", "bilinear"]
    """Of the antialiased resize."""
    mean: tuple[float, float, float]
    """Subtracted from each channel."""
    std: tuple[float, float, float]
    """Each channel is divided by it."""
    multiple: PositiveInt = 1
    """Both sides are multiples of it."""
    area: PositiveInt | None = None
    """Pixels per frame (sizing area)."""
    min_pixels: PositiveInt | None = None
    """Fewest pixels (sizing pixels and clip_pixels)."""
    max_pixels: PositiveInt | None = None
    """Most pixels (sizing pixels and clip_pixels)."""
    side: PositiveInt | None = None
    """Shorter side before the crop, or the side of the square."""
    crop: PositiveInt | None = None
    """Side of the middle that is kept (sizing crop)."""
    max_patches: PositiveInt | None = None
    """Most patches (sizing patches)."""
    clamp: bool = False
    """Clamp what a bicubic resize overshoots, as a processor does that is given 8-bit pictures; the gradient passes."""

    @model_validator(mode="after")
    def _has_its_numbers(self) -> PixelRecipe:
        missing = [name for name in NEEDED[self.sizing] if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"sizing {self.sizing} without {', '.join(missing)}; expected a number"
            )
        return self

    def size(self, height: int, width: int, num_frames: int) -> tuple[int, int]:
        """What a frame of a clip is resized to."""
        match self.sizing:
            case "area":
                return fit_area(height, width, area=self.area, multiple=self.multiple)
            case "pixels" | "clip_pixels":
                return fit_pixels(
                    height,
                    width,
                    multiple=self.multiple,
                    min_pixels=self.min_pixels,
                    max_pixels=self.max_pixels,
                    copies=max(2, num_frames) if self.sizing == "clip_pixels" else 1,
                )
            case "crop":
                return fit_short_side(height, width, side=self.side)
            case "square":
                assert self.side is not None
                return self.side, self.side
            case _:
                return fit_patches(height, width, patch=self.multiple, max_patches=self.max_patches)

    def __call__(self, frames: Tensor) -> Tensor:
        """Frames [B, 3, F, H, W] in [0, 1], resized, cropped and normalised; differentiable."""
        num_frames, height, width = frames.shape[2:]
        frames = resize(frames, self.size(height, width, num_frames), self.kernel)
        if self.sizing == "crop":
            top, left = (int((side - self.crop) / 2.0) for side in frames.shape[-2:])
            frames = frames[..., top : top + self.crop, left : left + self.crop]
        if self.clamp:
            frames = clamp_straight_through(frames)
        return normalise(frames, self.mean, self.std)

    def from_folder(self, folder: str) -> PixelRecipe:
        """This recipe with what the processor's file in a local folder or hub id says otherwise; itself where there is none."""
        from transformers.utils import cached_file

        for name in PROCESSOR_FILES:
            found = cached_file(
                folder,
                name,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            if found is not None:
                return self.updated(json.loads(Path(found).read_text()))
        return self

    def updated(self, processor: dict[str, Any]) -> PixelRecipe:
        """This recipe with the entries of a processor's JSON."""
        new: dict[str, Any] = {}
        size = processor.get("size") or {}
        for key, ours in (("image_mean", "mean"), ("image_std", "std")):
            if key in processor:
                new[ours] = tuple(processor[key])
        if processor.get("resample") in KERNELS:
            new["kernel"] = KERNELS[processor["resample"]]
        if self.sizing in ("pixels", "clip_pixels"):
            for key, old, ours in (
                ("shortest_edge", "min_pixels", "min_pixels"),
                ("longest_edge", "max_pixels", "max_pixels"),
            ):
                value = processor.get(old) or size.get(key)
                new |= {ours: value} if value else {}
        elif self.sizing == "crop":
            crop = processor.get("crop_size") or {}
            crop = crop.get("height") if isinstance(crop, dict) else crop
            new |= {"crop": crop} if crop else {}
            new |= {"side": size["shortest_edge"]} if "shortest_edge" in size else {}
        elif self.sizing == "square":
            new |= {"side": size["height"]} if "height" in size else {}
        elif self.sizing == "patches" and "max_num_patches" in processor:
            new["max_patches"] = processor["max_num_patches"]
        return self.model_copy(update=new)

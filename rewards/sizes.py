"""The size each model's processor resizes a picture to, as pure functions of numbers; transformers' formulas, without its packages."""

from __future__ import annotations

import math

MOST_ELONGATED = 200
"""Sides of a picture at most this far apart, as in Qwen-VL's processors."""


def fit_area(height: int, width: int, *, area: int, multiple: int) -> tuple[int, int]:
    """The size of about `area` pixels with the aspect ratio of (height, width), both sides multiples of `multiple`."""
    scale = math.sqrt(area / (height * width))
    return tuple(
        max(multiple, round(side * scale / multiple) * multiple) for side in (height, width)
    )  # type: ignore[return-value]


def fit_pixels(
    height: int, width: int, *, multiple: int, min_pixels: int, max_pixels: int, copies: int = 1
) -> tuple[int, int]:
    """Qwen-VL's smart resize: multiples of `multiple`, the aspect ratio kept, pixels within the bounds.

    Args:
        copies: frames that share the bounds: 1 in Qwen2.5-VL, which bounds each frame, all of the clip's in Qwen3-VL.
    Raises: ValueError if one side is over 200 times the other.
    """
    if copies > 1 and min(height, width) < multiple:  # Qwen3-VL alone enlarges first
        scale = max(multiple / height, multiple / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > MOST_ELONGATED * min(height, width):
        raise ValueError(
            f"expected sides at most {MOST_ELONGATED} times apart, got {height} x {width}"
        )
    rows, columns = round(height / multiple) * multiple, round(width / multiple) * multiple
    whole = 2 * round(copies / 2) if copies > 1 else 1  # the tubelets' frames
    if whole * rows * columns > max_pixels:
        beta = math.sqrt(copies * height * width / max_pixels)
        rows, columns = (
            max(multiple, math.floor(side / beta / multiple) * multiple) for side in (height, width)
        )
    elif whole * rows * columns < min_pixels:
        beta = math.sqrt(min_pixels / (copies * height * width))
        rows, columns = (math.ceil(side * beta / multiple) * multiple for side in (height, width))
    return rows, columns


def fit_short_side(height: int, width: int, *, side: int) -> tuple[int, int]:
    """The shorter side becomes `side`, the other follows, rounded down."""
    if height <= width:
        return side, int(side * width / height)
    return int(side * height / width), side


def fit_patches(height: int, width: int, *, patch: int, max_patches: int) -> tuple[int, int]:
    """The largest size of at most `max_patches` patches, both sides multiples of `patch` (SigLIP 2's naflex): by bisection of the scale."""
    low, high = 1e-6, 100.0

    def at(scale: float) -> tuple[int, int]:
        rows, columns = (
            max(patch, math.ceil(side * scale / patch) * patch) for side in (height, width)
        )
        return rows, columns

    while high - low >= 1e-5:
        middle = (low + high) / 2
        rows, columns = at(middle)
        if (rows / patch) * (columns / patch) <= max_patches:
            low = middle
        else:
            high = middle
    return at(low)

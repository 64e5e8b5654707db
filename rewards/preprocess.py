"""Differentiable preprocessing: what the transformers processors do to pixels, as pure tensor functions.

Equal to the processors to float rounding (tests), without torchvision, with gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # the OpenAI CLIP statistics Qwen2.5-VL kept
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF_MEAN = HALF_STD = (0.5, 0.5, 0.5)  # SigLIP
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # V-JEPA 2
IMAGENET_STD = (0.229, 0.224, 0.225)


class _ClampStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(0.0, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def clamp_straight_through(x: Tensor) -> Tensor:
    """Clamp to [0, 1] with an identity gradient: a decoder's overshoot must not switch its own gradient off."""
    return _ClampStraightThrough.apply(x)


def resize(frames: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Antialiased resize of frames [B, 3, F, H, W] to [B, 3, F, *size]; mode "bicubic" or "bilinear"."""
    batch, channels, num_frames, height, width = frames.shape
    if (height, width) == tuple(size):
        return frames
    flat = frames.transpose(1, 2).reshape(batch * num_frames, channels, height, width)
    flat = F.interpolate(flat, size=size, mode=mode, antialias=True, align_corners=False)
    return flat.view(batch, num_frames, channels, *size).transpose(1, 2)


def normalise(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(frames - mean) / std per channel of frames [B, 3, F, H, W] in [0, 1]."""
    shape = (1, 3, 1, 1, 1)
    return (frames - frames.new_tensor(mean).view(shape)) / frames.new_tensor(std).view(shape)


def pad_frames(frames: Tensor, multiple: int) -> Tensor:
    """Repeat the last frame until F is a multiple; V-JEPA 2 silently drops an odd last frame otherwise."""
    missing = -frames.shape[2] % multiple
    return (
        frames
        if missing == 0
        else torch.cat([frames, frames[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
    )


def patchify_qwen(
    frames: Tensor, *, patch: int, merge: int, temporal: int
) -> tuple[Tensor, tuple[int, int, int]]:
    """Patches in the order Qwen-VL expects: merge-window major, each patch as (channel, time, row, column).

    Args:
        frames: normalised [B, 3, F, H, W]; F a multiple of `temporal`, H and W of patch * merge.
    Returns: patches [B * t * h * w, 3 * temporal * patch * patch] and the grid (t, h, w) of one clip.
    """
    batch, channels, num_frames, height, width = frames.shape
    t, h, w = num_frames // temporal, height // patch, width // patch
    x = frames.reshape(
        batch, channels, t, temporal, h // merge, merge, patch, w // merge, merge, patch
    )
    #               b  t  h/m w/m m_h m_w c  tp p_h p_w
    x = x.permute(0, 2, 4, 7, 5, 8, 1, 3, 6, 9)
    return x.reshape(batch * t * h * w, channels * temporal * patch * patch), (t, h, w)


def patchify_naflex(images: Tensor, *, patch: int) -> Tensor:
    """Patches [N, h * w, patch * patch * 3] of normalised images [N, 3, H, W] in SigLIP 2's order (row, column, channel)."""
    count, channels, height, width = images.shape
    x = images.reshape(count, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(count, -1, patch * patch * channels)


def timestamps(num_frames: int, fps: float, *, temporal: int) -> list[float]:
    """Seconds of each chunk of `temporal` frames since the first frame: the middle of its first and last frame (Qwen3-VL)."""
    seconds = [min(i, num_frames - 1) / fps for i in range(num_frames + -num_frames % temporal)]
    return [(seconds[i] + seconds[i + temporal - 1]) / 2 for i in range(0, len(seconds), temporal)]


def fixed_rate_frames(
    num_frames: int,
    fps: float,
    *,
    rate: float,
    at_most: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Frames at fixed seconds: one every 1 / `rate` s of a clip at `fps`, from a random start; without a generator from half a step in.

    Indices are long, ascending, distinct. A clip slower than `rate` gives all its frames, one shorter than a step gives one. More than `at_most` are
    thinned out evenly: the rate that is left is then lower, and has to be told to the model.
    """
    step = max(1.0, fps / rate)
    start = 0.5 if generator is None else float(torch.rand((), generator=generator))
    times = torch.arange(math.ceil(num_frames / step), dtype=torch.double)
    indices = torch.unique(((times + start) * step).long())
    indices = indices[indices < num_frames]
    if len(indices) == 0:
        indices = torch.tensor([num_frames // 2])
    if at_most is None or len(indices) <= at_most:
        return indices
    return indices[stratified_frames(len(indices), at_most, generator)]


def stratified_frames(
    num_frames: int, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """One index per equal stretch of the clip, long, ascending and distinct; the middles when generator is None."""
    count = min(count, num_frames)
    edges = torch.arange(count + 1) * num_frames // count  # every stretch holds at least one frame
    position = (
        torch.full((count,), 0.5) if generator is None else torch.rand(count, generator=generator)
    )
    return edges[:-1] + (position * (edges[1:] - edges[:-1])).long().clamp_max(
        edges[1:] - edges[:-1] - 1
    )

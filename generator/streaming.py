"""Decoding a clip chunk by chunk, as pictures: memory does not grow with the length of the clip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

DECODE_CHUNK = 4
"""Latent frames decoded at a time: 16 frames at a temporal ratio of 4."""


def to_uint8(frames: Tensor) -> Tensor:
    """Frames in [0, 1] (clamped) -> uint8 on the same device: a quarter of the bytes to move off it."""
    return frames.clamp(0, 1).mul(255).round().to(torch.uint8)


@torch.no_grad()
def decode_stream(
    decode: Callable[[Tensor, Any], tuple[Tensor, Any]],
    latents: Tensor,
    *,
    chunk: int = DECODE_CHUNK,
) -> Iterator[Tensor]:
    """Yield the frames of latents [B, C, T, h, w] in order, uint8 [B, 3, f, H, W] on the CPU, a chunk at a time.

    Args:
        decode: `VideoBackbone.decode`, `VideoVAE.decode` or a `functools.partial` of it (with a `tiling`).
        chunk: latent frames per call of it.
    """
    if chunk < 1:
        raise ValueError(f"expected chunk >= 1, got {chunk}")
    state = None
    for part in latents.split(chunk, dim=2):
        frames, state = decode(part, state)
        if frames.shape[2]:  # some decoders hold frames back until more latents come
            yield to_uint8(frames).cpu()

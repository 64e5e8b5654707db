"""Augmentation of clips while a reward learns."""

from __future__ import annotations

import torch
from torch import Tensor


def shift_clips(frames: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Each clip moved as a whole by up to `most` of its side, its border repeated; [N, 3, F, H, W]."""
    height, width = frames.shape[-2:]
    down, right = (
        ((2 * torch.rand(len(frames), generator=generator) - 1) * most * side).round().long()
        for side in (height, width)
    )
    out = []
    for clip, y, x in zip(frames, down.tolist(), right.tolist(), strict=True):
        rows = (torch.arange(height) - y).clamp(0, height - 1)
        columns = (torch.arange(width) - x).clamp(0, width - 1)
        out.append(clip[:, :, rows][..., columns])
    return torch.stack(out)

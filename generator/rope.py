"""Rotary position embedding over (time, height, width), shared by text and vision (MM-RoPE), in fp32.

Text token i sits at (i, i, i); the clip's latent frame t sits at (text length + t, y, x), so the clip follows its own
caption whatever the padding. Su et al. 2104.09864; axes and text ids as in SeedVR 2501.01320 and Seaweed 2504.08685.
"""

from __future__ import annotations

import torch
from torch import Tensor


def axis_dim(head_dim: int) -> int:
    """Channels that each of the three axes rotates: the largest even number not above head_dim / 3."""
    if head_dim < 6:
        raise ValueError(f"three rotary axes need a head of at least 6 channels, got {head_dim}")
    return head_dim // 6 * 2


def rope_angles(positions: Tensor, head_dim: int, *, theta: float) -> Tensor:
    """positions [..., 3] (time, y, x) -> angles fp32 [..., 3 * axis_dim / 2]; the head's remaining channels stay as they are."""
    half = axis_dim(head_dim) // 2
    frequencies = theta ** (
        -torch.arange(half, dtype=torch.float32, device=positions.device) / half
    )
    return (positions.float()[..., None] * frequencies).flatten(-2)


def apply_rope(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channel pairs of x [..., N, head_dim] by angles (broadcastable to [..., N, A]); computed in fp32."""
    rotated = 2 * angles.shape[-1]
    head, rest = x[..., :rotated].float(), x[..., rotated:]
    even, odd = head.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def grid_positions(
    num_frames: int, height: int, width: int, device: torch.device | None = None
) -> Tensor:
    """(t, y, x) of every latent position, [T, h, w, 3] int64, from zero."""
    axes = (torch.arange(n, device=device) for n in (num_frames, height, width))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def text_positions(length: int, device: torch.device | None = None) -> Tensor:
    """The same id on all three axes, [L, 3] int64."""
    return torch.arange(length, device=device)[:, None].expand(length, 3)


def video_positions(grid: Tensor, text_lengths: Tensor) -> Tensor:
    """Grid [T, h, w, 3] placed after each sample's text: time ids start at its length [B]; [B, T, h, w, 3]."""
    offset = torch.stack((text_lengths, *(torch.zeros_like(text_lengths),) * 2), dim=-1)
    return grid + offset[:, None, None, None, :]

"""Rotary position embedding over (time, height, width), shared by text and vision (MM-RoPE), in fp32.

Text token i sits at (i, i, i); the clip's latent frame t sits at (text length + t, y, x), so the clip follows its own
caption whatever the padding. Su et al. 2104.09864; axes and text ids as in SeedVR 2501.01320 and Seaweed 2504.08685.
Shots go on counting: caption 1, frames of shot 1, caption 2, frames of shot 2, ... along one axis (`shot_positions`).
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


def shots_of_frames(shot_starts: Tensor, num_frames: int) -> Tensor:
    """The shot that each latent frame is in, [B, T] int64, from the frame each shot starts at, [B, shots]."""
    frame = torch.arange(num_frames, device=shot_starts.device)
    return (frame[:, None] >= shot_starts[:, None, :]).sum(-1) - 1


def shot_positions(
    grid: Tensor, mask: Tensor, token_shots: Tensor, shot_starts: Tensor
) -> tuple[Tensor, Tensor]:
    """Text and vision interleaved shot by shot, with a running offset p from 0 (multi-shot MM-RoPE; 2506.09113, 2.2).

    Token i of a shot's caption of L tokens sits at (p + i, p + i, p + i), frame f of the shot's F at (p + L + f, y, x); then p
    advances by L + F. A prompt that was dropped has no tokens, so its frames count through as in one shot.

    Args:
        grid: (t, y, x) of the latent positions, [T, h, w, 3].
        mask, token_shots: which tokens exist, and the shot each describes, [B, L]; a shot's tokens lie together, in order of the shots.
        shot_starts: the latent frame at which each shot starts, [B, shots].
    Returns: text positions [B, L, 3] and vision positions [B, T, h, w, 3].
    """
    # before token j lie j tokens and all frames of earlier shots; before frame t, t frames and all tokens up to its own shot
    index = torch.arange(mask.shape[1], device=mask.device)
    text = (index + shot_starts.gather(1, token_shots))[..., None].expand(-1, -1, 3)
    told = token_shots[:, None, :] <= shots_of_frames(shot_starts, len(grid))[..., None]
    offset = (mask[:, None] & told).sum(-1)  # [B, T]
    offset = torch.stack((offset, *(torch.zeros_like(offset),) * 2), dim=-1)
    return text, grid + offset[:, :, None, None, :]

"""Layers of the video VAE: patches, causal convolutions, and the past that streaming hands from chunk to chunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

StreamState = tuple[Tensor, ...]
"""One tensor per causal convolution, in forward order: its last input frame, [B, width, 1, h, w]."""


def patchify(frames: Tensor, frames_per_patch: int, size: int) -> Tensor:
    """[B, c, F, H, W] -> [B, c * frames_per_patch * size^2, F / frames_per_patch, H / size, W / size]."""
    batch, channels, num_frames, height, width = frames.shape
    frames = frames.reshape(
        batch,
        channels,
        num_frames // frames_per_patch,
        frames_per_patch,
        height // size,
        size,
        width // size,
        size,
    )
    return frames.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def unpatchify(patches: Tensor, frames_per_patch: int, size: int) -> Tensor:
    """Inverse of `patchify`."""
    batch, features, time, height, width = patches.shape
    patches = patches.reshape(
        batch,
        features // (frames_per_patch * size * size),
        frames_per_patch,
        size,
        size,
        time,
        height,
        width,
    )
    patches = patches.permute(0, 1, 5, 2, 6, 3, 7, 4)
    return patches.reshape(batch, -1, time * frames_per_patch, height * size, width * size)


class ChannelNorm(nn.Module):
    """RMS over the channels of one position: it mixes neither space nor time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden.square().mean(1, keepdim=True) + 1e-6)
        return hidden * scale * self.weight.view(1, -1, 1, 1, 1)


class Stream:
    """Walks the causal convolutions of one call, handing each its past and collecting its new state."""

    def __init__(self, state: StreamState | None) -> None:
        self.incoming = list(state) if state is not None else None
        self.outgoing: list[Tensor] = []

    def with_past(self, hidden: Tensor) -> Tensor:
        """Prepend the last frame of the chunk before (zeros at the start of a clip): [B, width, 1 + T, h, w]."""
        past = (
            torch.zeros_like(hidden[:, :, :1])
            if self.incoming is None
            else self.incoming[len(self.outgoing)]
        )
        hidden = torch.cat([past, hidden], dim=2)
        self.outgoing.append(hidden[:, :, -1:])
        return hidden


class CausalBlock(nn.Module):
    """hidden + W(silu(causal conv(norm(hidden)))): 3 x 3 in space, this and the previous latent frame in time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.conv = nn.Conv3d(width, width, (2, 3, 3), padding=(0, 1, 1))
        self.out = nn.Conv3d(width, width, 1)

    def forward(self, hidden: Tensor, stream: Stream) -> Tensor:
        return hidden + self.out(F.silu(self.conv(stream.with_past(self.norm(hidden)))))


class FrameLinear(nn.Module):
    """One linear map for the first frame of a clip, another for groups of later frames; same output width.

    With `to_patch=False` it reads pixels: first [B, 3 * s^2] and later [B, 3 * 4 * s^2] features per position -> width.
    """

    def __init__(self, first_in: int, later_in: int, first_out: int, later_out: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(first_in, first_out, 1)
        self.later = nn.Conv3d(later_in, later_out, 1)

    def without_later(self, first: Tensor) -> Tensor:
        """What an image gives. In training the map of later frames takes part with a gradient of zero: to some ZeRO stages of DeepSpeed a
        parameter without any gradient has that of the step before."""
        if not (self.training and torch.is_grad_enabled() and self.later.weight.requires_grad):
            return first
        nothing = first.new_zeros(1, self.later.in_channels, 1, 1, 1)
        return first + 0.0 * self.later(nothing).sum()


class PixelsToTokens(FrameLinear):
    """Frames [B, 3, F, H, W] -> tokens [B, width, T, H / size, W / size]."""

    def __init__(self, size: int, group: int, width: int) -> None:
        super().__init__(3 * size**2, 3 * group * size**2, width, width)
        self.size, self.group = size, group

    def forward(self, frames: Tensor, starts_clip: bool) -> Tensor:
        tokens = []
        if starts_clip:
            tokens.append(self.first(patchify(frames[:, :, :1], 1, self.size)))
            frames = frames[:, :, 1:]
        if not frames.shape[2]:
            return self.without_later(tokens[0])
        tokens.append(self.later(patchify(frames, self.group, self.size)))
        return torch.cat(tokens, dim=2)


class TokensToPixels(FrameLinear):
    """Tokens [B, width, T, h, w] -> frames [B, 3, F, h * size, w * size]."""

    def __init__(self, size: int, group: int, width: int) -> None:
        super().__init__(width, width, 3 * size**2, 3 * group * size**2)
        self.size, self.group = size, group

    def forward(self, tokens: Tensor, starts_clip: bool) -> Tensor:
        frames = []
        if starts_clip:
            frames.append(unpatchify(self.first(tokens[:, :, :1]), 1, self.size))
            tokens = tokens[:, :, 1:]
        if not tokens.shape[2]:
            return self.without_later(frames[0])
        frames.append(unpatchify(self.later(tokens), self.group, self.size))
        return torch.cat(frames, dim=2)


class LappedPatches(nn.Module):
    """Latents -> frames, linearly: a patch is read from the 3 x 3 latents around it, of this and the previous latent frame.

    A patch that knows its neighbours has fewer seams than one decoded alone, at the price of a wider matrix.
    """

    def __init__(self, channels: int, group: int, size: int) -> None:
        super().__init__()
        self.group, self.size = group, size
        self.first = nn.Conv3d(channels, 3 * size**2, (1, 3, 3), padding=(0, 1, 1))
        self.later = nn.Conv3d(channels, 3 * group * size**2, (2, 3, 3), padding=(0, 1, 1))

    def forward(self, latents: Tensor, stream: Stream) -> Tensor:
        starts_clip = stream.incoming is None
        latents = stream.with_past(latents)  # [B, C, 1 + T, h, w]
        frames = []
        if starts_clip:
            latents = latents[:, :, 1:]
            frames.append(unpatchify(self.first(latents[:, :, :1]), 1, self.size))
        if latents.shape[2] > 1:
            frames.append(unpatchify(self.later(latents), self.group, self.size))
        return torch.cat(frames, dim=2)

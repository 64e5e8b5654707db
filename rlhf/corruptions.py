"""Named, graded ways to spoil a clip, each with the dimension of judgment it hurts.

They give real footage, which has no gold score, pairs whose order is known; and they test the gold scores of the toy
world. Nothing here knows what is in the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reelhf.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Corruption:
    """One way to spoil a clip."""

    name: str
    dimension: str
    """What it hurts most."""
    apply: Callable[[Tensor, float, torch.Generator], Tensor]
    """(frames [3, F, H, W], strength in (0, 1], generator) -> frames of the same shape."""
    needs_motion: bool = False
    """Without effect on a clip in which nothing moves."""


def corrupt(name: str, frames: Tensor, *, strength: float = 1.0, seed: int = 0) -> Tensor:
    """Spoil a clip: float [3, F, H, W] in [0, 1] -> the same shape and range; strength 0 is the clip itself.

    Raises: UserError for an unknown name or a strength outside [0, 1].
    """
    if name not in CORRUPTIONS:
        hint = did_you_mean(name, CORRUPTIONS)
        raise UserError(f"corruption '{name}'; expected one of {', '.join(CORRUPTIONS)}.{hint}")
    if not 0 <= strength <= 1:
        raise UserError(f"corruption strength {strength}; expected 0 to 1")
    if strength == 0:
        return frames.clone()
    generator = torch.Generator().manual_seed(seed)
    return CORRUPTIONS[name].apply(frames, strength, generator).clamp(0, 1)


def corrupted_gold(
    name: str | None, strength: float, dimensions: tuple[str, ...]
) -> dict[str, float]:
    """What an oracle that knows only the corruption says of the clip: 1 is untouched, per dimension in [0, 1].

    `name` None is the untouched clip, "swapped_caption" another clip's caption. A corruption costs its own dimension
    its full strength and every other a quarter of it: a blurred clip is a little worse in all respects.
    """
    if name is None:
        return dict.fromkeys(dimensions, 1.0)
    hurt = "prompt_following" if name == SWAPPED_CAPTION else CORRUPTIONS[name].dimension
    spill = 0.0 if name == SWAPPED_CAPTION else 0.25
    return {d: 1 - strength * (1.0 if d == hurt else spill) for d in dimensions}


SWAPPED_CAPTION = "swapped_caption"


def _blur(frames: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Gaussian, standard deviation up to 3 % of the side."""
    sigma = 0.03 * strength * frames.shape[-1]
    reach = max(1, math.ceil(2.5 * sigma))
    taps = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).to(frames)
    flat = frames.transpose(0, 1).flatten(0, 1)[:, None]
    flat = F.conv2d(F.pad(flat, (reach, reach, 0, 0), mode="replicate"), taps[None, None, None, :])
    flat = F.conv2d(F.pad(flat, (0, 0, reach, reach), mode="replicate"), taps[None, None, :, None])
    return flat.view(frames.shape[1], 3, *frames.shape[2:]).transpose(0, 1)


def _noise(frames: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Grain that changes from frame to frame, standard deviation up to 0.2, in cells of 1/64 of the side."""
    height, width = frames.shape[2:]
    small = torch.randn(3, frames.shape[1], min(height, 64), min(width, 64), generator=generator)
    grain = F.interpolate(small.transpose(0, 1), size=(height, width), mode="nearest").transpose(
        0, 1
    )
    return frames + 0.2 * strength * grain.to(frames)


def _blocks(frames: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Cells of up to 1/8 of the side, each flat: the look of starved compression."""
    cells = round(64 * (8 / 64) ** strength)
    height, width = frames.shape[2:]
    small = F.adaptive_avg_pool2d(frames, (min(cells, height), min(cells, width)))
    return F.interpolate(small, size=(height, width), mode="nearest")


def _flicker(frames: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Brightness jumps from frame to frame by up to half."""
    gain = 1 - 0.5 * strength * torch.rand(frames.shape[1], generator=generator)
    gain[::2] = 1 - 0.1 * (1 - gain[::2])
    return frames * gain[None, :, None, None].to(frames)


def _warp(frames: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Each frame bends by a smooth field of its own, up to 5 % of the side."""
    count, height, width = frames.shape[1:]
    field = torch.randn(count, 2, 14, 14, generator=generator)
    field = F.interpolate(field, size=(height, width), mode="bicubic", align_corners=True)
    field = field - field.mean(dim=(2, 3), keepdim=True)  # bends the body, does not carry it away
    still = torch.eye(2, 3).expand(count, 2, 3)
    grid = F.affine_grid(still, [count, 3, height, width], align_corners=False)
    grid = grid + 0.1 * strength * field.permute(0, 2, 3, 1)
    out = F.grid_sample(
        frames.transpose(0, 1), grid.to(frames), padding_mode="border", align_corners=False
    )
    return out.transpose(0, 1)


def _freeze(frames: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """The picture stands still for the last `strength` of the clip."""
    count = frames.shape[1]
    last = round((1 - strength) * (count - 1))
    return frames[:, torch.arange(count).clamp(max=last)]


def _shuffle(frames: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Frames in random order; a weak one only exchanges neighbours."""
    count = frames.shape[1]
    places = torch.arange(count) + strength * count * torch.rand(count, generator=generator)
    order = places.argsort()
    if torch.equal(order, torch.arange(count)) and count > 1:
        order[:2] = order[:2].flip(0)
    return frames[:, order]


def _reverse(frames: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Played backwards, the last `strength` of the clip."""
    count = frames.shape[1]
    start = round((1 - strength) * (count - 1))
    return torch.cat([frames[:, :start], frames[:, start:].flip(1)], dim=1)


def _stutter(frames: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Every picture is held for two frames, at full strength for three."""
    hold = 3 if strength > 0.5 else 2
    return frames[:, torch.arange(frames.shape[1]) // hold * hold]


CORRUPTIONS: dict[str, Corruption] = {
    corruption.name: corruption
    for corruption in (
        Corruption("blur", "aesthetic_quality", _blur),
        Corruption("noise", "aesthetic_quality", _noise),
        Corruption("blocks", "aesthetic_quality", _blocks),
        Corruption("flicker", "structural_stability", _flicker),
        Corruption("warp", "structural_stability", _warp),
        Corruption("freeze", "motion_quality", _freeze, needs_motion=True),
        Corruption("shuffle", "motion_quality", _shuffle, needs_motion=True),
        Corruption("reverse", "motion_quality", _reverse, needs_motion=True),
        Corruption("stutter", "motion_quality", _stutter, needs_motion=True),
    )
}

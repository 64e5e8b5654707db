"""Named ways to spoil a clip, for pre-training reward heads without a single human vote.

A clip spoiled more should score lower than the same clip spoiled less, in the dimension that the spoiling hurts. After
Seedream 2.0's texture reward (2503.07703), trained on randomly degraded against original images.

Every function takes frames [B, 3, F, H, W] in [0, 1], a severity per clip [B] in [0, 1] (0 changes nothing) and a
generator, and returns frames of the same shape in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Degradation = Callable[[Tensor, Tensor, Generator], Tensor]


def _per_clip(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1, 1, 1)


def _mix(clean: Tensor, spoiled: Tensor, share: Tensor) -> Tensor:
    return clean + _per_clip(share.clamp(0, 1)) * (spoiled - clean)


def _shrink_and_grow(frames: Tensor, factor: int, mode: str) -> Tensor:
    flat = frames.transpose(1, 2).flatten(0, 1)
    small = F.adaptive_avg_pool2d(
        flat, (max(1, flat.shape[-2] // factor), max(1, flat.shape[-1] // factor))
    )
    back = F.interpolate(small, size=flat.shape[-2:], mode=mode)
    return back.unflatten(0, (frames.shape[0], frames.shape[2])).transpose(1, 2)


def _smooth_noise(shape: tuple[int, ...], cells: int, generator: Generator) -> Tensor:
    """Bilinear noise of unit deviation in a grid of cells x cells, [N, C, H, W]."""
    noise = torch.randn(shape[0], shape[1], cells, cells, generator=generator)
    return F.interpolate(noise, size=shape[-2:], mode="bilinear", align_corners=True)


def blur(frames: Tensor, severity: Tensor, generator: Generator) -> Tensor:
    """Loss of fine detail: a mixture of two box pyramids, a twelfth of the frame at most."""
    side = min(frames.shape[-2:])
    fine = _shrink_and_grow(frames, max(2, side // 32), "bilinear")
    coarse = _shrink_and_grow(frames, max(2, side // 12), "bilinear")
    return _mix(_mix(frames, fine, 2 * severity), coarse, 2 * severity - 1)


def blocks(frames: Tensor, severity: Tensor, generator: Generator) -> Tensor:
    """Square patches, each shifted in brightness, as a patch decoder leaves them; also pixelated."""
    side = min(frames.shape[-2:])
    noise = torch.randn(len(frames), 3, 8, 8, generator=generator)
    grid = F.interpolate(noise, size=frames.shape[-2:], mode="nearest")[:, :, None]
    pixelated = _mix(frames, _shrink_and_grow(frames, max(2, side // 16), "nearest"), severity)
    return (pixelated + 0.12 * _per_clip(severity) * grid).clamp(0, 1)


def noise(frames: Tensor, severity: Tensor, generator: Generator) -> Tensor:
    """White noise, other in every frame, and smooth blotches that stay."""
    white = torch.randn(frames.shape, generator=generator)
    blotches = _smooth_noise((len(frames), 3, *frames.shape[-2:]), 6, generator)[:, :, None]
    kind = _per_clip(torch.rand(len(frames), generator=generator))
    return (frames + 0.2 * _per_clip(severity) * (kind * white + (1 - kind) * blotches)).clamp(0, 1)


def colour(frames: Tensor, severity: Tensor, generator: Generator) -> Tensor:
    """Other colours over the whole clip: a cast, and contrast and saturation too low or too high."""
    way = F.normalize(torch.randn(len(frames), 5, 1, 1, 1, generator=generator), dim=1)
    cast, contrast, saturation = (way * _per_clip(severity)).split([3, 1, 1], dim=1)
    middle = frames.mean(dim=(1, 2, 3, 4), keepdim=True)
    out = middle + (frames - middle) * contrast.exp()
    grey = out.mean(dim=1, keepdim=True)
    return (grey + (out - grey) * (1.5 * saturation).exp() + 0.3 * cast).clamp(0, 1)


def flicker(frames: Tensor, severity: Tensor, generator: Generator) -> Tensor:
    """Brightness that jumps from frame to frame."""
    jump = torch.randn(len(frames), 1, frames.shape[2], 1, 1, generator=generator) * 0.25
    return (frames * (1 + jump * _per_clip(severity))).clamp(0, 1)


def warp(frames: Tensor, severity: Tensor, generator: Generator) -> Tensor:
    """Bodies that melt: a smooth displacement that grows and changes over time."""
    batch, _, num_frames, height, width = frames.shape
    ends = torch.randn(batch * 2, 2, 5, 5, generator=generator).unflatten(0, (batch, 2))
    time = torch.linspace(0, 1, num_frames).view(1, -1, 1, 1, 1)
    flow = ends[:, :1] * (1 - time) + ends[:, 1:] * time  # [B, F, 2, 5, 5]
    flow = F.interpolate(
        flow.flatten(0, 1), size=(height, width), mode="bicubic", align_corners=True
    )
    axis_y, axis_x = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    grid = torch.stack(torch.meshgrid(axis_y, axis_x, indexing="ij")[::-1], dim=-1)
    strength = 0.16 * severity.repeat_interleave(num_frames).view(-1, 1, 1, 1)
    where = grid + strength * flow.permute(0, 2, 3, 1)
    flat = frames.transpose(1, 2).flatten(0, 1)
    out = F.grid_sample(flat, where, padding_mode="border", align_corners=True)
    return out.unflatten(0, (batch, num_frames)).transpose(1, 2).clamp(0, 1)


def fade(frames: Tensor, severity: Tensor, generator: Generator) -> Tensor:
    """Things that vanish: from frame to frame the picture dissolves into its border's colour."""
    border = torch.cat([frames[..., 0, :], frames[..., -1, :]], dim=-1).mean(-1)[..., None, None]
    time = torch.linspace(0, 1, frames.shape[2]).view(1, 1, -1, 1, 1)
    backwards = _per_clip((torch.rand(len(frames), generator=generator) < 0.5).float())
    time = backwards * (1 - time) + (1 - backwards) * time
    return frames + time * _per_clip(severity) * (border - frames)


def ghost(frames: Tensor, severity: Tensor, generator: Generator) -> Tensor:
    """Two pictures in one: the clip itself, turned over and displaced, shines through."""
    other = frames.flip(-2, -1).roll((frames.shape[-2] // 4, frames.shape[-1] // 4), dims=(-2, -1))
    return _mix(frames, other, 0.6 * severity)


def tear(frames: Tensor, severity: Tensor, generator: Generator) -> Tensor:
    """Things that break: the lower part of every frame slides sideways, further with time."""
    side, num_frames = frames.shape[-1], frames.shape[2]
    out = frames.clone()
    cuts = torch.randint(
        frames.shape[-2] // 3, 2 * frames.shape[-2] // 3 + 1, (len(frames),), generator=generator
    )
    for index, cut in enumerate(cuts.tolist()):
        reach = float(severity[index]) * side * 0.35
        for frame in range(num_frames):
            shift = round(reach * (frame + 1) / num_frames)
            if shift:
                out[index, :, frame, cut:] = frames[index, :, frame, cut:].roll(shift, dims=-1)
    return out


def _take_frames(frames: Tensor, indices: Tensor) -> Tensor:
    """frames [B, 3, F, H, W] re-timed by indices [B, F]."""
    return torch.stack([clip[:, index] for clip, index in zip(frames, indices, strict=True)])


def freeze(frames: Tensor, severity: Tensor, generator: Generator) -> Tensor:
    """Motion that stops: time runs slower, at severity 1 not at all."""
    steps = torch.arange(frames.shape[2])[None] * (1 - severity[:, None])
    start = (
        torch.rand(len(frames), 1, generator=generator) * (frames.shape[2] - 1) * severity[:, None]
    )
    return _take_frames(frames, (start + steps).round().long().clamp(0, frames.shape[2] - 1))


def shuffle(frames: Tensor, severity: Tensor, generator: Generator) -> Tensor:
    """Frames out of order: each one's place in time is perturbed."""
    num_frames = frames.shape[2]
    place = torch.arange(num_frames)[None] + severity[:, None] * num_frames * 0.6 * torch.randn(
        len(frames), num_frames, generator=generator
    )
    return _take_frames(frames, place.argsort(dim=1))


def _displaced(frames: Tensor, offsets: Tensor) -> Tensor:
    """Each frame moved by whole pixels (down, right), its border repeated; offsets long [B, F, 2]."""
    rows = (torch.arange(frames.shape[-2]) - offsets[..., :1]).clamp(
        0, frames.shape[-2] - 1
    )  # [B, F, H]
    columns = (torch.arange(frames.shape[-1]) - offsets[..., 1:]).clamp(0, frames.shape[-1] - 1)
    clip = torch.arange(len(frames))[:, None, None, None]
    frame = torch.arange(frames.shape[2])[None, :, None, None]
    out = frames.transpose(1, 2)[
        clip, frame, :, rows[..., None], columns[:, :, None]
    ]  # [B, F, H, W, 3]
    return out.permute(0, 4, 1, 2, 3)


def jitter(frames: Tensor, severity: Tensor, generator: Generator) -> Tensor:
    """A picture that shakes: every frame is displaced."""
    side = min(frames.shape[-2:])
    reach = severity[:, None, None] * 0.09 * side
    offsets = (
        (torch.randn(len(frames), frames.shape[2], 2, generator=generator) * reach).round().long()
    )
    return _displaced(frames, offsets)


def drift(frames: Tensor, severity: Tensor, generator: Generator) -> Tensor:
    """Everything slides one way, a third of the frame from first to last at most: another speed or another direction."""
    side, num_frames = min(frames.shape[-2:]), frames.shape[2]
    angle = 2 * torch.pi * torch.rand(len(frames), generator=generator)
    way = torch.stack([angle.sin(), angle.cos()], dim=-1) * (0.35 * side * severity)[:, None]
    time = torch.linspace(-0.5, 0.5, num_frames)
    return _displaced(frames, (time[:, None] * way[:, None]).round().long())


DEGRADATIONS: dict[str, dict[str, Degradation]] = {
    "aesthetic_quality": {
        "blur": blur,
        "blocks": blocks,
        "noise": noise,
        "colour": colour,
        "flicker": flicker,
    },
    "structural_stability": {
        "warp": warp,
        "fade": fade,
        "ghost": ghost,
        "tear": tear,
        "blocks": blocks,
    },
    "motion_quality": {"freeze": freeze, "shuffle": shuffle, "jitter": jitter, "drift": drift},
    "prompt_following": {"colour": colour},
}
"""dimension -> the spoilings that hurt it."""


def stutter(frames: Tensor, severity: Tensor, generator: Generator) -> Tensor:
    """Motion in jerks: frames are held, up to a third of the clip each."""
    num_frames = frames.shape[2]
    held = 1 + (severity * max(1, num_frames // 3)).round().long()[:, None]  # frames per picture
    steps = torch.arange(num_frames)[None]
    return _take_frames(frames, (steps // held * held).clamp_max(num_frames - 1))


def reverse(frames: Tensor, severity: Tensor, generator: Generator) -> Tensor:
    """Time that runs backwards, over the last `severity` of the clip."""
    num_frames = frames.shape[2]
    steps = torch.arange(num_frames)[None].expand(len(frames), -1)
    first = ((1 - severity) * (num_frames - 1)).round().long()[:, None]
    return _take_frames(frames, torch.where(steps >= first, num_frames - 1 + first - steps, steps))


def sharpen(frames: Tensor, severity: Tensor, generator: Generator) -> Tensor:
    """Halos: what a blur takes away, added once more and too much."""
    soft = _shrink_and_grow(frames, 2, "bilinear")
    return (frames + 2.5 * _per_clip(severity) * (frames - soft)).clamp(0, 1)


UNVOTED: dict[str, dict[str, Degradation]] = {
    "motion_quality": DEGRADATIONS["motion_quality"]
    | {"flicker": flicker, "warp": warp, "stutter": stutter, "reverse": reverse},
    "aesthetic_quality": DEGRADATIONS["aesthetic_quality"],
    "structural_stability": DEGRADATIONS["structural_stability"],
    "prompt_following": DEGRADATIONS["prompt_following"],
    "texture_quality": {"blur": blur, "blocks": blocks, "noise": noise, "sharpen": sharpen},
}
"""dimension -> the spoilings that hurt it, as lessons beside or instead of votes (`rewards.training.synthetic`, `rewards.texture`)."""


def degrade(
    frames: Tensor,
    dimension: str,
    severity: Tensor,
    generator: Generator,
    *,
    ways: Mapping[str, Mapping[str, Degradation]] = DEGRADATIONS,
) -> Tensor:
    """Spoil each clip in one randomly drawn way of a dimension, with its own severity [B]."""
    choices = list(ways[dimension].values())
    kind = torch.randint(len(choices), (len(frames),), generator=generator)
    out = frames.clone()
    for index, function in enumerate(choices):
        chosen = kind == index
        if chosen.any():
            out[chosen] = function(frames[chosen], severity[chosen], generator)
    return out

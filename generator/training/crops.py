"""What the VAE trains on: windows of clips at two sizes, and crops of them as a function of the step alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from generator.base import BackboneSpec
from reelhf.clips import load_folder_windows, resize_frames
from reelhf.engine import device
from reelhf.errors import UserError
from reelhf.training import BatchSplit, position_seed

if TYPE_CHECKING:
    from generator.training.vae import VAETrainConfig

FOREGROUND_DISTANCE = 0.1
"""A pixel whose colour differs from its clip's median by more than this, in any channel, is foreground."""


def median_colour(frames: Tensor) -> Tensor:
    """Per clip and channel, [B, 3, 1, 1, 1] of frames [B, 3, F, H, W]."""
    return frames.flatten(2).median(2).values[:, :, None, None, None]


def foreground_distance(frames: Tensor) -> Tensor:
    """Largest difference over channels from the clip's median colour, [B, 1, F, H, W]."""
    return (frames - median_colour(frames)).abs().amax(1, keepdim=True)


def frames_at(clips: Tensor, picks: Tensor) -> Tensor:
    """The picked frames [B, n] of clips [B, 3, F, H, W], [B, 3, n, H, W]."""
    index = picks[:, None, :, None, None].expand(-1, clips.shape[1], -1, *clips.shape[3:])
    return clips.gather(2, index)


def split_windows(
    config: VAETrainConfig, clips: Path
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(held-out, training) windows, each uint8 at (refined size, half of it)."""
    windows = load_folder_windows(
        clips,
        frame_shape=(config.num_frames, config.height, config.width),
        fps=config.fps,
        max_windows=config.max_clips,
        seed=config.seed,
    )
    full = windows.frames
    if len(full) < 2:
        raise UserError(
            f"{len(full)} training window; expected at least 2, so that one is held out"
        )
    half_size = (config.height // 2, config.width // 2)
    half = torch.stack(
        [resize_frames(clip, half_size).mul(255).round().to(torch.uint8) for clip in full]
    )
    num_held_out = max(1, min(config.num_held_out, len(full) // 4))
    held = held_out_clips(windows.entry_index, num_held_out)
    is_held = torch.tensor([index in held for index in windows.entry_index])
    if not held:
        is_held = torch.arange(len(full)) < num_held_out
    return (full[is_held], half[is_held]), (full[~is_held], half[~is_held])


def held_out_clips(clip_of_window: Sequence[int], num_held_out: int) -> set[int]:
    """Whole clips, so that no window kept out overlaps one that is trained on: in their order, as many as have `num_held_out` windows.

    A clip of more windows than are left to keep out is passed over. Where every clip has too many it is the smallest, unless half of all windows
    are its own: then none, and windows have to be kept out whatever their clip.
    """
    sizes = Counter(clip_of_window)  # in the order of first appearance
    held: set[int] = set()
    left = num_held_out
    for clip, size in sizes.items():
        if size <= left:
            held.add(clip)
            left -= size
    smallest = min(sizes, key=lambda clip: sizes[clip])
    if not held and 2 * sizes[smallest] < len(clip_of_window):
        held = {smallest}
    return held


@dataclass(frozen=True)
class SizedClips:
    """Clips at one size, with what crops need to know of the whole clip."""

    frames: Tensor
    """uint8 [N, 3, F, H, W]."""
    median: Tensor
    """uint8 [N, 3, 1, 1, 1]."""
    foreground: list[Tensor]
    """Per clip, (row, column) of a sample of its foreground pixels, long [n, 2]."""

    @classmethod
    def of(cls, frames: Tensor, *, pixels_per_clip: int = 256) -> SizedClips:
        median = torch.cat([median_colour(clip[None]) for clip in frames])
        positions = []
        for clip, colour in zip(frames, median, strict=True):
            distance = (clip.short() - colour.short()).abs().amax(0)  # [F, H, W]
            found = (distance > 255 * FOREGROUND_DISTANCE).nonzero()[:, 1:]
            positions.append(found[:: max(len(found) // pixels_per_clip, 1)])
        return cls(frames, median, positions)


class CropStream:
    """Batches of crops, clips or at some steps images, as a function of the step alone."""

    def __init__(self, config: VAETrainConfig, full: SizedClips, half: SizedClips) -> None:
        self.config, self.full, self.half = config, full, half
        vae = config.vae
        self.spec = BackboneSpec(vae.channels, vae.temporal_ratio, vae.spatial_ratio)
        self.split = BatchSplit(config.batch_size)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's crops [b, 3, F, s, s] in [0, 1], their foreground distance, and the noise of the posterior."""
        seeds = [position_seed(self.config.seed, p) for p in self.split.positions(step)]
        crops, medians = zip(*(self._crop(random.Random(seed)) for seed in seeds), strict=True)
        frames, median = torch.stack(crops).float() / 255, torch.stack(medians).float() / 255
        if self.is_image_step(step):
            frames = frames_at(frames, self.picks(step, 1, frames.shape[2]))
        distance = (frames - median).abs().amax(1, keepdim=True)
        shape = self.spec.latent_shape(*frames.shape[2:])
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return frames.to(device()), distance.to(device()), torch.stack(noise).to(device())

    def is_image_step(self, step: int) -> bool:
        """Whether every process's crops of this step are images, single frames."""
        share = self.config.image_fraction
        return share > 0 and random.Random(f"image {self.config.seed} {step}").random() < share

    def picks(self, step: int, count: int, num_frames: int) -> Tensor:
        """`count` random frames of each of this rank's crops, long [b, count]."""
        rows = []
        for position in self.split.positions(step):
            rng = random.Random(f"frames {self.config.seed} {position}")
            rows.append([rng.randrange(num_frames) for _ in range(count)])
        return torch.tensor(rows)

    def _crop(self, rng: random.Random) -> tuple[Tensor, Tensor]:
        """One uint8 crop [3, F, s, s] and its clip's median colour [3, 1, 1, 1]."""
        config = self.config
        source = self.full if rng.random() < config.full_size_fraction else self.half
        index = rng.randrange(len(source.frames))
        clip, median, foreground = (
            source.frames[index],
            source.median[index],
            source.foreground[index],
        )
        side = min(config.crop, *self.half.frames.shape[3:])  # one size per batch
        focus = [rng.randrange(clip.shape[2]), rng.randrange(clip.shape[3])]
        if len(foreground) and rng.random() < config.foreground_fraction:
            focus = foreground[rng.randrange(len(foreground))].tolist()
        top, left = (
            min(max(centre - rng.randrange(side), 0), extent - side)
            for centre, extent in zip(focus, clip.shape[2:], strict=True)
        )
        crop = clip[:, :, top : top + side, left : left + side]
        return _augmented(crop, median, rng) if config.augment else (crop, median)


def _augmented(crop: Tensor, median: Tensor, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Reversed in time, upside down, mirrored, transposed, each or not, with the colour channels in some order."""
    for axis in (1, 2, 3):
        crop = crop.flip(axis) if rng.random() < 0.5 else crop
    crop = crop.transpose(2, 3) if rng.random() < 0.5 else crop
    order = rng.sample(range(3), 3)
    return crop[order], median[order]

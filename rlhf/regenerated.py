"""Real clips that the generator partly makes anew: what its own failures look like, graded without asking anyone.

A captioned clip is encoded, noised to a step of the base's own schedule and sampled from there under its caption; the more
steps are left to the generator, the further the copy strays. The accelerated refiner then refines each copy. Nobody voted on
these and nothing was measured: reward backbones are pre-trained on their order (`rewards.pretrain`), which is closer to what
they will judge than spoiled renders are. After SDEdit (2108.01073) for the copies; the use as graded negatives is ours.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from reelhf.config import Config
from reelhf.graded import GradedClips

if TYPE_CHECKING:
    from generator.base import SamplerSpec, VideoBackbone


class RegenerateConfig(Config):
    """How many copies, and how far they stray."""

    max_clips: PositiveInt = 256
    """Source clips at most."""
    copies: int = Field(2, ge=1)
    """Copies of each clip beside the one that only went through the VAE."""
    guidance_scales: tuple[PositiveFloat, ...] = (1.0, 2.0, 3.0)
    """The base's guidance, drawn per batch."""
    refiner_step_fractions: tuple[PositiveFloat, ...] = (0.25, 0.5, 1.0)
    """The accelerated refiner's steps over those of its checkpoint, drawn per batch."""
    batch_size: PositiveInt = 32
    """Clips at once; they share a step and a guidance."""
    seed: int = 0
    """Of the clips, the noise and the draws."""


@torch.no_grad()
def regenerate(
    config: RegenerateConfig, *, clips: Path, base: Path, refiner: Path, out: Path
) -> Path:
    """Write `out/base` and `out/refiner`, graded clips of the two sizes.

    Args:
        clips: folder of captioned clips.
        base, refiner: generator folders.
    """
    from generator.checkpoint import load_generator
    from generator.sampling import refine_frames
    from reelhf.clips import load_folder_windows
    from reelhf.progress import track
    from rlhf.candidates import with_fewer_steps

    small, large = load_generator(base), load_generator(refiner)
    windows = load_folder_windows(
        clips,
        frame_shape=large.frame_shape,
        fps=large.fps,
        max_windows=config.max_clips,
        seed=config.seed,
    )
    rng = random.Random(f"regenerate:{config.seed}")
    made: dict[str, list[Tensor]] = {"base": [], "refiner": []}
    grades: list[Tensor] = []
    for copy in range(1 + config.copies):
        starts = range(0, len(windows.captions), config.batch_size)
        for start in track(starts, label=f"clips made anew, copy {copy}"):
            rows = range(start, min(start + config.batch_size, len(windows.captions)))
            captions = [windows.captions[row] for row in rows]
            seeds = [config.seed * 1_000_000 + copy * 100_000 + row for row in rows]
            frames = windows.frames[start : rows.stop].float() / 255
            begin = small.sampler.num_steps if copy == 0 else rng.randrange(small.sampler.num_steps)
            sampler = replace(small.sampler, guidance_scale=rng.choice(config.guidance_scales))
            low = from_step(small, frames, captions, seeds, sampler, begin)
            steps = rng.choice(config.refiner_step_fractions)
            refined = refine_frames(
                large,
                low,
                captions,
                seeds,
                batch_size=len(rows),
                sampler=with_fewer_steps(large.sampler, steps),
            )
            made["base"].append(to_bytes(low))
            made["refiner"].append(to_bytes(refined))
            grades.append(torch.full((len(rows),), 1 - begin / small.sampler.num_steps))
    count = 1 + config.copies
    graded = torch.cat(grades).view(count, -1).T
    order = graded.argsort(dim=1)
    for name, parts in made.items():
        frames = torch.cat(parts).unflatten(0, (count, -1)).transpose(0, 1)  # [N, G, 3, F, H, W]
        index = order.view(*order.shape, 1, 1, 1, 1).expand_as(frames)
        GradedClips(
            frames.gather(1, index), graded.gather(1, order), windows.captions, large.fps
        ).save(out / name)
    return out


def from_step(
    base: VideoBackbone,
    frames: Tensor,
    captions: list[str],
    seeds: list[int],
    sampler: SamplerSpec,
    begin: int,
) -> Tensor:
    """Clips [B, 3, F, H, W] shrunk to the base's size, encoded, noised to step `begin` and sampled from there."""
    from generator.flow import add_noise, euler_step
    from generator.sampling import noise_like

    latents = base.encode(F.interpolate(frames, size=base.frame_shape, mode="area"))
    condition = base.encode_prompts(captions)
    task = base.text_to_video_task(len(latents), *base.frame_shape)

    def at(sigma: float) -> Tensor:
        return latents.new_full((len(latents),), sigma)

    if begin < sampler.num_steps:
        noise = noise_like(seeds, tuple(latents.shape[1:])).to(latents)
        latents = add_noise(latents, noise, at(sampler.sigmas[begin]))
    for high, low in pairwise(sampler.sigmas[begin:]):
        velocity = base.velocity(
            base.denoiser,
            latents,
            at(high),
            condition,
            task,
            **sampler.guidance,
        )
        latents = euler_step(latents, velocity, at(high), at(low))
    return base.decode(latents)[0].clamp(0, 1)


def to_bytes(frames: Tensor) -> Tensor:
    return (frames * 255).round().byte().cpu()

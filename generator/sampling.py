"""Turning noise into clips with the sampler that a checkpoint carries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from generator.base import Condition, SamplerSpec, Task, VideoBackbone
from generator.flow import adams_step, add_noise, euler_step, x0_from_velocity
from generator.guidance import is_guided
from reelhf.errors import UserError

# a large odd multiplier keeps the streams of neighbouring seeds apart
_SEED_STRIDE = 1_000_003


def noise_like(seeds: Sequence[int], shape: tuple[int, ...], *, stream: int = 0) -> Tensor:
    """Standard normal noise [B, *shape] fp32 on the CPU; a row depends on its seed and stream only, never on the batch.

    `stream` separates draws of the same seed: 0 is the initial noise, i the fresh noise of a renoise sampler's step i.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed((seed * _SEED_STRIDE + stream) % 2**63)
        rows.append(torch.randn(shape, generator=generator))
    return torch.stack(rows)


def sample_latents(
    backbone: VideoBackbone,
    condition: Condition,
    task: Task,
    noise: Tensor,
    *,
    denoiser: nn.Module | None = None,
    sampler: SamplerSpec | None = None,
    seeds: Sequence[int] | None = None,
    negative: Condition | None = None,
) -> Tensor:
    """Walk from noise [B, C, T, h, w] to clean latents; one denoiser evaluation per interval (two with guidance).

    Differentiable: the caller decides what runs under `torch.no_grad()`.

    Args:
        denoiser: another network of the same shape (EMA, frozen reference); the backbone's own by default.
        sampler: another schedule; the checkpoint's by default.
        seeds: one per sample, needed by a `renoise` sampler only.
        negative: prompts that guidance moves away from, a row per sample or one for all; the dropped prompt by default.
    """
    sampler = sampler or backbone.sampler
    denoiser = denoiser if denoiser is not None else backbone.denoiser
    if sampler.kind == "renoise" and seeds is None:
        raise ValueError(
            "a renoise sampler draws fresh noise at each step: pass one seed per sample"
        )
    latents = noise
    before: tuple[Tensor, Tensor] | None = None  # velocity and sigma of the step before
    for step, (high, low) in enumerate(pairwise(sampler.sigmas)):
        sigma, sigma_next = (latents.new_full((len(latents),), value) for value in (high, low))
        velocity = backbone.velocity(
            denoiser,
            latents,
            sigma,
            condition,
            task,
            **sampler.guidance,
            negative=negative,
            sigma_target=sigma_next,
        )
        if sampler.kind == "adams" and before is not None:
            previous, sigma_previous = before
            latents = adams_step(latents, velocity, previous, sigma, sigma_next, sigma_previous)
        elif sampler.kind in ("euler", "adams"):
            latents = euler_step(latents, velocity, sigma, sigma_next)
        else:
            assert seeds is not None
            clean = x0_from_velocity(latents, sigma, velocity)
            fresh = noise_like(seeds, tuple(latents.shape[1:]), stream=step + 1).to(latents)
            latents = add_noise(clean, fresh, sigma_next)
        before = velocity, sigma
    return latents


@torch.no_grad()
def sample_batches(
    backbone: VideoBackbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    task: Task | None = None,
    batch_size: int = 16,
    denoiser: nn.Module | None = None,
    sampler: SamplerSpec | None = None,
    negative_prompt: str | None = None,
) -> Iterator[Tensor]:
    """Clean latents [b, C, T, h, w], a batch at a time, of one clip per prompt and seed; text-to-video unless a task is given.

    A clip depends on its prompt and seed, never on what it is batched with. `negative_prompt`: what guidance moves away from.
    """
    if len(prompts) != len(seeds):
        raise ValueError(
            f"expected one seed per prompt, got {len(prompts)} prompts and {len(seeds)} seeds"
        )
    if negative_prompt and not is_guided((sampler or backbone.sampler).guidance_scale):
        raise UserError(
            "a negative prompt works through guidance, and this sampler has guidance_scale 1; choose another, such as 3"
        )
    if task is None and backbone.role == "refiner":
        raise ValueError("a refiner needs a task with low-resolution latents: see low_res_task")
    shape = backbone.spec.latent_shape(*backbone.frame_shape)
    negative = backbone.encode_prompts([negative_prompt]) if negative_prompt else None
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        condition = backbone.encode_prompts(prompts[rows])
        batch_task = (
            backbone.text_to_video_task(len(condition), *backbone.frame_shape)
            if task is None
            else task[rows]
        )
        noise = noise_like(seeds[rows], shape).to(condition.embeds.device)
        yield sample_latents(
            backbone,
            condition,
            batch_task,
            noise,
            denoiser=denoiser,
            sampler=sampler,
            seeds=seeds[rows],
            negative=negative,
        )


@torch.no_grad()
def refine_batches(
    refiner: VideoBackbone,
    low_res_frames: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int = 16,
    denoiser: nn.Module | None = None,
    sampler: SamplerSpec | None = None,
) -> Iterator[Tensor]:
    """Low-resolution clips [N, 3, F, h, w] -> latents at the refiner's own size, a batch at a time."""
    _, height, width = refiner.frame_shape
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        yield from sample_batches(
            refiner,
            prompts[rows],
            seeds[rows],
            task=refiner.low_res_task(low_res_frames[rows], height, width),
            batch_size=batch_size,
            denoiser=denoiser,
            sampler=sampler,
        )


@torch.no_grad()
def sample_frames(
    backbone: VideoBackbone, prompts: Sequence[str], seeds: Sequence[int], **options: Any
) -> Tensor:
    """The clips of `sample_batches`, which explains the options: [N, 3, F, H, W] clamped to [0, 1], on the CPU."""
    return _decoded(backbone, sample_batches(backbone, prompts, seeds, **options))


@torch.no_grad()
def refine_frames(
    refiner: VideoBackbone,
    low_res_frames: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    **options: Any,
) -> Tensor:
    """The clips of `refine_batches`, which explains the options: at the refiner's own size, clamped to [0, 1], on the CPU."""
    return _decoded(refiner, refine_batches(refiner, low_res_frames, prompts, seeds, **options))


def _decoded(backbone: VideoBackbone, batches: Iterator[Tensor]) -> Tensor:
    return torch.cat([backbone.decode(latents)[0].clamp(0, 1).cpu() for latents in batches])


def check_cascade(base: VideoBackbone, refiner: VideoBackbone) -> None:
    """Raises: UserError unless the refiner enlarges such clips as the base makes."""
    if base.role != "base" or refiner.role != "refiner":
        raise UserError(f"expected a base and a refiner, got a {base.role} and a {refiner.role}")
    (made, height, width), (taken, *size) = base.frame_shape, refiner.frame_shape
    if made != taken:
        raise UserError(
            f"the base makes clips of {made} frames; this refiner enlarges clips of {taken}"
        )
    if height > size[0] or width > size[1]:
        raise UserError(
            f"the base makes clips of {height} x {width}; this refiner's are no larger: {size[0]} x {size[1]}"
        )


class SamplesClips:
    """The short way to clips, for every backbone: `load_generator(path).sample(["a red circle"])`."""

    decodes_in_chunks = True
    """Whether `decode` takes a clip in parts; a decoder that looks ahead takes whole clips only."""

    def sample(
        self: Any,
        prompts: str | Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        first_frames: Tensor | None = None,
        given_frames: Mapping[int, Tensor] | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        refiner: VideoBackbone | None = None,
        batch_size: int = 16,
    ) -> Tensor:
        """One clip per prompt, [N, 3, F, H, W] in [0, 1] on the CPU; `[SHOT 1] ... [CUT] [SHOT 2] ...` is a prompt of two shots.

        Args:
            seeds: one per prompt; 0, 1, 2, ... by default.
            first_frames: where each clip starts, [N, 3, H, W] in [0, 1] at the clips' size.
            given_frames: any others, by their index in the clip: -1 is where it ends.
            num_steps: other than the checkpoint's sampler has.
            guidance_scale: likewise.
            negative_prompt: what guidance moves away from.
            refiner: enlarges the clips, with the same prompts and seeds.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        backbone = self.configured(num_steps=num_steps, guidance_scale=guidance_scale)
        given = dict(given_frames or {})
        if first_frames is not None:
            given[0] = first_frames
        task = backbone.frames_task(given, *backbone.frame_shape) if given else None
        seeds = range(len(prompts)) if seeds is None else list(seeds)
        if refiner is not None:
            check_cascade(backbone, refiner)
        frames = sample_frames(
            backbone,
            prompts,
            seeds,
            task=task,
            negative_prompt=negative_prompt,
            batch_size=batch_size,
        )
        if refiner is None:
            return frames
        return refine_frames(refiner, frames, prompts, seeds, batch_size=batch_size)

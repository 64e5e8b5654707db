"""The refiner: a base generator that has learned to see a low-resolution clip and to draw it larger.

Seedance 1.0 (2506.09113, 2.3): initialised from the base, conditioned by concatenating the upsampled low-resolution clip. Its training
pairs are real clips and what a generator would have made of them: half went through the VAE at low resolution only, half
were noised and denoised again by the base, so that the refiner meets the base's own mistakes with a known right answer. Either
may be blurred and made noisy first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from generator.base import BackboneSpec, Condition, SamplerSpec, Task
from generator.checkpoint import DiTGenerator, upsample_frames
from generator.dit import DiT
from generator.flow import add_noise, euler_step
from generator.quality import psnr
from generator.sampling import noise_like
from reelhf.config import Config
from reelhf.errors import UserError
from reelhf.progress import track


class LowResConfig(Config):
    """How the refiner's training input is made from real clips."""

    base_fraction: float = Field(0.5, ge=0, le=1)
    """Share of clips redrawn by the base from a noised state; the others pass through the VAE only."""
    min_sigma: float = Field(0.3, gt=0, lt=1)
    """Least noise from which the base redraws a clip."""
    max_sigma: float = Field(0.8, gt=0, lt=1)
    """Most noise from which the base redraws a clip."""
    num_steps: PositiveInt = 5
    """Euler steps of the base from there."""
    factor: float = Field(2.0, gt=1)
    """With stages: how many times shorter the sides of the low-resolution clip are, up to whole latents. A refiner of one size enlarges
    the clips of its base's size."""
    blur: float = Field(0.0, ge=0)
    """Most that a low-resolution clip is blurred: standard deviation in its pixels; every clip draws its own."""
    noise: float = Field(0.0, ge=0, le=1)
    """Most noise that is added to it, likewise: standard deviation of values in [0, 1]."""

    @model_validator(mode="after")
    def _some_noise(self) -> LowResConfig:
        if self.min_sigma > self.max_sigma:
            raise ValueError(f"min_sigma {self.min_sigma} is above max_sigma {self.max_sigma}")
        return self


def refiner_from_base(
    base: DiTGenerator, frame_shape: tuple[int, int, int], sampler: SamplerSpec
) -> DiTGenerator:
    """A refiner with the base's weights and a zero-initialised low-resolution input: at first it equals the base."""
    denoiser = DiT(base.denoiser.config.model_copy(update={"low_res": True}))
    different = denoiser.load_state_dict(base.denoiser.state_dict(), strict=False)
    assert different == (["low_res_input.weight"], [])
    return DiTGenerator(
        denoiser=denoiser.to(base.device),
        vae=base.vae,
        text=base.text,
        sampler=sampler,
        role="refiner",
        frame_shape=frame_shape,
        fps=base.fps,
        spec=copy.copy(base.spec),
    )


def downsample_frames(frames: Tensor, height: int, width: int) -> Tensor:
    """Frames [B, 3, F, H, W] -> [B, 3, F, height, width], antialiased per frame, clamped to [0, 1]."""
    batch, num_frames = frames.shape[0], frames.shape[2]
    flat = frames.transpose(1, 2).flatten(0, 1)
    flat = F.interpolate(flat, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return flat.unflatten(0, (batch, num_frames)).transpose(1, 2)


def low_res_size(height: int, width: int, factor: float, spatial_ratio: int) -> tuple[int, int]:
    """Sides of the low-resolution clip of a clip: whole latents, nearest to `factor` times shorter, at least one."""
    small, wide = (
        max(1, math.floor(side / factor / spatial_ratio + 0.5)) * spatial_ratio
        for side in (height, width)
    )
    return small, wide


def degrade(frames: Tensor, config: LowResConfig, seeds: Sequence[int]) -> Tensor:
    """Low-resolution frames [B, 3, F, h, w] in [0, 1], each clip blurred and made noisy by as much as its seed says."""
    if not (config.blur or config.noise):
        return frames
    degraded = []
    for clip, seed in zip(frames, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        blur, strength = torch.rand(2, generator=generator).tolist()
        noise = torch.randn(clip.shape, generator=generator).to(clip)
        clip = _blurred(clip, blur * config.blur) + strength * config.noise * noise
        degraded.append(clip.clamp(0, 1))
    return torch.stack(degraded)


def _blurred(clip: Tensor, std: float) -> Tensor:
    """A clip [3, F, h, w] through a Gaussian of this width in pixels, at most as far as the frame reaches."""
    reach = min(math.ceil(3 * std), min(clip.shape[2:]) - 1)
    if reach < 1:
        return clip
    places = torch.arange(-reach, reach + 1, device=clip.device)
    window = (-places.to(clip).square() / (2 * std**2)).exp()
    window = window / window.sum()
    padded = F.pad(clip, (reach, reach, reach, reach), mode="reflect").flatten(0, 1)[:, None]
    rows = F.conv2d(padded, window.view(1, 1, -1, 1))
    return F.conv2d(rows, window.view(1, 1, 1, -1))[:, 0].unflatten(0, clip.shape[:2])


@torch.no_grad()
def redraw(
    base: DiTGenerator,
    latents: Tensor,
    condition: Condition,
    sigma: float,
    num_steps: int,
    seeds: list[int],
) -> Tensor:
    """Noise clean latents [B, C, T, h, w] to sigma and let the base denoise them (SDEdit, 2108.01073)."""
    task = Task(torch.zeros_like(latents), torch.zeros_like(latents[:, :1]))
    noise = noise_like(seeds, tuple(latents.shape[1:])).to(latents)
    drawn = add_noise(latents, noise, latents.new_full((len(latents),), sigma))
    edges = torch.linspace(sigma, 0.0, num_steps + 1).tolist()
    for high, low in pairwise(edges):
        now, then = (latents.new_full((len(latents),), value) for value in (high, low))
        velocity = base.velocity(
            base.denoiser, drawn, now, condition, task, **base.sampler.guidance
        )
        drawn = euler_step(drawn, velocity, now, then)
    return drawn


@torch.no_grad()
def low_res_latents(
    base: DiTGenerator, frames: Tensor, condition: Condition, config: LowResConfig, seed: int
) -> Tensor:
    """The low-resolution latents that stand for one real clip [1, 3, F, H, W], [1, C, T, h, w] of its own size.

    A function of the clip and the seed: which way it takes, from how much noise the base redraws it, how it is degraded.
    """
    height, width = frames.shape[3:]
    size = low_res_size(height, width, config.factor, base.spec.spatial_ratio)
    draws = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
    latents = base.encode(degrade(downsample_frames(frames, *size), config, [seed]))
    if draws[0] < config.base_fraction:
        sigma = config.min_sigma + draws[1] * (config.max_sigma - config.min_sigma)
        latents = redraw(base, latents, condition, sigma, config.num_steps, [seed])
    shown = base.decode(latents)[0].clamp(0, 1)
    return base.encode(upsample_frames(shown, height, width))


@torch.no_grad()
def low_res_inputs(
    base: DiTGenerator,
    refiner: DiTGenerator,
    frames: Tensor,
    condition: Condition,
    config: LowResConfig,
    *,
    seed: int,
    batch_size: int = 16,
) -> Tensor:
    """The low-resolution latents that stand for each real clip in training, [N, C, T, h, w] of the refiner's size.

    Args:
        frames: uint8 [N, 3, F, H, W] at the refiner's size.
        condition: the clips' prompts.
    """
    _, low_height, low_width = base.frame_shape
    _, height, width = refiner.frame_shape
    num_batches = -(-len(frames) // batch_size)
    generator = torch.Generator().manual_seed(seed)
    sigmas = torch.empty(num_batches).uniform_(
        config.min_sigma, config.max_sigma, generator=generator
    )
    inputs = []
    for batch in track(range(num_batches), label="low-resolution inputs"):
        rows = torch.arange(batch * batch_size, min((batch + 1) * batch_size, len(frames)))
        real = frames[rows].to(base.device).float() / 255
        small = downsample_frames(real, low_height, low_width)
        latents = base.encode(degrade(small, config, [seed + int(row) for row in rows]))
        num_redrawn = round(len(rows) * config.base_fraction)
        if num_redrawn:
            latents[:num_redrawn] = redraw(
                base,
                latents[:num_redrawn],
                condition[rows[:num_redrawn]],
                sigmas[batch].item(),
                config.num_steps,
                [seed + int(row) for row in rows[:num_redrawn]],
            )
        low_res_frames = base.decode(latents)[0].clamp(0, 1)
        task = refiner.low_res_task(low_res_frames, height, width)
        assert task.low_res_latents is not None
        inputs.append(task.low_res_latents.cpu())
    return torch.cat(inputs)


def low_res_consistency(refined: Tensor, low_res: Tensor) -> Tensor:
    """Whether the refined clip shows the clip it was made from: PSNR in dB, [B], of the refined one brought back to its size.

    Args: refined: [B, 3, F, H, W]; low_res: [B, 3, F, h, w], in [0, 1].
    """
    if refined.shape[:3] != low_res.shape[:3]:
        raise ValueError(
            f"clips of {tuple(refined.shape)} were not made from {tuple(low_res.shape)}"
        )
    back = downsample_frames(refined, *low_res.shape[3:])
    errors = (back - low_res).square().mean((1, 2, 3, 4))
    return torch.tensor([psnr(error) for error in errors.tolist()])


def check_sizes(
    spec: BackboneSpec, base: tuple[int, int, int], refined: tuple[int, int, int]
) -> None:
    """UserError unless both sizes are legal and the refiner's is larger with as many frames."""
    spec.check(*base)
    spec.check(*refined)
    if refined[0] != base[0] or refined[1] < base[1] or refined[2] < base[2]:
        raise UserError(
            f"the refiner makes {refined[0]} frames of {refined[1]}x{refined[2]} from a base of {base[0]} frames of "
            f"{base[1]}x{base[2]}; expected as many frames and no smaller a picture"
        )

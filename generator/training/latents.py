"""What a denoiser trains on: clips encoded once, and noised batches of them as a function of the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from generator.base import Condition, Task
from generator.flow import logit_normal_sigma
from generator.sampling import noise_like
from reelhf.clips import ClipTensors, load_folder_windows
from reelhf.config import Config
from reelhf.engine import device
from reelhf.errors import UserError
from reelhf.progress import track
from reelhf.training import BatchSplit, ShuffledEpochs, position_seed

if TYPE_CHECKING:
    from generator.checkpoint import DiTGenerator
    from generator.training.denoiser import DenoiserTrainConfig


class SigmaConfig(Config):
    """Noise levels seen in training: logit-normal, then shifted (SD3, 2403.03206)."""

    mean: float = 0.0
    """Of the logits."""
    std: PositiveFloat = 1.0
    """Of the logits."""
    shift: PositiveFloat = 1.0
    """Above 1 moves sigmas towards noise; larger clips need more. Sampling uses the same shift."""


class TaskMixConfig(Config):
    """Unified training: what is known of the clip besides its prompt. The rest is text-to-video."""

    text_to_image: float = Field(0.1, ge=0, le=1)
    """Share of steps whose whole batch is single frames."""
    image_to_video: float = Field(0.2, ge=0, le=1)
    """Share of the other samples that are given their clean first frame."""


@dataclass(frozen=True)
class LatentSet:
    """Clips encoded once: everything a training step needs, on the CPU."""

    latents: Tensor
    """[N, C, T, h, w] clean."""
    condition: Condition
    """N encoded prompts."""
    captions: list[str]
    low_res_latents: Tensor | None = None
    """[N, C, T, h, w], refiner only."""

    def __len__(self) -> int:
        return len(self.latents)

    def rows(self, index: Sequence[int]) -> LatentSet:
        low_res = None if self.low_res_latents is None else self.low_res_latents[list(index)]
        captions = [self.captions[i] for i in index]
        return LatentSet(self.latents[list(index)], self.condition[list(index)], captions, low_res)

    def split(self, num_validation: int) -> tuple[LatentSet, LatentSet]:
        """(validation, training): the first clips, at most a quarter of them, and the rest."""
        num_validation = max(1, min(num_validation, len(self) // 4))
        if len(self) <= num_validation:
            raise UserError(
                f"{len(self)} training windows; expected at least 2, so that one can validate"
            )
        return self.rows(range(num_validation)), self.rows(range(num_validation, len(self)))


@dataclass(frozen=True)
class Batch:
    """A part of one step's samples, on the training device."""

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    condition: Condition
    task: Task

    def __len__(self) -> int:
        return len(self.clean)


def training_windows(config: DenoiserTrainConfig, clips: Path) -> ClipTensors:
    """Clips of the folder at the size, length and rate of the config."""
    return load_folder_windows(
        clips,
        frame_shape=(config.num_frames, config.height, config.width),
        fps=config.fps,
        max_windows=config.max_clips,
        seed=config.seed,
    )


@torch.no_grad()
def encode_clips(
    backbone: DiTGenerator, windows: ClipTensors, *, batch_size: int = 32
) -> LatentSet:
    """Run the VAE and the text encoder over all windows once."""
    latents, conditions = [], []
    for start in track(range(0, len(windows.frames), batch_size), label="encoding clips"):
        rows = slice(start, start + batch_size)
        latents.append(backbone.encode(windows.frames[rows].float() / 255).cpu())
        conditions.append(backbone.encode_prompts(windows.captions[rows]).to("cpu"))
    return LatentSet(torch.cat(latents), Condition.cat(conditions), windows.captions)


class BatchStream:
    """Batches as a function of the step: shuffled epochs, each sample's randomness seeded by its position."""

    def __init__(self, config: DenoiserTrainConfig, data: LatentSet) -> None:
        self.config, self.data = config, data
        self.shuffled = ShuffledEpochs(len(data), config.seed)
        self.split = BatchSplit(
            config.batch_size, accumulation_steps=config.gradient_accumulation_steps
        )

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """This rank's share of a step, one micro-batch after another."""
        config = self.config
        of_step = torch.Generator().manual_seed(position_seed(config.seed, step))
        as_images = torch.rand((), generator=of_step).item() < config.tasks.text_to_image
        for part in range(config.gradient_accumulation_steps):
            yield self._batch(self.split.positions(step, part), as_images)

    def _batch(self, positions: range, as_images: bool) -> Batch:
        config = self.config
        data = self.data.rows([self.shuffled[position] for position in positions])
        clean, low_res = data.latents, data.low_res_latents
        if as_images:  # the VAE is causal, so the first latent frame is the image's own latent
            clean = clean[:, :, :1]
            low_res = None if low_res is None else low_res[:, :, :1]
        noise = noise_like(
            [position_seed(config.seed, p) for p in positions], tuple(clean.shape[1:]), stream=1
        )
        sigma, kind, drop = self._draws(positions)
        given = (kind < config.tasks.image_to_video) & (not as_images)
        return Batch(
            clean.to(device()),
            noise.to(device()),
            sigma.to(device()),
            data.condition.dropped(drop < config.prompt_dropout).to(device()),
            first_frame_task(clean, given, low_res).to(device()),
        )

    def _draws(self, positions: range) -> tuple[Tensor, Tensor, Tensor]:
        """Per sample: sigma, and two uniform numbers for the task and the prompt's dropout."""
        sigma_config = self.config.sigma
        sigmas, uniforms = [], []
        for position in positions:
            generator = torch.Generator().manual_seed(position_seed(self.config.seed, position))
            sigmas.append(
                logit_normal_sigma(
                    (),
                    mean=sigma_config.mean,
                    std=sigma_config.std,
                    shift=sigma_config.shift,
                    generator=generator,
                )
            )
            uniforms.append(torch.rand(2, generator=generator))
        kind, drop = torch.stack(uniforms).unbind(1)
        return torch.stack(sigmas), kind, drop


def first_frame_task(clean: Tensor, given: Tensor, low_res_latents: Tensor | None = None) -> Task:
    """Image-to-video where `given` [B] is True (clean first latent frame, mask 1 there), text-to-video elsewhere."""
    known = torch.zeros_like(clean[:, 0, :, 0, 0])
    known[:, 0] = given.to(clean)
    return Task.given(clean, known, low_res_latents)

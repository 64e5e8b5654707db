"""What a denoiser trains on: clips encoded once, and noised batches of them as a function of the step.

`BatchStream` serves one size from memory; `generator.training.bucket_stream` serves buckets from disk. Both draw with `Draws`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from generator.base import Condition, Task
from generator.flow import logit_normal_sigma, shift_for_tokens
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
    base_tokens: PositiveInt | None = None
    """Latent positions of the clip that `shift` is meant for; another clip's is shift * sqrt(positions / base_tokens). None: one for all."""

    def shift_for(self, tokens: int) -> float:
        """The shift of clips of this many latent positions."""
        return shift_for_tokens(self.shift, tokens, self.base_tokens)


GIVEN_STREAM = 2
"""Of `noise_like`: which frames a sample is given."""


class GivenFramesConfig(Config):
    """Which clean latent frames image-to-video samples are given, as shares of any scale."""

    first: float = Field(1.0, ge=0)
    """The first alone."""
    last: float = Field(0.0, ge=0)
    """The last alone."""
    both: float = Field(0.0, ge=0)
    """The first and the last."""
    any: float = Field(0.0, ge=0)
    """Each with a chance of one half."""

    @model_validator(mode="after")
    def _some_share(self) -> GivenFramesConfig:
        if not self.first + self.last + self.both + self.any > 0:
            raise ValueError("the shares of the given frames are all 0; expected one above")
        return self

    def known(self, draws: Tensor) -> Tensor:
        """Which latent frames are given, [B, T] bool, from standard normal draws [B, 1 + T]."""
        shares = torch.tensor([self.first, self.last, self.both, self.any], dtype=torch.float64)
        points = torch.special.ndtr(draws[:, 0].double()) * shares.sum()
        kinds = torch.bucketize(points, shares.cumsum(0)[:-1], right=True)
        ways = torch.zeros(len(draws), 4, draws.shape[1] - 1, dtype=torch.bool)
        ways[:, 0::2, 0] = True
        ways[:, 1:3, -1] = True
        ways[:, 3] = draws[:, 1:] > 0
        return ways[torch.arange(len(draws)), kinds]


class TaskMixConfig(Config):
    """Unified training: what is known of the clip besides its prompt. The rest is text-to-video."""

    text_to_image: float = Field(0.1, ge=0, le=1)
    """Share of steps whose whole batch is single frames."""
    image_to_video: float = Field(0.2, ge=0, le=1)
    """Share of the other samples that are given clean frames."""
    given: GivenFramesConfig = GivenFramesConfig()
    """Which frames those are; the first by default."""


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
    names: list[str]
    """What to call each sample in a message."""
    captions: list[str]
    """What `condition` was encoded from."""
    caption_frames: list[int]
    """Length of the clip that each of them tells of."""
    samples_of_step: int
    """Over all processes and micro-batches."""
    weight: float = 1.0
    """Of this micro-batch's mean loss: its samples over the mean number of samples of the step's micro-batches."""

    def __len__(self) -> int:
        return len(self.clean)

    def to(self, place: torch.device) -> Batch:
        """The same on another device."""
        return replace(
            self,
            clean=self.clean.to(place),
            noise=self.noise.to(place),
            sigma=self.sigma.to(place),
            condition=self.condition.to(place),
            task=self.task.to(place),
        )


@dataclass(frozen=True)
class Draws:
    """Everything random about samples; each sample's is a function of the seed and its position in the stream."""

    seed: int
    sigma: SigmaConfig
    tasks: TaskMixConfig
    prompt_dropout: float

    def uniforms(self, positions: Sequence[int], shift: float) -> tuple[Tensor, Tensor]:
        """Per sample: sigma [B], and uniform numbers [B, 3] for the task, the prompt's dropout and the kind of caption."""
        sigmas, uniforms = [], []
        for position in positions:
            generator = torch.Generator().manual_seed(position_seed(self.seed, position))
            sigmas.append(
                logit_normal_sigma(
                    (),
                    mean=self.sigma.mean,
                    std=self.sigma.std,
                    shift=shift,
                    generator=generator,
                )
            )
            two = torch.rand(2, generator=generator)
            uniforms.append(torch.cat((two, torch.rand(1, generator=generator))))
        return torch.stack(sigmas), torch.stack(uniforms)

    def shift(self, clean: Tensor) -> float:
        """Of the noise levels of clips [B, C, T, h, w]."""
        return self.sigma.shift_for(clean[0, 0].numel())

    def batch(
        self,
        clean: Tensor,
        condition: Condition,
        positions: Sequence[int],
        names: list[str],
        captions: list[str],
        caption_frames: list[int],
        *,
        as_images: bool,
        samples_of_step: int,
        low_res: Tensor | None = None,
        weight: float = 1.0,
    ) -> Batch:
        """Noise, sigmas, tasks and dropped prompts for clean latents; on the CPU."""
        seeds = [position_seed(self.seed, position) for position in positions]
        noise = noise_like(seeds, tuple(clean.shape[1:]), stream=1)
        sigma, uniforms = self.uniforms(positions, self.shift(clean))
        given = (uniforms[:, 0] < self.tasks.image_to_video) & (not as_images)
        frames = clean.shape[2]
        known = self.tasks.given.known(noise_like(seeds, (1 + frames,), stream=GIVEN_STREAM))
        return Batch(
            clean,
            noise,
            sigma,
            condition.dropped(uniforms[:, 1] < self.prompt_dropout),
            Task.given(clean, known & given[:, None], low_res),
            names,
            captions,
            caption_frames,
            samples_of_step,
            weight,
        )


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
    """Batches of one size as a function of the step: shuffled epochs, each sample's randomness seeded by its position."""

    def __init__(self, config: DenoiserTrainConfig, data: LatentSet) -> None:
        self.config, self.data = config, data
        self.draws = Draws(config.seed, config.sigma, config.tasks, config.prompt_dropout)
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
            yield self._batch(self.split.positions(step, part), as_images).to(device())

    def _batch(self, positions: range, as_images: bool) -> Batch:
        rows = [self.shuffled[position] for position in positions]
        data = self.data.rows(rows)
        clean, low_res = data.latents, data.low_res_latents
        if as_images:  # the VAE is causal, so the first latent frame is the image's own latent
            clean = clean[:, :, :1]
            low_res = None if low_res is None else low_res[:, :, :1]
        return self.draws.batch(
            clean,
            data.condition,
            positions,
            [f"window {row}" for row in rows],
            data.captions,
            [self.config.num_frames] * len(rows),
            as_images=as_images,
            samples_of_step=self.config.batch_size,
            low_res=low_res,
        )


def text_task(clean: Tensor, low_res_latents: Tensor | None = None) -> Task:
    """Text-to-video: nothing of the clean latents [B, C, T, h, w] is given."""
    return Task.given(clean, torch.zeros_like(clean[:, 0, :, 0, 0]), low_res_latents)

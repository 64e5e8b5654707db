"""Training the denoiser by flow matching: the base from noise, the refiner from its base.

One page: draw a batch, noise it, compare velocities, step, average. Everything random about sample i of step s is drawn from a
generator seeded by its position in the stream, so a resumed run continues bit for bit and N processes equal one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from generator.base import Condition, SamplerSpec, Task
from generator.checkpoint import DiTGenerator, load_generator
from generator.dit import DiT, DiTConfig
from generator.flow import add_noise, flow_matching_loss, logit_normal_sigma, sigma_schedule
from generator.refiner import LowResConfig, check_sizes, low_res_inputs, refiner_from_base
from generator.sampling import noise_like, sample_frames
from generator.text import TextEncoder
from generator.vae import VideoVAE
from reelhf.clips import ClipTensors, load_clip_folder, load_windows
from reelhf.config import Config
from reelhf.engine import (
    Ema,
    Engine,
    EngineConfig,
    OptimizerConfig,
    all_reduce_sum,
    device,
    init_distributed,
    is_main,
    rank,
    seed_everything,
    world_size,
)
from reelhf.errors import UserError
from reelhf.hashing import content_hash
from reelhf.progress import track
from reelhf.run import RunFolder
from reelhf.video import write_video

VALIDATION_SIGMAS = (0.2, 0.4, 0.6, 0.8)
_STREAM = 2_000_003  # separates the positions of neighbouring seeds


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


class DenoiserTrainConfig(Config):
    """One stage of training, base or refiner."""

    stage: Literal["base", "refiner"] = "base"
    """Which of the two the command line trains."""
    architecture: DiTConfig = DiTConfig()
    """Of a base; a refiner takes its base's. Channels and text width follow the VAE and the text encoder."""
    num_frames: PositiveInt = 9
    """Frames per clip, 1 + 4n."""
    height: PositiveInt = 64
    """Pixels, a multiple of 16."""
    width: PositiveInt = 64
    """Pixels, a multiple of 16."""
    fps: PositiveFloat = 8.0
    """Frames per second of the clips."""
    max_clips: PositiveInt = 2048
    """Training windows cut from the clip folder, encoded once and kept in memory."""
    num_validation: PositiveInt = 32
    """Windows kept out of training, for the validation loss and the sample clips; at most a quarter of them."""

    num_steps: PositiveInt = 600
    """Optimizer steps."""
    batch_size: PositiveInt = 32
    """Samples per optimizer step over all processes."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes per optimizer step and process."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO stage."""
    bf16: bool = False
    """bfloat16 weights and activations with float32 master weights."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, warmup_steps=30)
    """AdamW."""
    ema_decay: float = Field(0.99, ge=0, lt=1)
    """Of the averaged weights, which are what is kept; about 1 - 10 / num_steps."""
    sigma: SigmaConfig = SigmaConfig()
    """Noise levels."""
    tasks: TaskMixConfig = TaskMixConfig()
    """Shares of text-to-image and image-to-video."""
    prompt_dropout: float = Field(0.1, ge=0, le=1)
    """Share of samples without a prompt, for guidance."""
    channel_weight_power: float = Field(1.0, ge=0)
    """Loss weight of a latent channel: how much it moves pixels, to this power. Normalised latents hide that a few channels
    carry colour and outline and the rest fine detail; 0 weighs them alike."""
    low_res: LowResConfig = LowResConfig()
    """Refiner only: how its input is made."""

    sampler_steps: PositiveInt = 20
    """Euler steps of the sampler that the checkpoint carries."""
    guidance_scale: float = Field(2.0, ge=0)
    """Its classifier-free guidance; 1 is none."""
    save_every: PositiveInt = 200
    """Steps between two checkpoints; the last step is always saved."""
    validate_every: PositiveInt = 100
    """Steps between two validation losses of the averaged weights."""
    sample_every: PositiveInt = 300
    """Steps between two sets of sample clips."""
    num_samples: int = Field(4, ge=0)
    """Sample clips per set."""
    seed: int = 0
    """Of weights, noise and order."""

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        return self.num_frames, self.height, self.width

    @property
    def sampler(self) -> SamplerSpec:
        sigmas = sigma_schedule(self.sampler_steps, shift=self.sigma.shift)
        return SamplerSpec("euler", sigmas, self.guidance_scale)

    @model_validator(mode="after")
    def _accumulation_divides_the_batch(self) -> DenoiserTrainConfig:
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps}"
            )
        return self


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


def train_base(config: DenoiserTrainConfig, clips: Path, vae: Path, text: Path, out: Path) -> Path:
    """Train a base generator from a folder of captioned clips; resumes from the run folder's last checkpoint.

    Returns: the generator folder, `out/generator`.
    """
    init_distributed()
    seed_everything(config.seed)
    video_vae, text_encoder = VideoVAE.load(vae), TextEncoder.load(text)
    sizes = {
        "channels": video_vae.spec.channels,
        "text_width": text_encoder.embed_size,
        "low_res": False,
    }
    backbone = DiTGenerator(
        denoiser=DiT(config.architecture.model_copy(update=sizes)),
        vae=video_vae,
        text=text_encoder,
        sampler=config.sampler,
        role="base",
        frame_shape=config.frame_shape,
        fps=config.fps,
        spec=video_vae.spec,
    ).to(device())
    windows = _windows(config, clips)
    data = encode_clips(backbone, windows)
    prompts = data.condition.to(device())
    backbone.denoiser.fit_pooled_text(prompts.embeds, prompts.mask)
    return _train(config, backbone, data, Path(out))


def train_refiner(config: DenoiserTrainConfig, clips: Path, base: Path, out: Path) -> Path:
    """Train a refiner that starts as its base; resumes from the run folder's last checkpoint.

    Returns: the generator folder, `out/generator`.
    """
    init_distributed()
    seed_everything(config.seed)
    base_generator = load_generator(base).to(device())
    check_sizes(base_generator.spec, base_generator.frame_shape, config.frame_shape)
    backbone = refiner_from_base(base_generator, config.frame_shape, config.sampler)
    windows = _windows(config, clips)
    data = encode_clips(backbone, windows)
    low_res = low_res_inputs(
        base_generator, backbone, windows.frames, data.condition, config.low_res, seed=config.seed
    )
    return _train(
        config, backbone, LatentSet(data.latents, data.condition, data.captions, low_res), Path(out)
    )


def _windows(config: DenoiserTrainConfig, clips: Path) -> ClipTensors:
    return load_windows(
        load_clip_folder(clips),
        num_frames=config.num_frames,
        fps=config.fps,
        size=(config.height, config.width),
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
        self._epochs: dict[int, list[int]] = {}
        parts = world_size() * config.gradient_accumulation_steps
        if config.batch_size % parts:
            raise UserError(
                f"batch_size {config.batch_size} cannot be split over {world_size()} processes x "
                f"{config.gradient_accumulation_steps} accumulation steps; use a multiple of {parts}"
            )
        self.micro_batch_size = config.batch_size // parts

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """This rank's share of a step, one micro-batch after another."""
        config = self.config
        of_step = torch.Generator().manual_seed(config.seed * _STREAM + step)
        as_images = torch.rand((), generator=of_step).item() < config.tasks.text_to_image
        for part in range(config.gradient_accumulation_steps):
            first = (rank() * config.gradient_accumulation_steps + part) * self.micro_batch_size
            positions = range(
                step * config.batch_size + first,
                step * config.batch_size + first + self.micro_batch_size,
            )
            yield self._batch(positions, as_images)

    def _batch(self, positions: range, as_images: bool) -> Batch:
        config = self.config
        data = self.data.rows([self._index(position) for position in positions])
        clean, low_res = data.latents, data.low_res_latents
        if as_images:  # the VAE is causal, so the first latent frame is the image's own latent
            clean = clean[:, :, :1]
            low_res = None if low_res is None else low_res[:, :, :1]
        noise = noise_like(
            [config.seed * _STREAM + p for p in positions], tuple(clean.shape[1:]), stream=1
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

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.data))
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(self.config.seed * _STREAM + epoch)
            self._epochs = {epoch: torch.randperm(len(self.data), generator=generator).tolist()}
        return self._epochs[epoch][offset]

    def _draws(self, positions: range) -> tuple[Tensor, Tensor, Tensor]:
        """Per sample: sigma, and two uniform numbers for the task and the prompt's dropout."""
        sigma_config = self.config.sigma
        sigmas, uniforms = [], []
        for position in positions:
            generator = torch.Generator().manual_seed(self.config.seed * _STREAM + position)
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
    mask = torch.zeros_like(clean[:, :1])
    mask[:, :, 0] = given.to(clean)[:, None, None, None]
    return Task(clean * mask, mask, low_res_latents)


@torch.no_grad()
def channel_weights(backbone: DiTGenerator, latents: Tensor, power: float) -> Tensor:
    """Pixel change (RMS) per unit change of each latent channel around `latents`, to `power`, with mean 1; [C]."""
    latents = latents.to(backbone.device)
    plain = backbone.decode(latents)[0]
    gains = []
    for channel in range(latents.shape[1]):
        moved = latents.clone()
        moved[:, channel] += 1.0
        gains.append((backbone.decode(moved)[0] - plain).square().mean().sqrt())
    weights = torch.stack(gains) ** power
    return weights / weights.mean()


def _train(config: DenoiserTrainConfig, backbone: DiTGenerator, data: LatentSet, out: Path) -> Path:
    """The loop; identical for base and refiner."""
    num_validation = max(1, min(config.num_validation, len(data) // 4))
    validation = data.rows(range(num_validation))
    training = data.rows(range(num_validation, len(data)))
    if not len(training):
        raise UserError(
            f"{len(data)} training windows; expected at least 2, so that one can validate"
        )
    stream = BatchStream(config, training)
    weights = channel_weights(backbone, validation.latents[:4], config.channel_weight_power)
    run = RunFolder.open(out, config)
    ema = Ema(backbone.denoiser, config.ema_decay)
    engine = Engine(
        backbone.denoiser,
        config.optimizer,
        EngineConfig(
            zero_stage=config.zero_stage,
            bf16=config.bf16,
            micro_batch_size=stream.micro_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
        ),
    )
    identity = _identity(config, data)
    start = resume_state(run, engine, ema, identity)

    steps = range(start, config.num_steps)
    for step in track(steps, label=f"training the {backbone.role}"):
        # 1. Noise clean latents and compare the predicted velocity with the true one.
        loss_sum = torch.zeros((), device=device())
        for batch in stream.micro_batches(step):
            noisy = add_noise(batch.clean, batch.noise, batch.sigma)
            velocity = backbone.velocity(engine, noisy, batch.sigma, batch.condition, batch.task)
            loss = flow_matching_loss(
                velocity, batch.clean, batch.noise, channel_weights=weights
            )  # [b]
            engine.backward(loss.mean())
            loss_sum += loss.detach().sum()
            # 2. Update the weights (at the last micro-batch) and their average.
            update = engine.step()
        ema.update(engine.module)

        # 3. Report; validate, sample and save when due.
        done = step + 1
        metrics = {"loss": all_reduce_sum(loss_sum).item() / config.batch_size, **update}
        if done % config.validate_every == 0 or done == config.num_steps:
            metrics["validation/loss"] = validation_loss(backbone, ema, validation, weights)
        run.log(done, metrics)
        if config.num_samples and (done % config.sample_every == 0 or done == config.num_steps):
            _save_samples(config, backbone, ema, validation, run, done)
        if done % config.save_every == 0 or done == config.num_steps:
            run.save_checkpoint(
                done, lambda folder: save_state(folder, engine, ema, identity), keep=2
            )

    folder = run.path / "generator"
    if is_main():
        replace(backbone, denoiser=ema.module).save(folder)
    return folder


def _identity(config: DenoiserTrainConfig, data: LatentSet) -> str:
    """What must not change between two attempts at a run; lengths and intervals may."""
    free = {
        "num_steps",
        "save_every",
        "validate_every",
        "sample_every",
        "num_samples",
        "num_validation",
    }
    return content_hash(config.model_dump(mode="json", exclude=free), data.captions, len(data))


def save_state(folder: Path, engine: Engine, ema: Ema, identity: str) -> None:
    """What `resume_state` restores; every rank calls it inside `RunFolder.save_checkpoint`."""
    engine.save(folder / "engine", {"identity": identity})
    if is_main():
        torch.save(ema.state_dict(), folder / "ema.pt")


def resume_state(run: RunFolder, engine: Engine, ema: Ema, identity: str) -> int:
    """Restore the last checkpoint, if there is one; the number of steps already made."""
    latest = run.latest_checkpoint()
    if latest is None:
        return 0
    step, folder = latest
    if engine.load(folder / "engine")["identity"] != identity:
        raise UserError(
            f"{run.path} holds a run with other settings or other clips; choose another --out, or delete it"
        )
    ema.load_state_dict(torch.load(folder / "ema.pt", weights_only=True))
    return step


@torch.no_grad()
def validation_loss(backbone: DiTGenerator, ema: Ema, data: LatentSet, weights: Tensor) -> float:
    """Velocity error of the averaged weights on clips never trained on, at fixed noise and four sigmas."""
    clean = data.latents.to(device())
    noise = noise_like(range(len(data)), tuple(clean.shape[1:])).to(device())
    task = first_frame_task(data.latents, torch.zeros(len(data)), data.low_res_latents).to(device())
    condition = data.condition.to(device())
    losses = []
    for value in VALIDATION_SIGMAS:
        sigma = clean.new_full((len(data),), value)
        velocity = backbone.velocity(
            ema.module, add_noise(clean, noise, sigma), sigma, condition, task
        )
        losses.append(flow_matching_loss(velocity, clean, noise, channel_weights=weights).mean())
    return torch.stack(losses).mean().item()


def _save_samples(
    config: DenoiserTrainConfig,
    backbone: DiTGenerator,
    ema: Ema,
    data: LatentSet,
    run: RunFolder,
    step: int,
) -> None:
    """Clips of the first validation prompts from fixed seeds; a refiner enlarges the first validation clips."""
    if not is_main():
        return
    chosen = data.rows(range(min(config.num_samples, len(data))))
    task = None
    if chosen.low_res_latents is not None:
        nothing = torch.zeros(len(chosen))
        task = first_frame_task(chosen.latents, nothing, chosen.low_res_latents).to(device())
    frames = sample_frames(
        backbone, chosen.captions, list(range(len(chosen))), task=task, denoiser=ema.module
    )
    for index, clip in enumerate(frames):
        write_video(run.sample_path(step, f"{index:02d}.mp4"), clip, config.fps)
    captions = "".join(f"{index:02d}.mp4\t{text}\n" for index, text in enumerate(chosen.captions))
    run.sample_path(step, "captions.tsv").write_text(captions, encoding="utf-8")

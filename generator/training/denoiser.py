"""Training the denoiser by flow matching: the base from noise, the refiner from its base.

One page, `train_denoiser`: draw a batch, noise it, compare velocities, step, average.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from generator.base import SamplerSpec
from generator.checkpoint import DiTGenerator, load_generator
from generator.dit import DiT, DiTConfig
from generator.flow import add_noise, flow_matching_loss, sigma_schedule
from generator.refiner import LowResConfig, check_sizes, low_res_inputs, refiner_from_base
from generator.sampling import noise_like, sample_frames
from generator.text import TextEncoder
from generator.training.latents import (
    BatchStream,
    LatentSet,
    SigmaConfig,
    TaskMixConfig,
    encode_clips,
    first_frame_task,
    training_windows,
)
from generator.vae import VideoVAE
from reelhf.config import Config
from reelhf.engine import (
    EngineConfig,
    OptimizerConfig,
    all_reduce_sum,
    device,
    init_distributed,
    is_main,
    seed_everything,
)
from reelhf.run import RunFolder
from reelhf.training import TrainLoop, run_identity
from reelhf.video import write_video

VALIDATION_SIGMAS = (0.2, 0.4, 0.6, 0.8)
FREE_TO_CHANGE = frozenset({"validate_every", "sample_every", "num_samples", "num_validation"})
"""Keys that a resumed run may have otherwise."""


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
    data = encode_clips(backbone, training_windows(config, clips))
    prompts = data.condition.to(device())
    backbone.denoiser.fit_pooled_text(prompts.embeds, prompts.mask, prompts.token_shots)
    return train_denoiser(config, backbone, data, out)


def train_refiner(config: DenoiserTrainConfig, clips: Path, base: Path, out: Path) -> Path:
    """Train a refiner that starts as its base; resumes from the run folder's last checkpoint.

    Returns: the generator folder, `out/generator`.
    """
    init_distributed()
    seed_everything(config.seed)
    base_generator = load_generator(base).to(device())
    check_sizes(base_generator.spec, base_generator.frame_shape, config.frame_shape)
    backbone = refiner_from_base(base_generator, config.frame_shape, config.sampler)
    windows = training_windows(config, clips)
    data = encode_clips(backbone, windows)
    low_res = low_res_inputs(
        base_generator, backbone, windows.frames, data.condition, config.low_res, seed=config.seed
    )
    return train_denoiser(config, backbone, replace(data, low_res_latents=low_res), out)


def train_denoiser(
    config: DenoiserTrainConfig, backbone: DiTGenerator, data: LatentSet, out: Path
) -> Path:
    """The loop; identical for base and refiner."""
    validation, training = data.split(config.num_validation)
    stream = BatchStream(config, training)
    weights = channel_weights(backbone, validation.latents[:4], config.channel_weight_power)
    run = RunFolder.open(out, config)
    loop = TrainLoop(
        run,
        config,
        backbone.denoiser,
        EngineConfig(
            zero_stage=config.zero_stage,
            bf16=config.bf16,
            micro_batch_size=stream.split.micro_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
        ),
        ema_decay=config.ema_decay,
        identity=run_identity(config, data.captions, len(data), free=FREE_TO_CHANGE),
    )

    for step in loop.steps(f"training the {backbone.role}"):
        # 1. Noise clean latents and compare the predicted velocity with the true one.
        loss_sum = torch.zeros((), device=device())
        for batch in stream.micro_batches(step):
            noisy = add_noise(batch.clean, batch.noise, batch.sigma)
            velocity = backbone.velocity(
                loop.engine, noisy, batch.sigma, batch.condition, batch.task
            )
            loss = flow_matching_loss(
                velocity, batch.clean, batch.noise, channel_weights=weights
            )  # [b]
            update = loop.update(loss.mean())  # the last micro-batch moves the weights
            loss_sum += loss.detach().sum()

        # 2. Report; validate, sample and save when due.
        metrics = {"loss": all_reduce_sum(loss_sum).item() / config.batch_size, **update}
        if loop.is_due(step, config.validate_every):
            metrics["validation/loss"] = validation_loss(
                backbone, loop.averaged, validation, weights
            )
        if config.num_samples and loop.is_due(step, config.sample_every):
            save_samples(config, backbone, loop.averaged, validation, run, step + 1)
        loop.end_step(step, metrics)

    return loop.save_model("generator", replace(backbone, denoiser=loop.averaged).save)


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


@torch.no_grad()
def validation_loss(
    backbone: DiTGenerator, denoiser: DiT, data: LatentSet, weights: Tensor
) -> float:
    """Velocity error on clips never trained on, at fixed noise and four sigmas."""
    clean = data.latents.to(device())
    noise = noise_like(range(len(data)), tuple(clean.shape[1:])).to(device())
    task = first_frame_task(data.latents, torch.zeros(len(data)), data.low_res_latents).to(device())
    condition = data.condition.to(device())
    losses = []
    for value in VALIDATION_SIGMAS:
        sigma = clean.new_full((len(data),), value)
        velocity = backbone.velocity(
            denoiser, add_noise(clean, noise, sigma), sigma, condition, task
        )
        losses.append(flow_matching_loss(velocity, clean, noise, channel_weights=weights).mean())
    return torch.stack(losses).mean().item()


def save_samples(
    config: DenoiserTrainConfig,
    backbone: DiTGenerator,
    denoiser: DiT,
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
        backbone, chosen.captions, list(range(len(chosen))), task=task, denoiser=denoiser
    )
    for index, clip in enumerate(frames):
        write_video(run.sample_path(step, f"{index:02d}.mp4"), clip, config.fps)
    captions = "".join(f"{index:02d}.mp4\t{text}\n" for index, text in enumerate(chosen.captions))
    run.sample_path(step, "captions.tsv").write_text(captions, encoding="utf-8")

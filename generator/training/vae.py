"""Training the VAE: shortcuts in closed form first, then the residual path on crops.

The linear shortcuts stay as they were fitted: trained together with the residual path they lose more in the first hundred steps
than they win back in the next two hundred.

What was measured on 480 plain toy clips at 64x64 (foreground PSNR of 64 held-out ones, one run each): PCA alone 20.7 dB; the decoder
reading the 3 x 3 x 2 latents around a patch, by ridge regression, 21.5 dB; the residual path adds 0.1 to 0.2 dB in 60 to 250 steps.
Failed: an L1 loss (its median is the background: no gain in 700 steps); a two-colours-and-mask head; regression on random ReLU
features (over-fits, 20.8 dB); a learning rate of 4e-3. The residual path can do far more (35 dB on four clips in 150 steps), but
not on hundreds of clips in a minute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from generator.training.crops import (
    FOREGROUND_DISTANCE,
    CropStream,
    SizedClips,
    foreground_distance,
    split_windows,
)
from generator.vae import VAEConfig, VideoVAE
from reelhf.config import Config
from reelhf.engine import (
    EngineConfig,
    OptimizerConfig,
    device,
    init_distributed,
    seed_everything,
)
from reelhf.errors import UserError
from reelhf.run import RunFolder, seal
from reelhf.training import TrainLoop, mean_over_processes, run_identity


class VAELossConfig(Config):
    """Weights of the terms."""

    mse: float = Field(1.0, ge=0)
    """Squared error. It leads here: an L1 error has its optimum at the median, which for a small moving actor is the
    background, and training stays there for hundreds of steps."""
    l1: float = Field(0.1, ge=0)
    """Absolute error."""
    edge: float = Field(0.0, ge=0)
    """Absolute error of the spatial differences between neighbouring pixels."""
    kl: float = Field(1e-6, ge=0)
    """Divergence from N(0, 1) per latent element."""
    foreground: float = Field(1.0, ge=0)
    """Extra weight of pixels unlike their clip's median colour, in the first three."""


class VAETrainConfig(Config):
    """The VAE and its training. One VAE serves the refined size and, at half of it, the base's size."""

    stage: Literal["vae"] = "vae"
    """What `reelhf generator train` trains with this config."""

    vae: VAEConfig = VAEConfig()
    """Widths of the network."""
    num_frames: PositiveInt = 9
    """Frames per clip, 1 + 4n, at least 5."""
    height: PositiveInt = 128
    """Pixels of the refined size, a multiple of 32."""
    width: PositiveInt = 128
    """Pixels of the refined size, a multiple of 32."""
    fps: PositiveFloat = 8.0
    """Frames per second of the clips."""
    max_clips: PositiveInt = 768
    """Windows cut from the clip folder, kept in memory as uint8."""
    num_held_out: PositiveInt = 32
    """Windows kept out of training and measured at its end; at most a quarter of them."""

    num_steps: int = Field(150, ge=0)
    """Optimizer steps; 0 keeps the linear shortcuts alone."""
    batch_size: PositiveInt = 12
    """Crops per optimizer step over all processes."""
    crop: PositiveInt = 32
    """Side of a training crop in pixels, a multiple of 16; whole clips where they are smaller."""
    full_size_fraction: float = Field(0.3, ge=0, le=1)
    """Share of crops from clips of the refined size; the others are from half of it."""
    foreground_fraction: float = Field(0.85, ge=0, le=1)
    """Share of crops placed over a foreground pixel."""
    augment: bool = True
    """Mirror, transpose and reverse crops in time, and permute their colour channels: a few hundred clips are few."""
    loss: VAELossConfig = VAELossConfig()
    """Weights of the terms."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3, weight_decay=0.0, warmup_steps=10)
    """AdamW on the residual path."""
    ema_decay: float = Field(0.95, ge=0, lt=1)
    """Of the averaged weights, which are what is kept; about 1 - 10 / num_steps."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO stage."""
    save_every: PositiveInt = 100
    """Steps between two checkpoints; the last step is always saved."""
    seed: int = 0
    """Of weights, noise and order."""


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of values in [0, 1]."""
    return -10 * math.log10(max(mean_squared_error, 1e-10))


def vae_loss(
    reconstruction: Tensor, frames: Tensor, kl: Tensor, foreground: Tensor, config: VAELossConfig
) -> Tensor:
    """Weighted sum of the terms, a scalar.

    Args:
        reconstruction, frames: [B, 3, F, H, W].
        kl: scalar, nats per latent element.
        foreground: `foreground_distance` of the whole clips at the crops, [B, 1, F, H, W].
    """
    weight = 1 + config.foreground * (foreground > FOREGROUND_DISTANCE).to(frames)
    error = reconstruction - frames
    loss = config.mse * (weight * error.square()).mean() + config.l1 * (weight * error.abs()).mean()
    if config.edge:
        for axis in (3, 4):
            along = weight.narrow(axis, 1, weight.shape[axis] - 1)
            loss = loss + config.edge * (along * error.diff(dim=axis).abs()).mean()
    return loss + config.kl * kl


def train_vae(config: VAETrainConfig, clips: Path, out: Path) -> Path:
    """Train a VAE on a folder of clips; resumes from the run folder's last checkpoint.

    Logs PSNR and foreground PSNR in dB of held-out clips at both sizes: of the shortcuts alone before the first step, and of
    the averaged weights after the last.

    Returns: the VAE folder, `out/vae`.
    """
    init_distributed()
    seed_everything(config.seed)
    vae = VideoVAE(config.vae)
    check_sizes(config, vae)
    held_out, training = split_windows(config, clips)
    stream = CropStream(config, *map(SizedClips.of, training))
    run = RunFolder.open(out, config)

    # 1. The linear shortcuts, in closed form; what is trained is the residual path.
    vae.init_shortcut([frames[:256].float() / 255 for frames in training], seed=config.seed)
    vae.encoder.shortcut.requires_grad_(False)
    vae.decoder.shortcut.requires_grad_(False)
    loop = TrainLoop(
        run,
        config,
        vae,
        EngineConfig(zero_stage=config.zero_stage, micro_batch_size=stream.split.micro_batch_size),
        ema_decay=config.ema_decay,
        identity=run_identity(config, len(training[0])),
    )
    if loop.first_step == 0:
        figures = reconstruction_figures(loop.averaged.shortcut, held_out, "shortcut")
        if config.num_steps == 0:
            figures |= reconstruction_figures(loop.averaged.reconstruct, held_out, "held_out")
        run.log(0, figures)

    for step in loop.steps("training the VAE"):
        # 2. Rebuild crops through a sample of the posterior.
        frames, foreground, noise = stream.batch(step)
        reconstruction, posterior = loop.engine(frames, noise)
        kl = posterior.kl()
        loss = vae_loss(reconstruction, frames, kl, foreground, config.loss)
        update = loop.update(loss)

        # 3. Report, after the last step also on the held-out clips; save when due.
        metrics = {"loss": mean_over_processes(loss), "kl": mean_over_processes(kl), **update}
        if loop.is_last(step):
            metrics |= reconstruction_figures(loop.averaged.reconstruct, held_out, "held_out")
        loop.end_step(step, metrics)

    # 4. Keep the averaged weights, and with them the scale of their latents.
    trained = loop.averaged
    trained.set_latent_statistics([posterior_means(trained, frames) for frames in training])
    return loop.save_model("vae", lambda folder: seal(trained.save(folder)))


def check_sizes(config: VAETrainConfig, vae: VideoVAE) -> None:
    """UserError unless the VAE takes clips of the refined size and of half of it."""
    if config.num_frames < 5:
        raise UserError(f"num_frames {config.num_frames}: the VAE learns from at least 5 frames")
    vae.spec.check(config.num_frames, config.height, config.width)
    vae.spec.check(config.num_frames, config.height // 2, config.width // 2)


@torch.no_grad()
def posterior_means(vae: VideoVAE, frames: Tensor, *, limit: int = 128) -> Tensor:
    """Un-normalised latents [N, C, T, h, w] of at most `limit` uint8 clips."""
    chunks = frames[:limit].split(16)
    return torch.cat([vae.posterior(chunk.to(device()).float() / 255)[0].mean for chunk in chunks])


@torch.no_grad()
def reconstruction_figures(
    rebuild: Callable[[Tensor], Tensor], held_out: Sequence[Tensor], prefix: str
) -> dict[str, float]:
    """`<prefix>/psnr` and `<prefix>/foreground_psnr` in dB of uint8 clips at the refined size, `half_size_` ones at half of it."""
    figures = {}
    for size, clips in zip(("", "half_size_"), held_out, strict=True):
        squared = foreground_squared = count = 0.0
        for chunk in clips.split(8):
            frames = chunk.to(device()).float() / 255
            error = (rebuild(frames).clamp(0, 1) - frames).square().mean(1, keepdim=True)
            foreground = foreground_distance(frames) > FOREGROUND_DISTANCE
            squared += error.mean().item() * len(chunk)
            foreground_squared += error[foreground].sum().item()
            count += foreground.sum().item()
        figures[f"{prefix}/{size}psnr"] = psnr(squared / len(clips))
        if count:
            figures[f"{prefix}/{size}foreground_psnr"] = psnr(foreground_squared / count)
    return figures

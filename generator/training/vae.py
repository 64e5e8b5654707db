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

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from generator.reconstruction import (
    REPORT_NAME,
    Reconstruction,
    measure_reconstruction,
    write_report,
)
from generator.training.adversary import AddedTerms, AdversarialConfig, Example
from generator.training.crops import CropStream, SizedClips, split_windows
from generator.training.discriminators import smallest_side
from generator.training.perceptual import PerceptualConfig
from generator.training.vae_losses import VAELossConfig, head_inputs, pulled, vae_loss
from generator.vae import VAEConfig, VideoVAE
from reelhf.config import Config
from reelhf.engine import (
    EngineConfig,
    OptimizerConfig,
    device,
    init_distributed,
    is_main,
    seed_everything,
)
from reelhf.errors import UserError
from reelhf.run import RunFolder, seal
from reelhf.training import TrainLoop, mean_over_processes, run_identity


class VAETrainConfig(Config):
    """The VAE and its training. One VAE serves the refined size and, at half of it, the base's size."""

    stage: Literal["vae"] = "vae"
    """What `reelhf generator train` trains with this config."""

    vae: VAEConfig = VAEConfig()
    """Widths of the network."""
    num_frames: PositiveInt = 9
    """Frames per clip, 1 + 4n, at least 5 (of this VAE's temporal ratio)."""
    height: PositiveInt = 128
    """Pixels of the refined size, a multiple of twice the spatial ratio."""
    width: PositiveInt = 128
    """Pixels of the refined size, a multiple of twice the spatial ratio."""
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
    """Side of a training crop in pixels, a multiple of the spatial ratio; whole clips where they are smaller."""
    full_size_fraction: float = Field(0.3, ge=0, le=1)
    """Share of crops from clips of the refined size; the others are from half of it."""
    foreground_fraction: float = Field(0.85, ge=0, le=1)
    """Share of crops placed over a foreground pixel."""
    augment: bool = True
    """Mirror, transpose and reverse crops in time, and permute their colour channels: a few hundred clips are few."""
    loss: VAELossConfig = VAELossConfig()
    """Weights of the terms that compare pixels, and of the divergence."""
    perceptual: PerceptualConfig = PerceptualConfig()
    """A distance of features."""
    adversarial: AdversarialConfig = AdversarialConfig()
    """Discriminators of frames and clips."""
    image_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the steps whose batch is images (single frames) in place of clips."""
    checkpoint_chunk: PositiveInt | None = None
    """Latent frames per chunk whose activations are recomputed in the backward pass; none keeps them all."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3, weight_decay=0.0, warmup_steps=10)
    """AdamW on the residual path."""
    ema_decay: float = Field(0.95, ge=0, lt=1)
    """Of the averaged weights, which are what is kept; about 1 - 10 / num_steps."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO stage; discriminators, which are small, are split up to stage 2."""
    save_every: PositiveInt = 100
    """Steps between two checkpoints; the last step is always saved."""
    seed: int = 0
    """Of weights, noise and order."""

    @model_validator(mode="after")
    def _added_terms_have_what_they_need(self) -> VAETrainConfig:
        matching = self.perceptual.weight and self.perceptual.kind == "discriminator_features"
        if matching and not self.adversarial.weight:
            raise ValueError(
                "perceptual.kind 'discriminator_features' compares what the discriminators see; give adversarial.weight above 0"
            )
        return self


def train_vae(config: VAETrainConfig, clips: Path, out: Path) -> Path:
    """Train a VAE on a folder of clips; resumes from the run folder's last checkpoint.

    Logs PSNR and foreground PSNR in dB of held-out clips at both sizes: of the shortcuts alone before the first step, and of
    the averaged weights after the last, with SSIM and flicker and into `out/vae_report.json` too.

    Returns: the VAE folder, `out/vae`.
    """
    init_distributed()
    seed_everything(config.seed)
    vae = VideoVAE(config.vae)
    check_sizes(config, vae)
    held_out, training = split_windows(config, clips)
    stream = CropStream(config, *map(SizedClips.of, training))
    run = RunFolder.open(out, config)
    added = AddedTerms(config, stream.split.micro_batch_size, vae.decoder.head)

    # 1. The linear shortcuts, in closed form; what is trained is the residual path.
    vae.init_shortcut([frames[:256].float() / 255 for frames in training], seed=config.seed)
    vae.encoder.shortcut.requires_grad_(False)
    vae.decoder.shortcut.requires_grad_(False)
    if config.num_steps == 0:
        vae.silence_residual()
    loop = TrainLoop(
        run,
        config,
        vae,
        EngineConfig(zero_stage=config.zero_stage, micro_batch_size=stream.split.micro_batch_size),
        ema_decay=config.ema_decay,
        identity=run_identity(config, len(training[0])),
        others=added.engines,
    )

    def measured(rebuild: Callable[[Tensor], Tensor], prefix: str, **options: bool) -> dict:
        rows = [measure_reconstruction(rebuild, sized, **options) for sized in held_out]
        if prefix == "held_out" and is_main():
            write_report(run.path / REPORT_NAME, rows, clips=clips.name)
        return held_out_figures(rows, prefix)

    if loop.first_step == 0:
        figures = measured(loop.averaged.shortcut, "shortcut", psnr_only=True)
        if config.num_steps == 0:
            figures |= measured(loop.averaged.reconstruct, "held_out")
        run.log(0, figures)

    for step in loop.steps("training the VAE"):
        # 2. Rebuild crops through a sample of the posterior.
        frames, foreground, noise = stream.batch(step)
        watched = head_inputs(loop.engine.module.decoder) if added.present(step) else nullcontext()
        with watched as seen:
            reconstruction, posterior = loop.engine(
                frames, noise, checkpoint_chunk=config.checkpoint_chunk
            )
        kl = posterior.kl()
        metrics: dict[str, float] = {}
        if seen is None:
            loss = vae_loss(reconstruction, frames, kl, foreground, config.loss)
            update = loop.update(loss)

        # 3. With a perceptual or adversarial term: every pull on a leaf, one backward pass with their sum, the opponents' turn.
        else:
            picks = stream.picks(step, config.perceptual.frames_per_clip, frames.shape[2])
            example = Example(frames, foreground, picks.to(frames.device))
            pull = added.pull(step, reconstruction, example, loop.engine.module.decoder.head, seen)
            loss = pull.value + config.loss.kl * kl.detach()
            update = loop.update(pulled(reconstruction, pull.cotangent) + config.loss.kl * kl)
            metrics = pull.metrics | added.learn(step, reconstruction, example)

        # 4. Report, after the last step also on the held-out clips; save when due.
        metrics |= {"loss": mean_over_processes(loss), "kl": mean_over_processes(kl), **update}
        if loop.is_last(step):
            metrics |= measured(loop.averaged.reconstruct, "held_out")
        loop.end_step(step, metrics)

    # 5. Keep the averaged weights, and with them the scale of their latents.
    trained = loop.averaged
    trained.set_latent_statistics([posterior_means(trained, frames) for frames in training])
    return loop.save_model("vae", lambda folder: seal(trained.save(folder)))


def check_sizes(config: VAETrainConfig, vae: VideoVAE) -> None:
    """UserError unless the VAE takes clips of the refined size and of half of it."""
    fewest = 1 + vae.spec.temporal_ratio
    if config.num_frames < fewest:
        raise UserError(
            f"num_frames {config.num_frames}: the VAE learns from at least {fewest} frames"
        )
    vae.spec.check(config.num_frames, config.height, config.width)
    vae.spec.check(config.num_frames, config.height // 2, config.width // 2)
    side = min(config.crop, config.height // 2, config.width // 2)
    vae.spec.check(config.num_frames, side, side)
    networks = config.adversarial.discriminators
    needed = smallest_side(max(networks.image_layers, networks.video_layers))
    if config.adversarial.weight and side < needed:
        raise UserError(
            f"crops of {side} pixels are too small for these discriminators, which need {needed}; take fewer layers or larger crops"
        )


@torch.no_grad()
def posterior_means(vae: VideoVAE, frames: Tensor, *, limit: int = 128) -> Tensor:
    """Un-normalised latents [N, C, T, h, w] of at most `limit` uint8 clips."""
    chunks = frames[:limit].split(16)
    return torch.cat([vae.posterior(chunk.to(device()).float() / 255)[0].mean for chunk in chunks])


def held_out_figures(rows: Sequence[Reconstruction], prefix: str) -> dict[str, float]:
    """`<prefix>/psnr` and so on of clips at the refined size, `<prefix>/half_size_psnr` of those at half of it."""
    return {
        f"{prefix}/{size}{name}": value
        for size, row in zip(("", "half_size_"), rows, strict=True)
        for name, value in row.figures().items()
    }

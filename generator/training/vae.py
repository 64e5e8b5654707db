"""Training the VAE: shortcuts in closed form first, then the residual path on crops.

Everything random about sample i of step s is drawn from a generator seeded by its position in the stream, so a resumed run
continues bit for bit and N processes equal one. The linear shortcuts stay as they were fitted: trained together with the residual
path they lose more in the first hundred steps than they win back in the next two hundred.

What was measured on 480 plain toy clips at 64x64 (foreground PSNR of 64 held-out ones, one run each): PCA alone 20.7 dB; the decoder
reading the 3 x 3 x 2 latents around a patch, by ridge regression, 21.5 dB; the residual path adds 0.1 to 0.2 dB in 60 to 250 steps.
Failed: an L1 loss (its median is the background: no gain in 700 steps); a two-colours-and-mask head; regression on random ReLU
features (over-fits, 20.8 dB); a learning rate of 4e-3. The residual path can do far more (35 dB on four clips in 150 steps), but
not on hundreds of clips in a minute.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from generator.vae import VAEConfig, VideoVAE
from reelhf.clips import load_clip_folder, load_windows, resize_frames
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
from reelhf.run import RunFolder, seal

FOREGROUND_DISTANCE = 0.1
"""A pixel whose colour differs from its clip's median by more than this, in any channel, is foreground."""
_STREAM = 2_000_003  # separates the positions of neighbouring seeds


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


def median_colour(frames: Tensor) -> Tensor:
    """Per clip and channel, [B, 3, 1, 1, 1] of frames [B, 3, F, H, W]."""
    return frames.flatten(2).median(2).values[:, :, None, None, None]


def foreground_distance(frames: Tensor) -> Tensor:
    """Largest difference over channels from the clip's median colour, [B, 1, F, H, W]."""
    return (frames - median_colour(frames)).abs().amax(1, keepdim=True)


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
    """Batches of crops as a function of the step alone."""

    def __init__(self, config: VAETrainConfig, full: SizedClips, half: SizedClips) -> None:
        self.config, self.full, self.half = config, full, half
        if config.batch_size % world_size():
            raise UserError(
                f"batch_size {config.batch_size} cannot be split over {world_size()} processes"
            )
        self.local_batch_size = config.batch_size // world_size()

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's crops [b, 3, F, s, s] in [0, 1], their foreground distance, and the noise of the posterior."""
        first = step * self.config.batch_size + rank() * self.local_batch_size
        seeds = [self.config.seed * _STREAM + first + i for i in range(self.local_batch_size)]
        crops, medians = zip(*(self._crop(random.Random(seed)) for seed in seeds), strict=True)
        frames, median = torch.stack(crops).float() / 255, torch.stack(medians).float() / 255
        distance = (frames - median).abs().amax(1, keepdim=True)
        size, channels = frames.shape[-1] // 16, self.config.vae.channels
        shape = (channels, 1 + (frames.shape[2] - 1) // 4, size, size)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return frames.to(device()), distance.to(device()), torch.stack(noise).to(device())

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
        if config.augment:
            for axis in (1, 2, 3):  # reversed in time, upside down, mirrored
                crop = crop.flip(axis) if rng.random() < 0.5 else crop
            crop = crop.transpose(2, 3) if rng.random() < 0.5 else crop
            order = rng.sample(range(3), 3)
            crop, median = crop[order], median[order]
        return crop, median


def train_vae(config: VAETrainConfig, clips: Path, out: Path) -> Path:
    """Train a VAE on a folder of clips; resumes from the run folder's last checkpoint.

    Logs PSNR and foreground PSNR in dB of held-out clips at both sizes: of the shortcuts alone at step 0, and at the end.

    Returns: the VAE folder, `out/vae`.
    """
    init_distributed()
    seed_everything(config.seed)
    if config.num_frames < 5:
        raise UserError(f"num_frames {config.num_frames}: the VAE learns from at least 5 frames")
    half_size = (config.height // 2, config.width // 2)
    vae = VideoVAE(config.vae)
    vae.spec.check(config.num_frames, config.height, config.width)
    vae.spec.check(config.num_frames, *half_size)
    held_out, training = _load(config, clips)
    full, half = (SizedClips.of(frames) for frames in training)
    stream = CropStream(config, full, half)
    run = RunFolder.open(out, config)

    # 1. The linear shortcuts, in closed form; the weights under test at step 0.
    vae.init_shortcut([frames[:256].float() / 255 for frames in training], seed=config.seed)
    vae.encoder.shortcut.requires_grad_(False)
    vae.decoder.shortcut.requires_grad_(False)
    vae.to(device())
    ema = Ema(vae, config.ema_decay)
    engine = Engine(
        vae,
        config.optimizer,
        EngineConfig(zero_stage=config.zero_stage, micro_batch_size=stream.local_batch_size),
    )
    identity = content_hash(
        config.model_dump(mode="json", exclude={"num_steps", "save_every"}), len(full.frames)
    )
    start = _resume(run, engine, ema, identity)
    if start == 0:
        run.log(0, {f"shortcut/{k}": v for k, v in _measure(ema.module, held_out, True).items()})

    for step in track(range(start, config.num_steps), label="training the VAE"):
        # 2. Rebuild crops through a sample of the posterior.
        frames, foreground, noise = stream.batch(step)
        reconstruction, posterior = engine(frames, noise)
        kl = posterior.kl()
        loss = vae_loss(reconstruction, frames, kl, foreground, config.loss)
        engine.backward(loss)
        update = engine.step()
        ema.update(engine.module)

        # 3. Report and save when due.
        done = step + 1
        run.log(done, {"loss": _mean(loss), "kl": _mean(kl), **update})
        if done % config.save_every == 0 or done == config.num_steps:
            run.save_checkpoint(done, lambda folder: _save(folder, engine, ema, identity), keep=2)

    # 4. What the averaged weights do, and the scale of their latents.
    trained = ema.module
    assert isinstance(trained, VideoVAE)
    latents = [_encode_all(trained, frames) for frames in training]
    trained.set_latent_statistics(latents)
    run.log(
        config.num_steps,
        {f"held_out/{k}": v for k, v in _measure(trained, held_out, False).items()},
    )
    folder = run.path / "vae"
    if is_main():
        trained.save(folder)
        seal(folder)
    return folder


def _load(
    config: VAETrainConfig, clips: Path
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(held-out, training) windows, each uint8 at (refined size, half of it)."""
    windows = load_windows(
        load_clip_folder(clips),
        num_frames=config.num_frames,
        fps=config.fps,
        size=(config.height, config.width),
        max_windows=config.max_clips,
        seed=config.seed,
    )
    full = windows.frames
    if len(full) < 2:
        raise UserError(
            f"{len(full)} training window; expected at least 2, so that one is held out"
        )
    size = (config.height // 2, config.width // 2)
    half = torch.stack(
        [resize_frames(clip, size).mul(255).round().to(torch.uint8) for clip in full]
    )
    # a window of a held-out clip overlaps no training window: split by clip where there are several
    num_held_out = max(1, min(config.num_held_out, len(full) // 4))
    held = set(windows.entry_index[:num_held_out])
    is_held = torch.tensor([index in held for index in windows.entry_index])
    if is_held.all():
        is_held = torch.arange(len(full)) < num_held_out
    return (full[is_held], half[is_held]), (full[~is_held], half[~is_held])


@torch.no_grad()
def _encode_all(vae: VideoVAE, frames: Tensor, *, limit: int = 128) -> Tensor:
    """Un-normalised posterior means [N, C, T, h, w] of at most `limit` clips."""
    chunks = frames[:limit].split(16)
    return torch.cat([vae.posterior(chunk.to(device()).float() / 255)[0].mean for chunk in chunks])


@torch.no_grad()
def _measure(vae: VideoVAE, held_out: Sequence[Tensor], shortcut_only: bool) -> dict[str, float]:
    """PSNR and foreground PSNR in dB over clips at the refined size and at half of it."""
    figures = {}
    for name, clips in zip(("", "half_size_"), held_out, strict=True):
        squared = foreground_squared = count = 0.0
        for chunk in clips.split(8):
            frames = chunk.to(device()).float() / 255
            rebuilt = vae.shortcut(frames) if shortcut_only else vae.decode(vae.encode(frames))[0]
            error = (rebuilt.clamp(0, 1) - frames).square().mean(1, keepdim=True)
            foreground = foreground_distance(frames) > FOREGROUND_DISTANCE
            squared += error.mean().item() * len(chunk)
            foreground_squared += error[foreground].sum().item()
            count += foreground.sum().item()
        figures[f"{name}psnr"] = psnr(squared / len(clips))
        if count:
            figures[f"{name}foreground_psnr"] = psnr(foreground_squared / count)
    return figures


def _mean(value: Tensor) -> float:
    """Over processes."""
    return all_reduce_sum(value).item() / world_size()


def _save(folder: Path, engine: Engine, ema: Ema, identity: str) -> None:
    engine.save(folder / "engine", {"identity": identity})
    if is_main():
        torch.save(ema.state_dict(), folder / "ema.pt")


def _resume(run: RunFolder, engine: Engine, ema: Ema, identity: str) -> int:
    latest = run.latest_checkpoint()
    if latest is None:
        return 0
    step, folder = latest
    if engine.load(folder / "engine")["identity"] != identity:
        raise UserError(
            f"{run.path} holds a run of another configuration or other clips; choose another --out"
        )
    ema.load_state_dict(torch.load(folder / "ema.pt", map_location="cpu"))
    return step

"""The refiner's texture reward: which of two pictures is the original and which was degraded. No votes.

Sharp frames of real clips, cut to crops at full resolution, are degraded at random (blur, blocks, noise, halos); the aesthetic network learns to score
the original above its copy. Source: the texture reward of Seedream 2.0, 2503.07703, trained on degraded against original high-texture images.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, field_validator
from torch import Generator, Tensor

from reelhf.config import Config
from reelhf.errors import UserError
from rewards.aesthetic import AestheticConfig, AestheticReward
from rewards.calibration import fit_temperature, spread
from rewards.degrade import UNVOTED, degrade
from rewards.losses import bradley_terry_loss
from rewards.tokens import train_tokenizer

DIMENSION = "texture_quality"
LEAST_GAP = 0.15
"""Between the severities of two copies: less is not seen."""


class TextureConfig(Config):
    """How the texture reward learns."""

    model: AestheticConfig = AestheticConfig(dimensions=(DIMENSION,))
    """The image encoder, tiny or from a folder."""
    num_steps: PositiveInt = 300
    """Optimizer steps."""
    batch_size: PositiveInt = 16
    """Frames per step, each in two copies."""
    head_lr: PositiveFloat = 2e-3
    """Learning rate of the head; warms up over a tenth of the steps, then falls as a cosine."""
    backbone_lr: float = Field(1e-3, ge=0)
    """Learning rate of the encoder; 0 freezes it."""
    size: PositiveInt = 256
    """Height and width of the frames that crops are cut from."""
    crop: PositiveInt = 128
    """Side of a crop."""
    max_frames: PositiveInt = 1024
    """Frames used at most."""
    sharpest: float = Field(0.7, gt=0, le=1)
    """Share of the frames that is kept, those with most fine detail: a blurred original teaches nothing."""
    held_out: float = Field(0.2, gt=0, lt=1)
    """Share of the clips that measures instead of teaching."""
    seed: int = 0
    """Of weights, crops and degradations."""

    @field_validator("model")
    @classmethod
    def _scores_texture(cls, value: AestheticConfig) -> AestheticConfig:
        if value.dimensions != (DIMENSION,):
            raise ValueError(f"model.dimensions are {value.dimensions}; expected [{DIMENSION}]")
        return value


def train_texture(config: TextureConfig, clips: Path, out: Path) -> Path:
    """Train, calibrate and save `out`/texture; held-out accuracy per degradation goes to `out`/metrics.jsonl."""
    from reelhf.clips import load_folder_windows
    from reelhf.engine import device, seed_everything
    from reelhf.hashing import content_hash
    from reelhf.progress import track
    from reelhf.run import RunFolder

    run = RunFolder.open(out, config)
    windows = load_folder_windows(
        Path(clips),
        frame_shape=(1, config.size, config.size),
        fps=1.0,
        max_windows=config.max_frames,
        seed=config.seed,
    )
    learned, held = split_clips(windows.entry_index, config.held_out, config.seed)
    if not learned or not held:
        raise UserError(
            f"{clips} holds {len(set(windows.entry_index))} clips; expected two at least, one of them held out"
        )
    seed_everything(config.seed)
    generator = Generator().manual_seed(config.seed)
    model = AestheticReward(
        config.model, train_tokenizer(windows.captions, vocab_size=config.model.vocab_size)
    ).to(device())
    model.requires_grad_(True)
    model.backbone.requires_grad_(config.backbone_lr > 0)
    frames = sharpest(windows.frames[learned], config.sharpest)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model.head.parameters()), "lr": config.head_lr},
            {"params": list(model.backbone.parameters()), "lr": config.backbone_lr},
        ],
        betas=(0.9, 0.98),
    )
    warm = max(1, config.num_steps // 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, config.num_steps - warm)),
        ],
        [warm],
    )
    for step in track(range(config.num_steps), label="train texture", total=config.num_steps):
        rows = torch.randint(len(frames), (config.batch_size,), generator=generator)
        better, worse, gap = texture_pair(frames[rows].float() / 255, config.crop, generator)
        first, second = scores(model, torch.cat([better, worse])).chunk(2)
        loss = (bradley_terry_loss(first, second) * gap.to(first)).sum() / gap.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        right = float((first > second).float().mean())
        run.log(
            step, {"loss": float(loss.detach()), "accuracy": right, "gradient_norm": float(norm)}
        )
    model.freeze()
    run.log(config.num_steps, measure(model, windows.frames[held], config))
    model.data_hash = content_hash(config, windows.captions, windows.entry_index)
    return model.save(Path(out) / "texture").parent


def split_clips(entries: list[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Places of the windows that teach and of those that measure; windows of one clip stay together."""
    names = sorted(set(entries))
    order = torch.randperm(len(names), generator=Generator().manual_seed(seed)).tolist()
    held = {names[i] for i in order[: max(1, round(share * len(names)))]}
    return (
        [i for i, name in enumerate(entries) if name not in held],
        [i for i, name in enumerate(entries) if name in held],
    )


def sharpest(frames: Tensor, share: float) -> Tensor:
    """The share of frames [N, 3, 1, H, W] whose Laplacian is largest."""
    grey = frames.float().mean((1, 2))[:, None]
    kernel = grey.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    detail = F.conv2d(grey, kernel).square().mean((1, 2, 3))
    return frames[detail.argsort(descending=True)[: max(1, round(share * len(frames)))]]


def texture_pair(frames: Tensor, crop: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Two copies of a crop of each frame [N, 3, 1, H, W], the second degraded further: (better, worse, by how much [N]).

    In two of three pairs the better one is the original.
    """
    crop = min(crop, *frames.shape[-2:])
    top, left = (
        int(torch.randint(side - crop + 1, (), generator=generator)) for side in frames.shape[-2:]
    )
    frames = frames[..., top : top + crop, left : left + crop]
    for axis in (-2, -1):  # either way up, either way round
        turned = torch.rand(len(frames), generator=generator) < 0.5
        frames = torch.where(turned.view(-1, 1, 1, 1, 1), frames.flip(axis), frames)
    kind = int(torch.randint(2**31 - 1, (), generator=generator))  # one way for both copies
    low, high = torch.rand(2, len(frames), generator=generator).sort(dim=0).values
    low = low * (torch.rand(len(frames), generator=generator) < 1 / 3)
    low = low * (1 - LEAST_GAP)
    high = torch.maximum(high, low + LEAST_GAP)
    better, worse = (
        degrade(frames, DIMENSION, severity, Generator().manual_seed(kind), ways=UNVOTED)
        for severity in (low, high)
    )
    return better, worse, high - low


def scores(model: AestheticReward, frames: Tensor) -> Tensor:
    """The texture logit [N] of single frames [N, 3, 1, H, W] in [0, 1]."""
    device = next(model.parameters()).device
    return model.score(
        frames.to(device), selection=model.select(1, 1.0), fps=1.0, prompts=[""] * len(frames)
    ).values[:, 0]


@torch.no_grad()
def measure(model: AestheticReward, frames: Tensor, config: TextureConfig) -> dict[str, float]:
    """Held-out accuracy of originals against each degradation at severity 0.6; sets mean, std, range and temperature."""
    generator = Generator().manual_seed(config.seed + 1)
    crop = min(config.crop, *frames.shape[-2:])
    originals = frames[..., :crop, :crop].float() / 255
    clean = scores(model, originals)
    out, gaps = {}, []
    for name, function in UNVOTED[DIMENSION].items():
        severity = torch.full((len(originals),), 0.6)
        gaps.append((clean - scores(model, function(originals, severity, generator))).cpu())
        out[f"held_out/{name}"] = float((gaps[-1] > 0).float().mean())
    everything = torch.cat([clean.cpu(), *(clean.cpu() - gap for gap in gaps)])
    for name, value in zip(
        ("mean", "std", "low", "high"), spread(everything[:, None]), strict=True
    ):
        getattr(model, name).copy_(value)
    model.temperature.fill_(fit_temperature(torch.cat(gaps)))
    out["held_out/accuracy"] = float((torch.cat(gaps) > 0).float().mean())
    return out

"""`reelhf generator eval`: what a generator does with captioned clips that it has not seen, as figures.

A base: the error of its velocity, and whether a first frame that it is given comes back. A refiner: whether its clips show the
low-resolution clips they were made from, and how close they come to the real ones, beside plain enlargement.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from generator.checkpoint import DiTGenerator, upsample_frames
from generator.quality import SSIM_WINDOW, psnr, ssim
from generator.refiner import downsample_frames, low_res_consistency, low_res_size
from generator.sampling import refine_frames, sample_frames
from generator.training.denoiser import validation_loss
from generator.training.latents import encode_clips
from reelhf.clips import ClipTensors
from reelhf.run import write_text_atomic


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    name: str
    value: float
    unit: str
    meaning: str

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g} {self.unit}: {self.meaning}".replace(" :", ":")


def mean_psnr(clips: Tensor, others: Tensor) -> float:
    """Over clips, in dB."""
    errors = (clips - others).square().mean((1, 2, 3, 4))
    return sum(psnr(error) for error in errors.tolist()) / len(errors)


@torch.no_grad()
def evaluate_base(backbone: DiTGenerator, windows: ClipTensors, *, batch_size: int) -> list[Figure]:
    """Of a base generator on clips of its size, uint8 [N, 3, F, H, W]."""
    data = encode_clips(backbone, windows, batch_size=batch_size)
    weights = torch.ones(backbone.spec.channels, device=backbone.device)
    losses = [
        validation_loss(backbone, backbone.denoiser, data.rows(rows), weights) * len(rows)
        for rows in _parts(len(data), batch_size)
    ]
    figures = [Figure("velocity_error", sum(losses) / len(data), "", "of latents, lower is better")]
    if backbone.frame_shape[0] == 1:
        return figures
    kept, made = [], []
    for rows in _parts(len(data), batch_size):
        first = windows.frames[list(rows), :, 0].float() / 255
        task = backbone.frames_task({0: first.to(backbone.device)}, *backbone.frame_shape)
        captions = [windows.captions[row] for row in rows]
        made.append(sample_frames(backbone, captions, list(rows), task=task)[:, :, :1])
        kept.append(first[:, :, None])
    through_vae = torch.cat(
        [backbone.decode(backbone.encode(frame))[0].clamp(0, 1).cpu() for frame in kept]
    )
    first_frames = torch.cat(kept)
    return [
        *figures,
        Figure(
            "first_frame_psnr",
            mean_psnr(torch.cat(made), first_frames),
            "dB",
            "of a given first frame",
        ),
        Figure(
            "first_frame_psnr_of_vae",
            mean_psnr(through_vae, first_frames),
            "dB",
            "what the VAE allows",
        ),
    ]


@torch.no_grad()
def evaluate_refiner(
    refiner: DiTGenerator, windows: ClipTensors, *, factor: float, batch_size: int
) -> list[Figure]:
    """Of a refiner on clips of its size, made `factor` times smaller in their sides and enlarged again."""
    height, width = refiner.frame_shape[1:]
    size = low_res_size(height, width, factor, refiner.spec.spatial_ratio)
    consistent, near, near_plain, alike, alike_plain = [], [], [], [], []
    consistent_vae = []
    for rows in _parts(len(windows.frames), batch_size):
        real = windows.frames[list(rows)].float() / 255
        small = downsample_frames(real, *size)
        captions = [windows.captions[row] for row in rows]
        refined = refine_frames(refiner, small, captions, list(rows), batch_size=batch_size)
        plain = upsample_frames(small, height, width)
        coded = refiner.decode(refiner.encode(plain))[0].clamp(0, 1).cpu()
        consistent += low_res_consistency(refined, small).tolist()
        consistent_vae += low_res_consistency(coded, small).tolist()
        for clips, psnrs, ssims in ((refined, near, alike), (plain, near_plain, alike_plain)):
            psnrs.append(mean_psnr(clips, real) * len(real))
            if min(height, width) >= SSIM_WINDOW:
                ssims += ssim(clips, real).mean(1).tolist()
    count = len(windows.frames)
    shape = f"{size[0]} x {size[1]}"
    figures = [
        Figure(
            "low_res_psnr",
            sum(consistent) / count,
            "dB",
            f"refined clips brought back to {shape}, against what they were made from",
        ),
        Figure(
            "low_res_psnr_of_vae",
            sum(consistent_vae) / count,
            "dB",
            "the same of plain enlargement through the VAE",
        ),
        Figure("psnr", sum(near) / count, "dB", "refined against real clips"),
        Figure(
            "psnr_of_enlargement",
            sum(near_plain) / count,
            "dB",
            "bicubic enlargement against real clips",
        ),
    ]
    if alike:
        figures += [
            Figure("ssim", sum(alike) / count, "", "refined against real clips"),
            Figure(
                "ssim_of_enlargement",
                sum(alike_plain) / count,
                "",
                "bicubic enlargement against real clips",
            ),
        ]
    return figures


def write_figures(path: Path, figures: list[Figure], **about: object) -> None:
    """As JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    card = {**about, "figures": [asdict(figure) for figure in figures]}
    write_text_atomic(path, json.dumps(card, indent=2) + "\n")


def _parts(count: int, size: int) -> list[range]:
    return [range(first, min(first + size, count)) for first in range(0, count, size)]

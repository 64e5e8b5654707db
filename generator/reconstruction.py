"""How well a VAE rebuilds clips it has not seen: measured, printed, kept as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from generator.quality import SSIM_WINDOW, psnr, ssim, temporal_flicker
from generator.training.crops import FOREGROUND_DISTANCE, foreground_distance
from reelhf.engine import device

REPORT_NAME = "vae_report.json"


@dataclass(frozen=True)
class Reconstruction:
    """Of clips of one size."""

    clips: int
    num_frames: int
    height: int
    width: int
    psnr: float
    """dB, of all pixels of all clips."""
    foreground_psnr: float | None
    """dB, of the pixels unlike their clip's median colour; None where there are none."""
    ssim: float | None
    """Mean over frames; None for frames smaller than its window."""
    flicker: float | None
    """Mean of `generator.quality.temporal_flicker`, in levels of 255; None for images."""

    def figures(self) -> dict[str, float]:
        """The measured numbers by name."""
        names = ("psnr", "foreground_psnr", "ssim", "flicker")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def __str__(self) -> str:
        foreground, similarity, flicker = self.foreground_psnr, self.ssim, self.flicker
        parts = [
            f"{self.clips} clips of {self.num_frames} frames at {self.height}x{self.width}: PSNR {self.psnr:.2f} dB",
            "" if foreground is None else f"foreground {foreground:.2f} dB",
            "" if similarity is None else f"SSIM {similarity:.4f}",
            "" if flicker is None else f"flicker {flicker:.2f} of 255",
        ]
        return ", ".join(part for part in parts if part)


@torch.no_grad()
def measure_reconstruction(
    rebuild: Callable[[Tensor], Tensor], clips: Tensor, *, psnr_only: bool = False, batch: int = 8
) -> Reconstruction:
    """Of uint8 clips [N, 3, F, H, W] that `rebuild` codes and decodes, [B, 3, F, H, W] in [0, 1] -> the same, clamped here."""
    count, _, num_frames, height, width = clips.shape
    squared = foreground_squared = foreground_count = 0.0
    similarities, flickers = [], []
    for chunk in clips.split(batch):
        frames = chunk.to(device()).float() / 255
        rebuilt = rebuild(frames).clamp(0, 1)
        error = (rebuilt - frames).square().mean(1, keepdim=True)
        foreground = foreground_distance(frames) > FOREGROUND_DISTANCE
        squared += error.mean().item() * len(chunk)
        foreground_squared += error[foreground].sum().item()
        foreground_count += foreground.sum().item()
        if not psnr_only and min(height, width) >= SSIM_WINDOW:
            similarities.append(ssim(frames, rebuilt))
        if not psnr_only and num_frames > 1:
            flickers.append(temporal_flicker(frames, rebuilt))
    return Reconstruction(
        *(count, num_frames, height, width),
        psnr=psnr(squared / count),
        foreground_psnr=psnr(foreground_squared / foreground_count) if foreground_count else None,
        ssim=torch.cat(similarities).mean().item() if similarities else None,
        flicker=255 * torch.cat(flickers).mean().item() if flickers else None,
    )


def write_report(path: Path, rows: Sequence[Reconstruction], **about: object) -> Path:
    """The rows and what they are about as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {**about, "reconstructions": [asdict(row) for row in rows]}
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path


def read_report(path: Path) -> list[Reconstruction]:
    """The rows that `write_report` kept."""
    return [
        Reconstruction(**row)
        for row in json.loads(path.read_text(encoding="utf-8"))["reconstructions"]
    ]

"""A manifest of toy clips of several lengths, pictures among them, and a run through three tiny stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import torch

from generator.data.buckets import BucketConfig
from generator.training.denoiser import DenoiserTrainConfig
from reelhf.video import write_video

SMALL = {"area": 1024, "num_frames": [5], "fps": 8, "aspects": [1.0], "channels": 8}
LONG = {"area": 1024, "num_frames": [5, 9], "fps": 8, "aspects": [1.0, 2.0], "channels": 8}
STAGED: dict[str, Any] = {
    "architecture": {"width": 24, "num_heads": 2, "num_pairs": 1},
    "num_frames": 9,
    "height": 32,
    "width": 32,
    "num_validation": 4,
    "optimizer": {"lr": 2e-3},
    "ema_decay": 0.5,
    "sampler_steps": 2,
    "save_every": 2,
    "validate_every": 3,
    "sample_every": 100,
    "num_samples": 0,
    "sigma": {"shift": 2.0, "base_tokens": 8},
    "micro_batches": 2,
    "balance": "flops",
    "stages": [
        {
            "name": "pictures",
            "buckets": SMALL,
            "num_steps": 3,
            "micro_batch_tokens": 16,
            "warmup_steps": 2,
            "tasks": {"text_to_image": 1.0, "image_to_video": 0.0},
        },
        {
            "name": "clips",
            "buckets": LONG,
            "num_steps": 5,
            "micro_batch_tokens": 48,
            "lr": 1e-3,
            "final_lr": 1e-4,
            "tasks": {"text_to_image": 0.25, "image_to_video": 0.3},
            "captions": {"caption": 1.0, "long_caption": 1.0, "motion_caption": 1.0},
        },
    ],
}


def staged(**changes: Any) -> DenoiserTrainConfig:
    return DenoiserTrainConfig.model_validate({**STAGED, **changes})


def write_manifest(folder: Path, *, pictures: int = 4) -> Path:
    """Twelve clips of 5 to 20 frames, two aspects, a few that fit nowhere, and pictures."""
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for index in range(12):
        frames = (5, 9, 20)[index % 3]
        width = 64 if index % 4 == 0 else 32
        colour = torch.rand(3, 1, 1, 1, generator=generator)
        ramp = torch.linspace(0, 1, frames)[None, :, None, None]
        clip = (colour * (0.4 + 0.6 * ramp)).expand(3, frames, 32, width)
        write_video(folder / f"{index:02d}.mp4", clip, 8.0)
        row = {"path": f"{index:02d}.mp4", "caption": f"colour {index} grows brighter"}
        if index % 2:
            row |= {"long_caption": f"a plain field of colour {index} that grows brighter steadily"}
        if index % 3:
            row |= {"motion_caption": "it brightens"}
        row |= {"tags": ["odd" if index % 2 else "even"]}
        rows.append(row)
    for index in range(pictures):
        name = f"picture{index}.png"
        save_picture(folder / name, torch.rand(32, 32, 3, generator=generator))
        rows.append({"path": name, "caption": f"noise number {index}", "tags": ["pictures"]})
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder / "manifest.jsonl"


def save_picture(path: Path, pixels: torch.Tensor) -> None:
    frame = av.VideoFrame.from_ndarray((pixels * 255).byte().numpy(), format="rgb24")
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = frame.height, frame.width, "rgb24"
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def buckets(values: dict[str, Any]) -> BucketConfig:
    return BucketConfig.model_validate(values)

"""Two processes against one, and a stopped run against one that was not: the same losses, gradients and weights.

    OMP_NUM_THREADS=1 python benchmarks/two_processes.py [--steps 20] [--out DIR]

A tiny base is trained in stages from rendered clips through the command line: alone; on two processes with ZeRO-0 to 3; on two processes
that share every clip (sequence parallelism), with ZeRO-0 and 2; and alone, stopped in the middle and begun again. Same global batches and
seeds, float32. On GPUs the same, if there are two.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from generator.text import TextEncoder, TextEncoderConfig
from generator.toyworld import ToyDatasetConfig, prompt_split, render_dataset
from generator.vae import VAEConfig, VideoVAE
from reelhf.run import read_metrics, seal

BUCKETS = {"area": 1024, "num_frames": [5, 9], "fps": 8, "aspects": [1.0]}


def config(steps: int, **changes: Any) -> dict[str, Any]:
    return {
        "stage": "base",
        "architecture": {"width": 48, "num_heads": 4, "num_pairs": 2},
        "num_frames": 9, "height": 32, "width": 32, "fps": 8, "num_validation": 4,
        "optimizer": {"lr": 2e-3}, "num_samples": 0, "validate_every": 1000, "save_every": steps // 2,
        "sigma": {"shift": 3.0, "base_tokens": 12}, "micro_batches": 4, "balance": "flops",
        "stages": [
            {"name": "pictures", "buckets": BUCKETS, "num_steps": steps // 2, "micro_batch_tokens": 48,
             "tasks": {"text_to_image": 1.0, "image_to_video": 0.0}},
            {"name": "clips", "buckets": BUCKETS, "num_steps": steps - steps // 2, "micro_batch_tokens": 96},
        ],
        **changes,
    }  # fmt: skip


def prepare(folder: Path) -> list[str]:
    """Clips, encoders and latents; the words that name them."""
    clips = render_dataset(ToyDatasetConfig(num_clips=48, num_frames=9, size=64), folder / "clips")
    torch.manual_seed(0)
    vae = VideoVAE(VAEConfig(encoder_width=32, decoder_width=32, decoder_fine_width=16)).eval()
    text = TextEncoder.build(
        TextEncoderConfig(hidden_size=32, num_layers=2, mlp_size=64), prompt_split("train", 32)
    ).eval()
    seal(vae.save(folder / "vae"))
    seal(text.save(folder / "text"))
    (folder / "config.json").write_text(json.dumps(config(2)))
    words = ["--vae", str(folder / "vae"), "--text", str(folder / "text")]
    launch(1, ["data", "encode", str(folder / "config.json"), "--clips", str(clips), *words, "--out", str(folder / "latents")])  # fmt: skip
    return ["--data", str(folder / "latents"), *words]


def launch(processes: int, words: list[str]) -> None:
    start = [sys.executable, "-m", "reelhf"]
    if processes > 1:
        start = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={processes}", "-m", "reelhf"),
        ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(
        [*start, "generator", *words], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])


def train(
    folder: Path, parts: list[str], name: str, processes: int, steps: int, **changes: Any
) -> Path:
    file, out = folder / f"{name}.json", folder / name
    file.write_text(json.dumps(config(steps, **changes)))
    launch(processes, ["train", str(file), *parts, "--out", str(out)])
    return out


def differences(one: Path, other: Path) -> tuple[float, float, float]:
    """Largest relative difference of a loss and of a gradient norm, and of a weight in units of its tensor's largest."""
    first, second = read_metrics(one), read_metrics(other)
    assert len(first) == len(second)
    of_key = {
        key: max(abs(b[key] / a[key] - 1) for a, b in zip(first, second, strict=True))
        for key in ("loss", "grad_norm")
    }
    weights, others = (
        load_file(run / "generator" / "denoiser.safetensors") for run in (one, other)
    )
    moved = max(
        ((others[name] - value).abs().max() / value.abs().max().clamp(min=1e-6)).item()
        for name, value in weights.items()
    )
    return of_key["loss"], of_key["grad_norm"], moved


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="kept there; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        parts = prepare(folder)
        one = train(folder, parts, "one", 1, options.steps)
        print(f"{options.steps} steps; largest differences from one process\n")
        print("| run | loss | gradient norm | weights |\n|---|---|---|---|")
        runs = [(f"two processes, ZeRO-{stage}", {"zero_stage": stage}) for stage in range(4)]
        runs += [
            (f"two processes share every clip, ZeRO-{s}", {"zero_stage": s, "sequence_parallel": 2})
            for s in (0, 2)
        ]
        for index, (label, changes) in enumerate(runs):
            other = train(folder, parts, f"two_{index}", 2, options.steps, **changes)
            found = " | ".join(f"{value:.1e}" for value in differences(one, other))
            print(f"| {label} | {found} |", flush=True)
        again = train(folder, parts, "again", 1, options.steps)
        stop_in_the_middle(again, options.steps // 2)
        again = train(folder, parts, "again", 1, options.steps)
        found = " | ".join(f"{value:.1e}" for value in differences(one, again))
        print(f"| one process, resumed at step {options.steps // 2} | {found} |")


def stop_in_the_middle(run: Path, step: int) -> None:
    """Leave what a kill after that step's checkpoint would have left."""
    import shutil

    shutil.rmtree(run / "generator")
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.partition("_")[2]) > step:
            shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main()

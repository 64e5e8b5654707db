"""Real footage through a VAE: trained a little on some windows, measured on others. PSNR, foreground PSNR, SSIM, flicker.

    OMP_NUM_THREADS=1 python benchmarks/vae_footage.py --clips DIR [--config configs/generator/vae_toy.yaml] [KEY=VALUE]...

Prints the linear shortcuts alone, and the trained VAE, at both sizes; a GPU is used where there is one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from generator.training.vae import VAETrainConfig, train_vae
from reelhf.config import load_config
from reelhf.run import read_metrics
from reelhf.tables import format_table

NAMES = ("psnr", "foreground_psnr", "ssim", "flicker")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("keys", nargs="*", help="KEY=VALUE of the config")
    parser.add_argument("--clips", type=Path, required=True, help="folder of captioned clips")
    parser.add_argument("--config", default="configs/generator/vae_toy.yaml")
    parser.add_argument("--out", type=Path, help="run folder; a temporary one by default")
    options = parser.parse_args()
    config = load_config(VAETrainConfig, options.config, ["max_clips=64", *options.keys])
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    with tempfile.TemporaryDirectory() as temporary:
        started = time.perf_counter()
        run = train_vae(config, options.clips, options.out or Path(temporary) / "run").parent
        seconds = time.perf_counter() - started
        rows = read_metrics(run)
    figures = {**rows[0], **rows[-1]}
    table = []
    for way, prefix in (("shortcuts", "shortcut"), ("trained", "held_out")):
        for size, shape in (("", (config.height, config.width)), ("half_size_", (config.height // 2, config.width // 2))):  # fmt: skip
            values = [figures.get(f"{prefix}/{size}{name}") for name in NAMES]
            shown = ["not measured" if value is None else f"{value:.3f}" for value in values]
            table.append([way, f"{config.num_frames} x {shape[0]} x {shape[1]}", *shown])
    print(f"{where}, torch {torch.__version__}, {config.num_steps} steps, {seconds:.0f} s in all\n")
    print(
        format_table(
            ["VAE", "size", "PSNR, dB", "foreground, dB", "SSIM", "flicker, of 255"], table
        )
    )


if __name__ == "__main__":
    main()

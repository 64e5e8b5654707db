"""Factorised against full attention: FLOPs counted by torch, FLOPs in closed form, and time, against tokens.

    python benchmarks/dit_flops.py                   # everything this machine can do; a GPU is used where there is one
    python benchmarks/dit_flops.py --device cpu --repeats 5

1. Does the formula of `reelhf plan` equal what torch counts, for every preset at every size?
2. Closed form at 4k to 109k tokens: one spatial and one temporal layer against two layers of full attention of the same width.
3. The same layers timed, both kinds in turns, median of the repeats: packed attention on a GPU, which is the flash kernel for both kinds,
   padded and masked on a CPU. A CPU takes the small sizes only; what was left out is said.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from generator.blocks import SpatialBlock, TemporalBlock, window_map, window_packing
from generator.dit import DiTConfig
from generator.packed import FramePacking, WindowPacking
from generator.plan.devices import find_device
from generator.plan.flops import (
    LatentGrid,
    forward_flops,
    full_layer_flops,
    spatial_layer_flops,
    temporal_layer_flops,
)
from generator.plan.memory import dit_inputs, meta_dit
from generator.plan.planner import PRESETS, SIZES, Plan, frame_size, read_training_config
from generator.rope import grid_positions, rope_angles, text_positions
from generator.training.denoiser import DenoiserTrainConfig

TEXT_TOKENS = 512
GRIDS = {  # tokens -> latent frames, height, width; the last is 121 frames of 704x1280
    "4k": LatentGrid(16, 16, 16),
    "16k": LatentGrid(16, 32, 32),
    "65k": LatentGrid(16, 64, 64),
    "109k": LatentGrid(31, 44, 80),
}
CPU_GRIDS = ("4k", "16k")
TOLERANCE = 0.01
WIDTHS = {"cpu": 128, "cuda": 3072}
HEAD_DIM = {"cpu": 64, "cuda": 128}


def configured(width: int, head_dim: int) -> DiTConfig:
    return DiTConfig(
        width=width, num_heads=width // head_dim, text_mlp_ratio=4.0, window=(4, 4), rope_theta=1e4
    )


def compare_with_torch() -> bool:
    """Every preset at every size on meta tensors; whether all are within the tolerance."""
    print(
        "| preset | size | tokens | formula, TFLOP | torch, TFLOP | ratio |\n|---|---|---|---|---|---|"
    )
    worst = 0.0
    for preset in PRESETS:
        for size in SIZES:
            config = read_training_config([preset], size)
            assert isinstance(config, DenoiserTrainConfig)
            plan = Plan(config, find_device("h100"), 1, TEXT_TOKENS, 1)
            architecture, grid = plan.architecture, plan.grid
            expected = forward_flops(architecture, grid, TEXT_TOKENS).total
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                meta_dit(architecture)(*dit_inputs(architecture, grid, TEXT_TOKENS))
            counted = counter.get_total_flops()
            worst = max(worst, abs(expected / counted - 1))
            print(
                f"| {preset} | {size} ({'x'.join(map(str, frame_size(size)))}) | {grid.tokens:,} "
                f"| {expected / 1e12:,.3f} | {counted / 1e12:,.3f} | {expected / counted:.5f} |"
            )
    print(f"\nlargest difference {worst:.5%}, allowed {TOLERANCE:.0%}\n")
    return worst <= TOLERANCE


def pair_flops(config: DiTConfig, grid: LatentGrid) -> tuple[float, float]:
    """Of a spatial and a temporal layer (unshifted), and of two layers of full attention."""
    spatial = spatial_layer_flops(config, grid, TEXT_TOKENS)
    temporal = temporal_layer_flops(config, grid, shifted=False)
    return spatial.total + temporal.total, 2 * full_layer_flops(config, grid, TEXT_TOKENS).total


def print_closed_form(width: int, head_dim: int) -> None:
    print(f"width {width}, {TEXT_TOKENS} text tokens, two layers each, forward, one clip\n")
    print(
        "| tokens | grid | factorised, TFLOP | full attention, TFLOP | full / factorised |\n|---|---|---|---|---|"
    )
    for grid in GRIDS.values():
        factorised, full = pair_flops(configured(width, head_dim), grid)
        print(
            f"| {grid.tokens:,} | {' x '.join(map(str, grid))} | {factorised / 1e12:,.3f} | {full / 1e12:,.3f} | {full / factorised:.2f} |"
        )
    print()


@dataclass(frozen=True)
class Layers:
    """Inputs and weights of both kinds of layer at one size."""

    spatial: SpatialBlock
    temporal: TemporalBlock
    vision: Tensor
    text: Tensor
    shared: Tensor
    grid_angles: Tensor
    text_angles: Tensor
    mask: Tensor
    windows: tuple[Tensor, Tensor, Tensor]
    packed: tuple[FramePacking, WindowPacking, FramePacking] | None
    """Of the frames, of the windows, and of the clip as one frame."""

    def factorised(self) -> Tensor:
        frames = self.vision.shape[1]
        vision, _ = self.spatial(
            self.vision,
            self.text,
            self.shared.expand(-1, frames, -1, -1, -1),
            self.shared[:, 0],
            self.grid_angles.flatten(1, 2)[None],
            self.text_angles,
            self.mask,
            packing=self.packed and self.packed[0],
        )
        return self.temporal(
            vision,
            self.shared.expand(-1, frames, -1, -1, -1),
            self.grid_angles.flatten(0, 2),
            *self.windows,
            packing=self.packed and self.packed[1],
        )

    def full(self) -> Tensor:
        """Two layers over the whole clip as one frame."""
        vision, text = self.vision.flatten(1, 2)[:, None], self.text
        for _ in range(2):
            vision, text = self.spatial(
                vision,
                text,
                self.shared,
                self.shared[:, 0],
                self.grid_angles.flatten(0, 2)[None, None],
                self.text_angles,
                self.mask,
                packing=self.packed and self.packed[2],
            )
        return vision


def make_layers(config: DiTConfig, grid: LatentGrid, device: torch.device) -> Layers:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    width, heads = config.width, config.num_heads
    ratios = config.mlp_ratio, config.text_mlp_ratio
    angles = {"head_dim": width // heads, "theta": config.rope_theta}

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def placed(module: nn.Module) -> nn.Module:
        return module.to(device=device, dtype=dtype)

    mask = torch.ones(1, 1, TEXT_TOKENS, dtype=torch.bool, device=device)
    place = (*grid, config.window, False, device)
    packed = None
    if device.type == "cuda":
        packed = (
            FramePacking.of(mask, grid.frames, grid.positions),
            window_packing(1, *place),
            FramePacking.of(mask, 1, grid.tokens),
        )
    return Layers(
        spatial=placed(SpatialBlock(width, heads, *ratios)),
        temporal=placed(TemporalBlock(width, heads, config.mlp_ratio)),
        vision=noise(1, grid.frames, grid.positions, width),
        text=noise(1, TEXT_TOKENS, width),
        shared=0.1 * noise(1, 1, 1, 6, width),
        grid_angles=rope_angles(grid_positions(*grid, device), **angles),
        text_angles=rope_angles(text_positions(TEXT_TOKENS, device), **angles),
        mask=mask,
        windows=window_map(*place),
        packed=packed,
    )


def timed(run: Callable[[], Tensor], device: torch.device, *, backward: bool) -> float:
    """Seconds of one pass."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = run()
        if backward:
            out.float().square().mean().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def print_times(device: torch.device, repeats: int) -> None:
    width, head_dim = WIDTHS[device.type], HEAD_DIM[device.type]
    config = configured(width, head_dim)
    names = list(GRIDS) if device.type == "cuda" else list(CPU_GRIDS)
    passes = (False, True) if device.type == "cuda" else (False,)
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s), float32"
    )
    print(
        f"{where}, torch {torch.__version__}, width {width}, {TEXT_TOKENS} text tokens, two layers, one clip\n"
    )
    print(
        "| tokens | pass | factorised, s (least to most) | full attention, s (least to most) | time, full / factorised "
        "| FLOPs, full / factorised | factorised, GFLOP/s |\n|---|---|---|---|---|---|---|"
    )
    for name in names:
        grid = GRIDS[name]
        layers = make_layers(config, grid, device)
        flops = pair_flops(config, grid)
        for backward in passes:
            both = (layers.factorised, layers.full)
            for run in both:
                timed(run, device, backward=backward)  # warm: caches, index maps
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(repeats):
                for run, seconds in zip(both, times, strict=True):
                    seconds.append(timed(run, device, backward=backward))
            factorised, full = (statistics.median(seconds) for seconds in times)
            spread = [f"{statistics.median(s):.3f} ({min(s):.3f} to {max(s):.3f})" for s in times]
            speed = "" if backward else f"{flops[0] / factorised / 1e9:,.0f}"
            print(
                f"| {grid.tokens:,} | {'forward and backward' if backward else 'forward'} | {spread[0]} | {spread[1]} "
                f"| {full / factorised:.2f} | {flops[1] / flops[0]:.2f} | {speed} |",
                flush=True,
            )
    left_out = [f"{GRIDS[name].tokens:,}" for name in GRIDS if name not in names]
    if left_out:
        print(
            f"\nleft out, too long without a GPU: {' and '.join(left_out)} tokens, backward passes, width {WIDTHS['cuda']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(here if arguments.device == "auto" else arguments.device)
    agrees = compare_with_torch()
    for kind in ("cuda", "cpu"):
        print_closed_form(WIDTHS[kind], HEAD_DIM[kind])
    print_times(device, arguments.repeats)
    raise SystemExit(0 if agrees else 1)


if __name__ == "__main__":
    main()

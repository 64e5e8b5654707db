"""A training step of a preset: seconds, MFU and peak memory, by how layers are recomputed, compiled and attended.

    python benchmarks/dit_training.py                        # a GPU: the 1b preset at 480p in bfloat16; a CPU: the tiny one, nine frames of it
    python benchmarks/dit_training.py --preset 7b --size 720p --zero-stage 3
    torchrun --nproc_per_node 8 benchmarks/dit_training.py --cell true,false,packed --clips 1     # one cell on several GPUs

A step is what `reelhf generator train` does with latents in memory: forward, backward, AdamW by DeepSpeed, the average of the weights. Every
cell is a process of its own. MFU: three forward passes of the clips by the closed form, over the step's time and the data sheet's peak.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product

import torch

from generator.dit import DiT, DiTConfig
from generator.flow import add_noise, flow_matching_loss
from generator.plan.devices import peak_flops_here
from generator.plan.flops import LatentGrid, model_flops, training_flops
from generator.plan.memory import dit_inputs
from generator.plan.planner import Plan, read_training_config
from generator.training.denoiser import DenoiserTrainConfig
from reelhf.engine import Ema, Engine, EngineConfig, device, init_distributed, is_main, world_size

CHECKPOINTING: dict[str, bool | str] = {"false": False, "attention": "attention", "true": True}
GIB = 2**30


@dataclass(frozen=True)
class Cell:
    """How layers are computed."""

    checkpointing: str
    compile: bool
    attention: str

    @staticmethod
    def read(words: str) -> Cell:
        checkpointing, compiled, attention = words.split(",")
        return Cell(checkpointing, compiled == "true", attention)

    def __str__(self) -> str:
        return f"{self.checkpointing},{str(self.compile).lower()},{self.attention}"


def training(
    options: argparse.Namespace, cell: Cell
) -> tuple[DenoiserTrainConfig, DiTConfig, LatentGrid]:
    """The preset's config and architecture, and the latents of its clips."""
    words = [options.preset, *options.keys]
    config = read_training_config(words, options.size)
    assert isinstance(config, DenoiserTrainConfig)
    spec = config.architecture.channels
    grid = LatentGrid(1 + (config.num_frames - 1) // 4, config.height // 16, config.width // 16)
    how = {
        "checkpointing": CHECKPOINTING[cell.checkpointing],
        "compile": cell.compile,
        "attention": cell.attention,
        "channels": spec,
    }
    return config, config.architecture.model_copy(update=how), grid


def measure(options: argparse.Namespace, cell: Cell) -> dict[str, float]:
    """Median seconds of a step of this process, and its peak memory in GiB."""
    config, architecture, grid = training(options, cell)
    init_distributed()
    torch.manual_seed(0)
    model = DiT(architecture)
    on_gpu = device().type == "cuda"
    bf16 = config.bf16 and on_gpu
    engine_config = EngineConfig(
        zero_stage=options.zero_stage, bf16=bf16, micro_batch_size=options.clips
    )
    ema = Ema(model.to(device()), config.ema_decay)
    engine = Engine(model, config.optimizer, engine_config)
    inputs = dit_inputs(
        architecture, grid, options.text_tokens, batch=options.clips, device=str(device())
    )
    clean, noise = (torch.randn_like(inputs[0]) for _ in range(2))
    sigma = torch.rand(options.clips, device=device())
    seconds = []
    for _ in range(options.warmup + options.steps):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        velocity = engine(add_noise(clean, noise, sigma), sigma, *inputs[2:])
        engine.backward(flow_matching_loss(velocity, clean, noise).mean())
        engine.step()
        ema.update(engine.module)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    step = statistics.median(seconds[options.warmup :])
    useful = options.clips * model_flops(architecture, grid, options.text_tokens)
    executed = options.clips * training_flops(architecture, grid, options.text_tokens)
    peak = peak_flops_here(bf16)
    return {
        "seconds": step,
        "least": min(seconds[options.warmup :]),
        "most": max(seconds[options.warmup :]),
        "first": seconds[0],
        "useful": useful / step,
        "executed": executed / step,
        "mfu": float("nan") if peak is None else useful / step / peak,
        "hfu": float("nan") if peak is None else executed / step / peak,
        "gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else float("nan"),
        "tokens": world_size() * options.clips * grid.tokens / step,
    }


def in_own_process(options: argparse.Namespace, cell: Cell) -> dict[str, float] | str:
    """The figures of a cell, or in a few words why there are none."""
    words = [
        *("--cell", str(cell), "--preset", options.preset, "--clips", str(options.clips)),
        *("--steps", str(options.steps), "--warmup", str(options.warmup)),
        *("--zero-stage", str(options.zero_stage), "--text-tokens", str(options.text_tokens)),
        *(("--size", options.size) if options.size else ()),
        *options.keys,
    ]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return "out of memory" if "OutOfMemory" in done.stderr else last[:100]
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("keys", nargs="*", help="KEY=VALUE of the preset's config")
    parser.add_argument("--preset", default="1b" if on_gpu else "tiny")
    parser.add_argument("--size", default="480p" if on_gpu else None)
    parser.add_argument("--clips", type=int, default=1, help="per device and step")
    parser.add_argument("--text-tokens", type=int, default=512 if on_gpu else 64)
    parser.add_argument("--zero-stage", type=int, default=1 if on_gpu else 0)
    parser.add_argument("--steps", type=int, default=10 if on_gpu else 3)
    parser.add_argument("--warmup", type=int, default=3 if on_gpu else 1)
    parser.add_argument("--compile", action="store_true", default=on_gpu, help="compiled cells too")
    parser.add_argument("--cell", help="one cell: checkpointing,compile,attention")
    options = parser.parse_args()
    if options.cell:
        figures = measure(options, Cell.read(options.cell))
        if is_main():
            print(json.dumps(figures))
        return
    if not on_gpu and not options.keys:
        options.keys = ["num_frames=9"]
    config, _, grid = training(options, Cell("false", False, "sdpa"))
    plan = Plan(config.model_copy(update={"batch_size": 1, "gradient_accumulation_steps": 1}), *_planned(on_gpu), options.text_tokens, 1.0)  # fmt: skip
    where = (
        torch.cuda.get_device_name()
        if on_gpu
        else f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    )
    print(
        f"{where}, torch {torch.__version__}; {options.preset}: {plan.num_parameters / 1e6:,.1f} million parameters, {options.clips} clip(s) of "
        f"{grid.tokens:,} tokens and {options.text_tokens} of text, {'bfloat16' if config.bf16 and on_gpu else 'float32'}, "
        f"ZeRO-{options.zero_stage}; median of {options.steps} steps after {options.warmup}\n"
    )
    print(
        "| recomputed | compiled | attention | step, s (least to most) | tokens/s | model TFLOP/s | MFU | with recomputation | peak, GiB |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for compiled, checkpointing, attention in product(
        (False, True) if options.compile else (False,), CHECKPOINTING, ("sdpa", "packed")
    ):
        cell = Cell(checkpointing, compiled, attention)
        found = in_own_process(options, cell)
        start = f"| {checkpointing} | {str(compiled).lower()} | {attention} |"
        if isinstance(found, str):
            print(f"{start} {found} | | | | | |", flush=True)
            continue
        gib = "not measured" if math.isnan(found["gib"]) else f"{found['gib']:.1f}"
        print(
            f"{start} {found['seconds']:.3f} ({found['least']:.3f} to {found['most']:.3f}) | {found['tokens']:,.0f} "
            f"| {found['useful'] / 1e12:,.3f} | {share(found['mfu'])} | {share(found['hfu'])} | {gib} |",
            flush=True,
        )


def share(value: float) -> str:
    """Of a peak; of a CPU's there is no figure."""
    return "no peak known" if math.isnan(value) else f"{value:.1%}"


def _planned(on_gpu: bool) -> tuple:
    from generator.plan.devices import find_device

    return find_device("h100" if on_gpu else "cpu"), 1


if __name__ == "__main__":
    main()

"""Speed and memory of the rewards: clips per second forward, and forward with backward to the pixels; and our preprocessing against PIL's.

    OMP_NUM_THREADS=1 python benchmarks/rewards_speed.py            # a GPU is used where there is one
    python benchmarks/rewards_speed.py --help                       # the commands for either, with both sizes

Each row is a process of its own; memory is its peak, resident on a CPU and of torch's allocator on a GPU, less what the reward and the clips
take. Weights are random: speed does not depend on what they know. The video processors of transformers need
torchvision and do not run without it; its image processors do (PIL), and are timed on the same 8-bit frames.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

EXAMPLES = """on a CPU, one thread, so that seconds are those it computed (minutes for tiny, a quarter of an hour for both sizes):
  OMP_NUM_THREADS=1 python benchmarks/rewards_speed.py --sizes tiny small --seconds 0.3 --frames 9 33 --sides 64 128

on a GPU, which is taken where there is one (`--device cpu` forbids it); larger batches and clips, or it has nothing to do:
  python benchmarks/rewards_speed.py --sizes tiny small --batch 16 --frames 17 33 81 --sides 128 256 480
"""
MIB = 2**20
CAPTION = "A red disc moves left."
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 96, "num_layers": 3, "num_heads": 4},
    "small": {"hidden_size": 384, "num_layers": 12, "num_heads": 6},
}
MODELS = ("foundational", "motion", "aesthetic")
WAYS = ("forward", "backward")
PROCESSORS = ("siglip", "siglip2", "clip")


def build(model: str, size: str, area: int) -> Any:
    """A frozen reward of random weights."""
    from rewards.aesthetic import AestheticConfig, AestheticReward
    from rewards.foundational import FoundationalConfig, FoundationalReward
    from rewards.motion import MotionConfig, MotionReward
    from rewards.tokens import train_tokenizer

    torch.manual_seed(0)
    classes: dict[str, tuple[Any, Any]] = {
        "foundational": (FoundationalConfig, FoundationalReward),
        "motion": (MotionConfig, MotionReward),
        "aesthetic": (AestheticConfig, AestheticReward),
    }
    config_class, reward_class = classes[model]
    config = config_class(**SIZES[size], area=area)
    tokenizer = train_tokenizer([CAPTION] * 4, vocab_size=300, dimensions=config.dimensions)
    return reward_class(config, tokenizer).freeze()


def clock(device: str) -> float:
    """Seconds. One thread on a CPU is timed by the seconds it computed, which other processes on the machine do not lengthen."""
    alone = device == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def timed(work: Callable[[], None], seconds: float, device: str) -> float:
    """Median seconds of one call, over at least three after a first one that is not counted."""
    work()
    spent: list[float] = []
    while len(spent) < 3 or sum(spent) < seconds:
        begun = clock(device)
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(clock(device) - begun)
    return statistics.median(spent)


def peak_mib(device: str) -> float:
    """Most memory so far: torch's on a GPU, the whole process's on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cell(options: argparse.Namespace) -> dict[str, float]:
    """Measure one reward on clips of one shape in this process: first forward, then with the backward pass."""
    model, size = options.cell[:2]
    frames, side, batch = map(int, options.cell[2:])
    reward = build(model, size, side * side).to(options.device)
    clips = torch.rand(batch, 3, frames, side, side, device=options.device)
    selection = reward.select(frames, 8.0)
    prompts = [CAPTION] * batch

    def forward() -> None:
        with torch.no_grad():
            reward.score(clips, selection=selection, fps=8.0, prompts=prompts)

    def with_backward() -> None:
        leaf = clips.detach().requires_grad_()
        reward.score(leaf, selection=selection, fps=8.0, prompts=prompts).values.sum().backward()

    idle = peak_mib(options.device)
    found: dict[str, float] = {}
    for way, work in (("forward", forward), ("backward", with_backward)):
        found[f"{way}_seconds"] = timed(work, options.seconds, options.device)
        found[f"{way}_mib"] = peak_mib(options.device) - idle
    return found


def in_own_process(options: argparse.Namespace, *words: Any) -> dict[str, float]:
    command = [sys.executable, __file__, "--cell", *map(str, words), "--device", options.device]
    # glibc raises its threshold for giving memory back as blocks are freed; held still, the peak is what was in use
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
    done = subprocess.run(
        [*command, "--seconds", str(options.seconds)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    return json.loads(done.stdout.splitlines()[-1])


def preprocessing(
    name: str, height: int, width: int, seconds: float
) -> tuple[float, float, float | None]:
    """Seconds per frame of theirs (PIL, 8 bit), of ours forward, and of ours with the gradient to the pixels."""
    from rewards.backbones.image import Clip, Siglip, Siglip2

    frames = torch.randint(0, 256, (4, 3, height, width), dtype=torch.uint8)
    pictures = [frame.permute(1, 2, 0).numpy() for frame in frames]
    if name == "siglip":
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        theirs: Any = SiglipImageProcessorPil(size={"height": 224, "width": 224})
        recipe = Siglip().recipe(SimpleNamespace(image_size=224))
    elif name == "clip":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        theirs = CLIPImageProcessorPil()
        recipe = Clip().recipe(SimpleNamespace(image_size=224))
    else:
        from transformers.models.siglip2.image_processing_pil_siglip2 import (
            Siglip2ImageProcessorPil,
        )

        theirs = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=256)
        recipe = Siglip2().recipe(SimpleNamespace(patch_size=16, num_patches=256))

    def ours() -> None:
        recipe(frames.float().div(255).transpose(0, 1)[None])

    def with_gradient() -> None:
        leaf = frames.float().div(255).transpose(0, 1)[None].requires_grad_()
        recipe(leaf).sum().backward()

    def with_theirs() -> None:
        theirs(pictures, return_tensors="pt")

    spent = [timed(work, seconds, "cpu") / 4 for work in (with_theirs, ours, with_gradient)]
    return spent[0], spent[1], spent[2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sizes", nargs="+", default=["tiny"], choices=SIZES, help="tiny: the demo's; small: ViT-S"
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--frames", nargs="+", type=int, default=[9, 17, 33])
    parser.add_argument("--sides", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="least time spent on a cell")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cell", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(cell(options)))
        return
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor()
    print(
        f"{options.device} {name}, torch {torch.__version__}, {torch.get_num_threads()} thread(s), batches of {options.batch}\n"
    )
    print(
        "| reward | size | frames | side | clips/s, forward | clips/s, forward and backward | MiB, forward | MiB, forward and backward |"
    )
    print("|---|---|---|---|---|---|---|---|")
    first, smallest = options.frames[0], options.sides[0]
    grid = [(f, smallest) for f in options.frames] + [(first, s) for s in options.sides[1:]]
    for model in options.models:
        for size in options.sizes:
            for frames, side in grid:
                found = in_own_process(options, model, size, frames, side, options.batch)
                rates = " | ".join(f"{options.batch / found[f'{w}_seconds']:.1f}" for w in WAYS)
                peaks = " | ".join(f"{found[f'{w}_mib']:,.0f}" for w in WAYS)
                print(f"| {model} | {size} | {frames} | {side} | {rates} | {peaks} |", flush=True)
    print(
        "\n| processor | frames | PIL, frames/s | ours, frames/s | ours with gradient, frames/s |"
    )
    print("|---|---|---|---|---|")
    for name in PROCESSORS:
        for height, width in ((128, 128), (480, 832)):
            spent = preprocessing(name, height, width, options.seconds)
            rates = " | ".join(f"{1 / one:,.0f}" for one in spent if one)
            print(f"| {name} | {height} x {width} | {rates} |", flush=True)


if __name__ == "__main__":
    main()

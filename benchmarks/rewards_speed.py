"""Speed and memory of the rewards: clips per second forward, and forward with backward to the pixels; and our preprocessing against PIL's.

    OMP_NUM_THREADS=1 python benchmarks/rewards_speed.py            # a GPU is used where there is one
    python benchmarks/rewards_speed.py --sizes tiny small --frames 9 17 33 --sides 64 128 256

Each cell is a process of its own: on a CPU its peak resident memory less that of a process which only builds the reward and the clips, on
a GPU the peak of torch's allocator. Weights are random: speed does not depend on what they know. The video processors of transformers need
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


def timed(work: Callable[[], None], seconds: float, device: str) -> float:
    """Median seconds of one call, over at least three after a first one that is not counted."""
    work()
    spent, started = [], time.perf_counter()
    while len(spent) < 3 or time.perf_counter() - started < seconds:
        begun = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - begun)
    return statistics.median(spent)


def cell(options: argparse.Namespace) -> dict[str, float]:
    """Measure one way in this process."""
    model, size, way, frames, side, batch = options.cell
    frames, side, batch = int(frames), int(side), int(batch)
    reward = build(model, size, side * side).to(options.device)
    clips = torch.rand(batch, 3, frames, side, side, device=options.device)
    selection = reward.select(frames, 8.0)
    prompts = [CAPTION] * batch

    def work() -> None:
        leaf = clips.detach().requires_grad_(way == "backward")
        with torch.set_grad_enabled(way == "backward"):
            values = reward.score(leaf, selection=selection, fps=8.0, prompts=prompts).values
        if way == "backward":
            values.sum().backward()

    seconds = 0.0 if way == "nothing" else timed(work, options.seconds, options.device)
    if options.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / MIB
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "mib": peak}


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny"], choices=SIZES)
    parser.add_argument("--frames", nargs="+", type=int, default=[9, 17, 33])
    parser.add_argument("--sides", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="least time spent on a cell")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cell", nargs=6, help=argparse.SUPPRESS)
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
    for model in MODELS:
        for size in options.sizes:
            for frames, side in grid:
                shape = (frames, side, options.batch)
                idle = in_own_process(options, model, size, "nothing", *shape)["mib"]
                found = [in_own_process(options, model, size, way, *shape) for way in WAYS]
                rates = " | ".join(f"{options.batch / one['seconds']:.1f}" for one in found)
                peaks = " | ".join(f"{one['mib'] - idle:,.0f}" for one in found)
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

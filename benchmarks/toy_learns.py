"""What one small model learns of three tasks at once: text to video, image to video, and clips of two shots. One core, about ten minutes.

    OMP_NUM_THREADS=1 python benchmarks/toy_learns.py --out runs/toy_learns [--steps 700] [--prompts 64]

Trains the toy presets (`configs/generator/*_toy.yaml`) on rendered clips of 13 frames, half of them with a cut at frame 5 or 9, and samples
prompts of the test split. Prints a Markdown table beside an untrained denoiser, the renders of the same prompts, and those renders
through the VAE, which is what a perfect denoiser would reach. Stages that lie in `--out` already are not repeated.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from generator.checkpoint import DiTGenerator, load_generator
from generator.dit import DiT
from generator.toygold import measure, see_shots
from generator.toyworld import (
    ToyDatasetConfig,
    caption,
    caption_shots,
    render,
    render_dataset,
    render_shots,
    sample_shot_frames,
    sample_shots,
    split_scenes,
)
from generator.training.denoiser import DenoiserTrainConfig, train_base
from generator.training.text import TextTrainConfig, train_text_encoder
from generator.training.vae import VAETrainConfig, psnr, train_vae
from reelhf.config import load_config
from rlhf.compare import mean_interval
from rlhf.demo.provenance import commit, machine

FRAMES, SIZE, FPS = 13, 64, 8.0
NORMAL_95 = 1.959964
"""Quantile of the normal distribution for a two-sided interval of 95 %."""


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927)."""
    share, z2 = hits / n, NORMAL_95**2 / n
    centre = (share + z2 / 2) / (1 + z2)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n)) / (1 + z2)
    return centre - half, centre + half


@dataclass(frozen=True)
class Asked:
    """Prompts of one kind, with the clip that would be right for each."""

    prompts: list[str]
    renders: Tensor
    """[N, 3, F, H, W]"""


def single_shots(count: int) -> Asked:
    scenes = split_scenes("test", count)
    clips = [
        render(scene, num_frames=FRAMES, size=SIZE, fps=FPS, seed=i)
        for i, scene in enumerate(scenes)
    ]
    return Asked([caption(scene) for scene in scenes], torch.stack(clips))


def two_shots(count: int) -> Asked:
    rng = random.Random(0)
    prompts, clips = [], []
    for index in range(count):
        scenes = sample_shots(rng, 2, "test")
        lengths = sample_shot_frames(rng, 2, FRAMES)
        prompts.append(caption_shots(scenes, lengths))
        clips.append(render_shots(scenes, lengths, size=SIZE, fps=FPS, seed=index))
    return Asked(prompts, torch.stack(clips))


def train(out: Path, steps: int) -> Path:
    """Clips, text encoder, VAE and base; returns the generator's folder."""
    seconds = {}

    def timed(name: str, started: float) -> None:
        seconds[name] = time.perf_counter() - started

    started = time.perf_counter()
    dataset = ToyDatasetConfig(num_clips=960, num_frames=FRAMES, num_shots=2)
    clips = render_dataset(dataset, out / "clips")
    timed("clips", started)
    started = time.perf_counter()
    text = train_text_encoder(
        load_config(TextTrainConfig, "configs/generator/text_toy.yaml"), clips, out / "text"
    )
    timed("text encoder", started)
    started = time.perf_counter()
    vae_words = [f"num_frames={FRAMES}", "max_clips=384"]
    vae = train_vae(
        load_config(VAETrainConfig, "configs/generator/vae_toy.yaml", vae_words), clips, out / "vae"
    )
    timed("vae", started)
    started = time.perf_counter()
    words = [
        f"num_frames={FRAMES}",
        f"num_steps={steps}",
        "max_clips=960",
        "tasks.image_to_video=0.3",
        "save_every=10000",
        "sample_every=10000",
    ]
    config = load_config(DenoiserTrainConfig, "configs/generator/base_toy.yaml", words)
    generator = train_base(config, clips, vae, text, out / "base")
    timed("base", started)
    print(", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
    return generator


def mean(values: Sequence[float], digits: int = 2) -> str:
    interval = mean_interval(values)
    numbers = (interval.mean, interval.low, interval.high)
    return "{} ({} to {})".format(*(f"{number:.{digits}f}" for number in numbers))


def share(hits: Sequence[bool]) -> str:
    low, high = wilson(sum(hits), len(hits))
    return f"{sum(hits) / len(hits):.0%} ({low:.0%} to {high:.0%})"


def measured(makers: dict[str, tuple[Tensor, Tensor, Tensor]], t2v: Asked, cuts: Asked) -> str:
    """A table with a row per maker of clips.

    Args: makers: name to clips of text-to-video, of image-to-video and of two shots, each [N, 3, F, H, W].
    """
    lines = [
        "| clips | T2V prompt following | right subject | I2V prompt following | first frame, PSNR dB | kept (gold preservation) "
        "| two shots: cut at the right frame | right subject, shot 1 | shot 2 | both, and the cut |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (plain, continued, shots) in makers.items():
        plain_gold = [
            measure(clip, text, FPS)["prompt_following"]
            for clip, text in zip(plain, t2v.prompts, strict=True)
        ]
        subjects = [
            seen.subjects == seen.asked_subjects
            for clip, text in zip(plain, t2v.prompts, strict=True)
            for seen in [see_shots(clip, text, FPS)]
        ]
        first = t2v.renders[:, :, 0]
        golds = [
            measure(clip, text, FPS, first_frame=frame)
            for clip, text, frame in zip(continued, t2v.prompts, first, strict=True)
        ]
        kept = [
            psnr(float((clip[:, 0] - frame).square().mean()))
            for clip, frame in zip(continued, first, strict=True)
        ]
        seen_shots = [
            see_shots(clip, text, FPS) for clip, text in zip(shots, cuts.prompts, strict=True)
        ]
        right_cut = [seen.cuts == seen.asked_cuts for seen in seen_shots]
        right = [
            [seen.subjects[shot] == seen.asked_subjects[shot] for seen in seen_shots]
            for shot in (0, 1)
        ]
        cells = [
            name,
            mean(plain_gold),
            share(subjects),
            mean([gold["prompt_following"] for gold in golds]),
            "the same" if continued is t2v.renders else mean(kept, 1),
            mean([gold["preservation"] for gold in golds]),
            share(right_cut),
            share(right[0]),
            share(right[1]),
            share([all(row) for row in zip(right_cut, *right, strict=True)]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sampled(backbone: DiTGenerator, t2v: Asked, cuts: Asked) -> tuple[Tensor, Tensor, Tensor]:
    return (
        backbone.sample(t2v.prompts, batch_size=32),
        backbone.sample(t2v.prompts, first_frames=t2v.renders[:, :, 0], batch_size=32),
        backbone.sample(cuts.prompts, batch_size=32),
    )


@torch.no_grad()
def through_vae(backbone: DiTGenerator, frames: Tensor) -> Tensor:
    return torch.cat([backbone.decode(backbone.encode(part))[0] for part in frames.split(16)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/toy_learns"))
    parser.add_argument("--steps", type=int, default=700, help="optimizer steps of the denoiser")
    parser.add_argument("--prompts", type=int, default=64, help="of each kind")
    arguments = parser.parse_args()
    trained = load_generator(train(arguments.out, arguments.steps))
    assert isinstance(trained, DiTGenerator)
    torch.manual_seed(0)
    untrained = replace(trained, denoiser=DiT(trained.denoiser.config))
    t2v, cuts = single_shots(arguments.prompts), two_shots(arguments.prompts)
    started = time.perf_counter()
    makers = {
        "untrained": sampled(untrained, t2v, cuts),
        f"trained, {arguments.steps} steps": sampled(trained, t2v, cuts),
        "renders through the VAE": (
            *(through_vae(trained, t2v.renders).clamp(0, 1),) * 2,
            through_vae(trained, cuts.renders).clamp(0, 1),
        ),
        "renders": (t2v.renders, t2v.renders, cuts.renders),
    }
    print(f"sampling and decoding {time.perf_counter() - started:.0f} s\n")
    print(
        f"{machine()}, commit {commit()}, {arguments.prompts} prompts of each kind, 95 % intervals\n"
    )
    print(measured(makers, t2v, cuts))


if __name__ == "__main__":
    main()

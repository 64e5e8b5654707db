"""Candidate clips for people to judge: K clips per prompt from two stages of the model.

Most tasks hold clips of one stage only. Those are the pairs that teach a reward what RLHF needs, quality within a stage; a
reward trained on mixed pairs alone learns to tell a sharp refiner from a soft base and nothing else.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from reelhf.config import Config

if TYPE_CHECKING:
    from torch import Tensor

    from generator.base import SamplerSpec, VideoBackbone

BASE, REFINER = "base", "refiner"
STRAY_CHOICES = 12
"""Prompts looked at for the one most alike."""


class CandidatesConfig(Config):
    """How many clips of which stage each prompt gets."""

    clips_per_task: int = Field(4, ge=2)
    """K, the clips one annotator sees side by side."""
    base_fraction: float = Field(0.4, ge=0, le=1)
    """Tasks whose K clips all come from the base."""
    refiner_fraction: float = Field(0.4, ge=0, le=1)
    """Tasks whose K clips all come from the accelerated refiner; what remains is half and half."""
    step_fractions: tuple[PositiveFloat, ...] = (0.25, 0.5, 1.0)
    """The base's sampling steps over those of its checkpoint, drawn per clip. A small generator's clips of one prompt and one
    setting are near copies, and nobody learns from a choice between copies."""
    guidance_scales: tuple[PositiveFloat, ...] = (1.0, 2.0, 3.0)
    """The base's guidance, drawn per clip; a refined clip starts from such a base clip."""
    refiner_step_fractions: tuple[PositiveFloat, ...] = (0.25, 0.5, 1.0)
    """The accelerated refiner's steps over those of its checkpoint, drawn per clip."""
    stray_fraction: float = Field(0.25, ge=0, le=1)
    """Clips made from another prompt than the task's, the most alike of a few: a small generator follows its prompt almost
    always, and nobody learns what following means from four clips that follow."""
    model: str = "toy"
    """Name of the generator in the records."""
    seed: int = 1
    """Decides the order of the stages and every clip's noise."""
    batch_size: PositiveInt = 32
    """Clips sampled at once."""

    @model_validator(mode="after")
    def _fractions(self) -> CandidatesConfig:
        if self.base_fraction + self.refiner_fraction > 1 + 1e-9:
            raise ValueError(
                f"base_fraction {self.base_fraction} + refiner_fraction {self.refiner_fraction} exceed 1"
            )
        return self


def plan_stages(config: CandidatesConfig, num_prompts: int) -> list[list[str]]:
    """The stage of every clip of every task, shuffled by the config's seed: [P][K]."""
    num_base = round(num_prompts * config.base_fraction)
    num_refiner = min(num_prompts - num_base, round(num_prompts * config.refiner_fraction))
    k = config.clips_per_task
    mixed = [BASE] * (k // 2) + [REFINER] * (k - k // 2)
    plan = (
        [[BASE] * k] * num_base
        + [[REFINER] * k] * num_refiner
        + [mixed] * (num_prompts - num_base - num_refiner)
    )
    random.Random(config.seed).shuffle(plan)
    return plan


def make_candidates(
    config: CandidatesConfig, *, stages: dict[str, Path], prompts: Sequence[str], out: Path
) -> Path:
    """Sample every clip and write `out`: one mp4 per clip and `manifest.jsonl`, one line per clip.

    Args:
        stages: generator folders, "base" and "refiner"; the refiner refines clips of that base.
        prompts: one task each.
    Returns: `out`. A manifest line holds path, prompt, task, stage, model, checkpoint, seed and fps. Seeds are unique.
    """
    from generator.checkpoint import load_generator
    from reelhf.hashing import sha256_file
    from reelhf.progress import track
    from reelhf.video import write_video

    plan = plan_stages(config, len(prompts))
    base, refiner = load_generator(stages[BASE]), load_generator(stages[REFINER])
    rows = [
        {
            "prompt": prompt,
            "task": task,
            "stage": stage,
            "seed": config.seed * 1_000_000 + task * 100 + slot,
            "made_from": strayed(config, prompts, task, slot),
        }
        for task, (prompt, clip_stages) in enumerate(zip(prompts, plan, strict=True))
        for slot, stage in enumerate(clip_stages)
    ]
    out.mkdir(parents=True, exist_ok=True)
    samplers = draw_samplers(config, base.sampler, refiner.sampler, len(rows))
    checkpoints = {
        stage: sha256_file(stages[stage] / "denoiser.safetensors")[:12] for stage in stages
    }
    written = []
    for stage in (BASE, REFINER):
        own = [
            (row, drawn if stage == REFINER else (drawn[0], None))
            for row, drawn in zip(rows, samplers, strict=True)
            if row["stage"] == stage
        ]
        order = [drawn for _, drawn in own]
        own.sort(key=lambda pair: order.index(pair[1]))  # one setting after the other
        frames_of = (
            frames
            for drawn, group in groupby(own, key=itemgetter(1))
            for batch in sample_clips(
                base if stage == BASE else refiner,
                *zip(*((row["made_from"], row["seed"]) for row, _ in group), strict=True),
                sampler=drawn[0] if stage == BASE else drawn[1],
                low_res=None if stage == BASE else base,
                low_res_sampler=drawn[0],
                batch_size=config.batch_size,
            )
            for frames in batch
        )
        for (row, (of_base, of_refiner)), frames in track(
            zip(own, frames_of, strict=True), label=f"{stage} clips", total=len(own)
        ):
            fps = base.fps if stage == BASE else refiner.fps
            path = out / f"{row['task']:04d}_{row['seed'] % 100}_{stage}.mp4"
            write_video(path, frames, fps)
            written.append(
                row
                | {
                    "path": path.name,
                    "model": config.model,
                    "checkpoint": checkpoints[stage],
                    "fps": fps,
                    "base_steps": of_base.num_steps,
                    "base_guidance": of_base.guidance_scale,
                    "refiner_steps": of_refiner.num_steps if of_refiner else None,
                }
            )
    written.sort(key=lambda row: (row["task"], row["seed"]))
    manifest = out / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written))
    return out


def strayed(config: CandidatesConfig, prompts: Sequence[str], task: int, slot: int) -> str:
    """The prompt a clip is made from: the task's, or in `stray_fraction` of the cases one that is much like it.

    A word is what stands between spaces. A text without any, such as a Chinese one, is one word, and its strays are drawn at
    random: comparing characters instead would change which clips the recorded runs of the loop were made of.
    """
    rng = random.Random(f"strays:{config.seed}/{task}/{slot}")
    own = prompts[task]
    others = sorted(set(prompts) - {own})
    if not others or rng.random() >= config.stray_fraction:
        return own
    words = set(own.split())

    def alike(other: str) -> float:
        theirs = set(other.split())
        return len(words & theirs) / len(words | theirs)

    return max(rng.sample(others, min(len(others), STRAY_CHOICES)), key=alike)


def draw_samplers(
    config: CandidatesConfig, base: SamplerSpec, refiner: SamplerSpec, count: int
) -> list[tuple[SamplerSpec, SamplerSpec]]:
    """How base and refiner sample each clip: steps and guidance drawn by the config's seed."""
    rng = random.Random(f"samplers:{config.seed}")
    drawn = []
    for _ in range(count):
        of_base = with_fewer_steps(base, rng.choice(config.step_fractions))
        of_base = replace(of_base, guidance_scale=rng.choice(config.guidance_scales))
        drawn.append(
            (of_base, with_fewer_steps(refiner, rng.choice(config.refiner_step_fractions)))
        )
    return drawn


def with_fewer_steps(own: SamplerSpec, fraction: float) -> SamplerSpec:
    """A part of the sampler's steps, at least one and never more than it has."""
    from rlhf.rollout import shorter_sampler

    return shorter_sampler(own, min(own.num_steps, max(1, round(own.num_steps * fraction))))


def read_manifest(folder: Path) -> list[dict]:
    """The lines of `folder/manifest.jsonl`, their `path` made absolute."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return [row | {"path": folder / row["path"]} for row in rows]


def sample_clips(
    model: VideoBackbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    sampler: SamplerSpec | None = None,
    low_res: VideoBackbone | None = None,
    low_res_sampler: SamplerSpec | None = None,
    batch_size: int = 32,
) -> Iterator[Tensor]:
    """Clips of `model`, by its own sampler unless another is given, batch by batch: float [B, 3, F, H, W] in [0, 1].

    The same prompt and seed give the same noise whatever the batch. A refiner gets the clip that `low_res` makes of the
    same prompt and seed, by `low_res_sampler` if given.
    """
    from generator.sampling import sample_frames

    for start in range(0, len(prompts), batch_size):
        batch, own_seeds = (
            list(prompts[start : start + batch_size]),
            list(seeds[start : start + batch_size]),
        )
        task = None
        if low_res is not None:
            small = sample_frames(
                low_res, batch, own_seeds, sampler=low_res_sampler, batch_size=batch_size
            )
            task = model.low_res_task(small, *model.frame_shape[1:])
        yield sample_frames(
            model, batch, own_seeds, task=task, sampler=sampler, batch_size=batch_size
        )


# --- real clips: windows, and copies of them spoiled in a known way --------------------------------------------------


def make_corrupted_candidates(
    config: CandidatesConfig, *, clips: Path, like: Path, prompts: Sequence[str], out: Path
) -> Path:
    """For each prompt a real window of its clip, spoiled copies of it, and now and then another clip's window.

    Args:
        clips: folder of real captioned clips.
        like: generator folder whose clip size and rate the windows get.
        prompts: captions of the folder; each occurrence makes one task from another window where the clip is long enough.
    Returns: `out`, as `make_candidates`; the manifest also holds `corruption` (None for the untouched window) and `strength`.
    """
    from generator.checkpoint import load_generator
    from reelhf.clips import load_folder_windows
    from reelhf.hashing import content_hash
    from reelhf.progress import track
    from reelhf.video import write_video
    from rlhf.corruptions import CORRUPTIONS, SWAPPED_CAPTION, corrupt

    model = load_generator(like)
    windows = load_folder_windows(
        clips,
        frame_shape=model.frame_shape,
        fps=model.fps,
        max_windows=MAX_REAL_WINDOWS,
        seed=config.seed,
    )
    of_caption: dict[str, list[int]] = {}
    for index, caption in enumerate(windows.captions):
        of_caption.setdefault(caption, []).append(index)
    source = content_hash(windows.captions)[:12]
    out.mkdir(parents=True, exist_ok=True)
    turn: dict[str, int] = {}
    rows = []
    for task, prompt in enumerate(track(prompts, label="corrupted copies")):
        own = of_caption[prompt]
        window = own[turn.get(prompt, 0) % len(own)]
        turn[prompt] = turn.get(prompt, 0) + 1
        rng = random.Random(f"{config.seed}/{task}")
        others = [i for i, caption in enumerate(windows.captions) if caption != prompt]
        kinds: list[str | None] = [
            None,
            *rng.sample(sorted(CORRUPTIONS), config.clips_per_task - 1),
        ]
        if others and rng.random() < SWAP_SHARE:
            kinds[-1] = SWAPPED_CAPTION
        for slot, kind in enumerate(kinds):
            strength = (
                0.0 if kind is None else 1.0 if kind == SWAPPED_CAPTION else rng.uniform(0.4, 1.0)
            )
            shown = rng.choice(others) if kind == SWAPPED_CAPTION else window
            frames = windows.frames[shown].float() / 255
            seed = config.seed * 1_000_000 + task * 100 + slot
            if kind not in (None, SWAPPED_CAPTION):
                frames = corrupt(kind, frames, strength=strength, seed=seed)
            path = out / f"{task:04d}_{slot}.mp4"
            write_video(path, frames, model.fps)
            rows.append(
                {
                    "prompt": prompt,
                    "task": task,
                    "stage": "real_window",
                    "seed": seed,
                    "path": path.name,
                    "model": "real",
                    "checkpoint": source,
                    "fps": model.fps,
                    "corruption": kind,
                    "strength": strength,
                }
            )
    (out / "manifest.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )
    return out


MAX_REAL_WINDOWS = 512
SWAP_SHARE = 0.5
"""Of the tasks of real clips that show one clip under another's caption."""
_SIGNATURE = (4, 16, 16)  # frames, height, width that a copy is recognised by


class CorruptionOracle:
    """What is known of the corrupted copies of real clips: each was spoiled by us, so each is graded by how.

    The annotators download presentation copies, which are encoded anew; a copy is recognised by its nearest candidate.
    """

    def __init__(self, candidates: Path) -> None:
        import torch

        from reelhf.video import read_video

        self._of_prompt: dict[str, tuple[Tensor, list[dict]]] = {}
        rows: dict[str, list[dict]] = {}
        for row in read_manifest(candidates):
            rows.setdefault(row["prompt"], []).append(row)
        for prompt, own in rows.items():
            signatures = [self._signature(read_video(row["path"])[0].float() / 255) for row in own]
            self._of_prompt[prompt] = torch.stack(signatures), own

    def __call__(self, frames: Tensor, prompt: str, fps: float) -> dict[str, float]:
        from annotation.records import DIMENSIONS
        from rlhf.corruptions import corrupted_gold

        signatures, rows = self._of_prompt[prompt]
        nearest = int((signatures - self._signature(frames)).square().mean(1).argmin())
        row = rows[nearest]
        return corrupted_gold(row["corruption"], row["strength"], DIMENSIONS)

    @staticmethod
    def _signature(frames: Tensor) -> Tensor:
        import torch.nn.functional as F

        return F.adaptive_avg_pool3d(frames[None], _SIGNATURE).flatten()

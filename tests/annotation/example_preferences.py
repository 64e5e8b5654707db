"""A small, complete preference folder with tiny videos, written without a project: what every reader must be able to read."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from annotation.records import DIMENSIONS, load_guideline, prompt_id, split_of, write_preferences
from reelhf.hashing import sha256_file
from reelhf.video import write_video

Row = dict[str, Any]

NUM_CLIPS = 4
FPS = 8.0
MADE_BY = {"project": "example", "round": 0, "annotator": "example-1", "simulated": True}
FREE_PICK = {"admissible": True, "constrained": False}


def write_example_preferences(
    folder: Path, *, num_prompts: int = 12, num_frames: int = 9, size: int = 64, seed: int = 0
) -> Path:
    """Writes `num_prompts` tasks of four clips: a square sliding over grey, ever less noisy from the worst to the best.

    Every dimension has that same order. All judgments are marked simulated.

    Returns: the folder, readable by `read_preferences`; videos lie in `folder/media`.
    """
    rng = random.Random(seed)
    clips: list[Row] = []
    judgments: list[Row] = []
    preferences: list[Row] = []
    for index in range(num_prompts):
        colour = [rng.random() for _ in range(3)]
        made = _clips(folder, index, colour, num_frames, size)
        clips += made
        for judgment in _judgments(index, made, rng):
            judgments.append(judgment)
            preferences += _preferences(judgment, made, rng)
    return write_preferences(
        folder,
        clips=clips,
        judgments=judgments,
        preferences=preferences,
        guideline_version=load_guideline().version,
        source_query="example",
    )


def _clips(
    folder: Path, index: int, colour: Sequence[float], num_frames: int, size: int
) -> list[Row]:
    """The clips of one prompt, worst first."""
    text = (
        f"Example {index}: a square of colour {[round(c, 2) for c in colour]} slides to the right."
    )
    rows = []
    for rank in range(NUM_CLIPS):
        path = folder / "media" / f"{index:03d}_{rank}.mp4"
        generator = torch.Generator().manual_seed(NUM_CLIPS * index + rank)
        noise = 0.3 * (1 - rank / (NUM_CLIPS - 1))
        frames = sliding_square(colour, num_frames, size)
        frames += noise * (torch.rand(frames.shape, generator=generator) - 0.5)
        write_video(path, frames.clamp(0, 1), FPS)
        rows.append(
            {
                **_prompt_columns(text),
                "sha256": sha256_file(path),
                "uri": f"media/{path.name}",
                "project": MADE_BY["project"],
                "model": "example",
                "stage": "early" if rank < NUM_CLIPS / 2 else "late",
                "checkpoint": None,
                "seed": rank,
                "fps": FPS,
                "num_frames": num_frames,
                "width": size,
                "height": size,
            }
        )
    return rows


def sliding_square(colour: Sequence[float], num_frames: int, size: int) -> Tensor:
    """Frames [3, F, H, W] in [0, 1]."""
    frames = torch.full((3, num_frames, size, size), 0.3)
    for frame in range(num_frames):
        left = int(frame / num_frames * size * 0.6)
        square = frames[:, frame, size // 4 : size * 3 // 4, left : left + size // 3]
        square[:] = torch.tensor(colour)[:, None, None]
    return frames


def _judgments(index: int, clips: Sequence[Row], rng: random.Random) -> Iterator[Row]:
    """One annotator's best and worst in every dimension, clips and dimensions in random order."""
    by_quality = [clip["sha256"] for clip in clips]
    shown = rng.sample(by_quality, len(by_quality))
    submitted_at = datetime.now(timezone.utc).replace(microsecond=0)
    for position, dimension in enumerate(rng.sample(DIMENSIONS[:4], 4)):
        yield {
            **MADE_BY,
            **FREE_PICK,
            "judgment_id": f"e{index}/{dimension}/final",
            "task_id": f"e{index}",
            "prompt_id": clips[0]["prompt_id"],
            "dimension": dimension,
            "kind": "best_worst",
            "candidates": shown,
            "pick": "final",
            "status": "ok",
            "best": shown.index(by_quality[-1]),
            "worst": shown.index(by_quality[0]),
            "tie": False,
            "dimension_position": position,
            "surplus": False,
            "submitted_at": submitted_at,
            "guideline_version": load_guideline().version,
        }


def _preferences(judgment: Row, clips: Sequence[Row], rng: random.Random) -> Iterator[Row]:
    """The pairs that one best and worst decide; of two middle clips they say nothing."""
    worst, *_, best = clips
    for worse, better in combinations(clips, 2):
        explicit = worse is worst and better is best
        if not explicit and worse is not worst and better is not best:
            continue
        a, b = rng.sample((worse, better), 2)
        yield {
            **_prompt_columns(worse["prompt"]),
            **{key: MADE_BY[key] for key in ("round", "annotator", "simulated")},
            **FREE_PICK,
            "task_id": judgment["task_id"],
            "dimension": judgment["dimension"],
            "clip_a": a["sha256"],
            "clip_b": b["sha256"],
            "preference": 1 if a is better else -1,
            "kind": "explicit" if explicit else "implied",
            "weight": 1.0 if explicit else 0.5,
            "judgment_ids": [judgment["judgment_id"]],
            "same_stage": a["stage"] == b["stage"],
            "split": split_of(worse["prompt_id"]),
        }


def _prompt_columns(text: str) -> Row:
    return {"prompt_id": prompt_id(text), "prompt": text, "language": "en", "task_kind": "t2v"}

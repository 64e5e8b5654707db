"""Tiny reward models and preference data for the tests of this folder."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from annotation.records import prompt_id, split_of, write_preferences
from reelhf.hashing import sha256_file
from reelhf.video import write_video
from rewards.aesthetic import AestheticConfig, AestheticReward
from rewards.foundational import FoundationalConfig, FoundationalReward
from rewards.module import RewardModule
from rewards.motion import MotionConfig, MotionReward
from rewards.pretraining.config import PretrainConfig, StageConfig
from rewards.tokens import train_tokenizer

CAPTIONS = [
    f"A {c} {s} moves {m}."
    for c in ("red", "blue")
    for s in ("disc", "box")
    for m in ("left", "up")
]
SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 2}
FOUNDATIONAL = FoundationalConfig(
    **SIZES, vision_layers=1, area=32 * 32, num_frames=4, vocab_size=300
)
MOTION = MotionConfig(**SIZES, area=32 * 32, num_queries=2, vocab_size=300)
AESTHETIC = AestheticConfig(**SIZES, area=32 * 32, vocab_size=300)


def tiny_models(seed: int = 0) -> dict[str, RewardModule]:
    """One of each kind, about 50 thousand parameters, frozen as when loaded."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=300, dimensions=FOUNDATIONAL.dimensions)
    models: dict[str, RewardModule] = {
        "foundational": FoundationalReward(FOUNDATIONAL, tokenizer),
        "motion": MotionReward(MOTION, tokenizer),
        "aesthetic": AestheticReward(AESTHETIC, tokenizer),
    }
    for model in models.values():
        for head in model.modules():
            if hasattr(head, "count"):
                head.count(model.encode_prompts(CAPTIONS))
        model.freeze()
    return models


def tiny_pretrain_config(steps: int = 2) -> PretrainConfig:
    stage = StageConfig(num_steps=steps, batch_size=4)
    return PretrainConfig(
        foundational=FOUNDATIONAL,
        motion=MOTION,
        aesthetic=AESTHETIC,
        foundational_stage=stage,
        motion_stage=stage,
        aesthetic_stage=stage,
        num_frames=5,
        size=32,
        max_windows=16,
    )


def smooth_clip(seed: int, num_frames: int = 5, size: int = 32) -> Tensor:
    """Random smooth frames [3, F, H, W] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, num_frames, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(num_frames, size, size), mode="trilinear")[
        0
    ]


def write_tiny_preferences(
    folder: Path,
    *,
    quality: Callable[[int], float],
    make: Callable[[int], Tensor],
    num_tasks: int = 24,
    clips_per_task: int | Callable[[int], int] = 4,
    dimensions: tuple[str, ...] = ("aesthetic_quality",),
) -> Path:
    """Preference data in which the clip of the highest `quality` always wins; clip i shows `make(i)`."""
    rng = random.Random(0)
    (folder / "media").mkdir(parents=True)
    clips: list[dict[str, Any]] = []
    judgments: list[dict[str, Any]] = []
    preferences: list[dict[str, Any]] = []
    number = 0
    for task in range(num_tasks):
        text = f"{CAPTIONS[task % len(CAPTIONS)]} Number {task}."
        shas = []
        count = clips_per_task if isinstance(clips_per_task, int) else clips_per_task(task)
        ids = range(number, number + count)
        number += count
        for i in ids:
            draft = folder / "media" / "draft.mp4"
            write_video(draft, make(i), 8.0)
            path = draft.rename(folder / "media" / f"{sha256_file(draft)}.mp4")
            frames = make(i)
            shas.append(path.stem)
            clips.append(
                {
                    "sha256": path.stem,
                    "uri": f"media/{path.name}",
                    "project": "test",
                    "prompt_id": prompt_id(text),
                    "prompt": text,
                    "language": "en",
                    "task_kind": "t2v",
                    "model": "toy",
                    "stage": "base" if frames.shape[-1] == 32 else "refiner",
                    "fps": 8.0,
                    "num_frames": frames.shape[1],
                    "width": frames.shape[-1],
                    "height": frames.shape[-2],
                }
            )
        order = sorted(range(count), key=lambda k, ids=ids: quality(ids[k]))
        for dimension in dimensions:
            judgment = f"j{task}-{dimension}"
            shown = rng.sample(range(count), count)
            judgments.append(
                {
                    "judgment_id": judgment,
                    "task_id": f"t{task}",
                    "annotator": f"a{task % 2}",
                    "simulated": True,
                    "project": "test",
                    "round": 1,
                    "prompt_id": prompt_id(text),
                    "dimension": dimension,
                    "kind": "best_worst",
                    "candidates": [shas[k] for k in shown],
                    "pick": "final",
                    "status": "ok",
                    "best": shown.index(order[-1]),
                    "worst": shown.index(order[0]),
                    "tie": False,
                    "admissible": True,
                    "constrained": False,
                    "dimension_position": 0,
                    "surplus": False,
                    "submitted_at": datetime.datetime.now(datetime.timezone.utc),
                    "guideline_version": "test",
                }
            )
            for low, high in [(order[0], order[-1])] + [(k, order[-1]) for k in order[1:-1]]:
                a, b, preference = (high, low, 1) if rng.random() < 0.5 else (low, high, -1)
                preferences.append(
                    {
                        "prompt_id": prompt_id(text),
                        "prompt": text,
                        "language": "en",
                        "task_kind": "t2v",
                        "task_id": f"t{task}",
                        "round": 1,
                        "dimension": dimension,
                        "clip_a": shas[a],
                        "clip_b": shas[b],
                        "preference": preference,
                        "kind": "explicit" if low == order[0] else "implied",
                        "weight": 1.0 if low == order[0] else 0.2,
                        "judgment_ids": [judgment],
                        "annotator": f"a{task % 2}",
                        "simulated": True,
                        "admissible": True,
                        "constrained": False,
                        "same_stage": clips[ids[a]]["stage"] == clips[ids[b]]["stage"],
                        "split": split_of(prompt_id(text)),
                    }
                )
    return write_preferences(
        folder,
        clips=clips,
        judgments=judgments,
        preferences=preferences,
        guideline_version="test",
        source_query="test",
    )

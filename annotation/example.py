"""A small, complete preference folder with tiny videos: something to try a reader or a trainer on."""

from __future__ import annotations

import random
from datetime import datetime, timezone
from itertools import combinations
from pathlib import Path
from typing import Any

from annotation.records import DIMENSIONS, load_guideline, prompt_id, split_of, write_preferences


def write_example_preferences(
    folder: Path,
    *,
    num_prompts: int = 12,
    clips_per_prompt: int = 4,
    num_frames: int = 9,
    size: int = 64,
    seed: int = 0,
) -> Path:
    """Writes `num_prompts` tasks whose clips are a square sliding over grey, brighter and steadier from worst to best.

    Every dimension has the same order, so any sound model can learn it. All judgments are marked simulated.

    Returns: the folder, readable by `read_preferences`; videos lie in `folder/media`.
    """
    import torch

    from reelhf.hashing import sha256_file
    from reelhf.video import write_video

    rng = random.Random(seed)
    folder = Path(folder)
    media = folder / "media"
    media.mkdir(parents=True, exist_ok=True)
    clips: list[dict[str, Any]] = []
    judgments: list[dict[str, Any]] = []
    preferences: list[dict[str, Any]] = []
    now = datetime.now(timezone.utc).replace(microsecond=0)
    for index in range(num_prompts):
        colour = [rng.random() for _ in range(3)]
        prompt = f"Example {index}: a square of colour {[round(c, 2) for c in colour]} slides to the right."
        common = {
            "prompt_id": prompt_id(prompt),
            "prompt": prompt,
            "language": "en",
            "task_kind": "t2v",
        }
        by_quality = []
        for rank in range(clips_per_prompt):
            quality = rank / (clips_per_prompt - 1)
            frames = torch.full((3, num_frames, size, size), 0.3)
            noise = torch.Generator().manual_seed(seed * 7919 + index * 97 + rank)
            for frame in range(num_frames):
                left = int(frame / num_frames * size * 0.6)
                for channel in range(3):
                    frames[channel, frame, size // 4 : size * 3 // 4, left : left + size // 3] = (
                        colour[channel]
                    )
            frames += (1 - quality) * 0.3 * (torch.rand(frames.shape, generator=noise) - 0.5)
            path = media / f"{index:03d}_{rank}.mp4"
            write_video(path, frames.clamp(0, 1), 8.0)
            sha256 = sha256_file(path)
            by_quality.append(sha256)
            clips.append(
                {
                    **common,
                    "sha256": sha256,
                    "uri": f"media/{path.name}",
                    "project": "example",
                    "model": "example",
                    "stage": "early" if rank < clips_per_prompt / 2 else "late",
                    "checkpoint": None,
                    "seed": rank,
                    "fps": 8.0,
                    "num_frames": num_frames,
                    "width": size,
                    "height": size,
                }
            )
        stage = {clip["sha256"]: clip["stage"] for clip in clips[-clips_per_prompt:]}
        shown = rng.sample(by_quality, len(by_quality))
        for position, dimension in enumerate(rng.sample(DIMENSIONS[:4], 4)):
            judgment = {
                "judgment_id": f"e{index}/{dimension}/final",
                "task_id": f"e{index}",
                "annotator": "example-1",
                "simulated": True,
                "project": "example",
                "round": 0,
                "prompt_id": common["prompt_id"],
                "dimension": dimension,
                "kind": "best_worst",
                "candidates": shown,
                "pick": "final",
                "status": "ok",
                "best": shown.index(by_quality[-1]),
                "worst": shown.index(by_quality[0]),
                "tie": False,
                "admissible": True,
                "constrained": False,
                "dimension_position": position,
                "surplus": False,
                "submitted_at": now,
                "guideline_version": load_guideline().version,
            }
            judgments.append(judgment)
            for worse, better in combinations(by_quality, 2):
                ends = (better == by_quality[-1]) + (worse == by_quality[0])
                if ends == 0:  # two middle clips: best and worst say nothing of their order
                    continue
                a, b = rng.sample((worse, better), 2)
                preferences.append(
                    {
                        **common,
                        "task_id": judgment["task_id"],
                        "round": 0,
                        "dimension": dimension,
                        "clip_a": a,
                        "clip_b": b,
                        "preference": 1 if a == better else -1,
                        "kind": "explicit" if ends == 2 else "implied",
                        "weight": 1.0 if ends == 2 else 0.5,
                        "judgment_ids": [judgment["judgment_id"]],
                        "annotator": judgment["annotator"],
                        "simulated": True,
                        "admissible": True,
                        "constrained": False,
                        "same_stage": stage[a] == stage[b],
                        "split": split_of(common["prompt_id"]),
                    }
                )
    return write_preferences(
        folder,
        clips=clips,
        judgments=judgments,
        preferences=preferences,
        guideline_version=load_guideline().version,
        source_query="example",
    )

"""Candidate clips for the tests of judging: rendered in place of generated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from generator.toyworld import render, scene_from_caption
from reelhf.video import write_video

CLIPS_PER_TASK = 4


def write_candidates(folder: Path, prompts: Sequence[str]) -> Path:
    """One task per prompt: four clips of 5 frames, each darker than the one before."""
    rows = []
    for task, prompt in enumerate(prompts):
        scene = scene_from_caption(prompt)
        assert scene is not None
        for slot in range(CLIPS_PER_TASK):
            frames = render(scene, num_frames=5, size=32, fps=8, seed=slot) * (1 - 0.2 * slot)
            write_video(folder / f"{task}_{slot}.mp4", frames, 8.0)
            row = {"prompt": prompt, "task": task, "stage": "base", "seed": 10 * task + slot}
            row |= {"path": f"{task}_{slot}.mp4", "model": "toy", "checkpoint": "abc", "fps": 8.0}
            rows.append(row)
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder

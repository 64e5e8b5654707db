"""FETV (llyx97/FETV): mean ratings of four models' clips per prompt; every pair of ratings is a verdict.

`reelhf annotate quickstart` opens the same file as a project for people to judge; here its ratings themselves become preference data.
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

from reelhf.errors import UserError
from rewards.importers.tables import ImportedTask, ImportedVerdict

DIMENSIONS = {
    "alignment": "prompt_following",
    "static_quality": "aesthetic_quality",
    "temporal_quality": "motion_quality",
}
"""FETV's rating -> our dimension."""
RATINGS = "ratings.jsonl"


def read_fetv(source: Path) -> list[ImportedTask]:
    """Tasks of a folder that holds ratings.jsonl, or of that file: `prompt`, `clips` with `model`, `path` and ratings."""
    path = source / RATINGS if source.is_dir() else source
    if not path.is_file():
        raise UserError(f"no file at {path}; expected FETV's {RATINGS}")
    lines = path.read_text(encoding="utf-8").splitlines()
    tasks = [_task(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not tasks:
        raise UserError(f"{path} holds no rated prompts")
    return tasks


def _task(path: Path, number: int, line: str) -> ImportedTask:
    try:
        row: dict[str, Any] = json.loads(line)
        prompt, rated = row["prompt"], row["clips"]
        clips = tuple((path.parent / clip["path"], str(clip["model"])) for clip in rated)
        scores = {
            dimension: tuple(float(clip[name]) for clip in rated)
            for name, dimension in DIMENSIONS.items()
            if all(clip.get(name) is not None for clip in rated)
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} line {number}: {type(error).__name__} {error}; expected JSON with `prompt` and `clips`, each with `model`, "
            f"`path` and some of {', '.join(DIMENSIONS)}"
        ) from None
    if len(clips) < 2 or not scores:
        raise UserError(
            f"{path} line {number}: {len(clips)} clips rated in {len(scores)} of {', '.join(DIMENSIONS)}; expected two clips and "
            "one rating at least"
        )
    verdicts = tuple(
        ImportedVerdict(a, b, dimension, (found[a] > found[b]) - (found[a] < found[b]))
        for dimension, found in scores.items()
        for a, b in combinations(range(len(found)), 2)
    )
    return ImportedTask(prompt, clips, verdicts, scores)

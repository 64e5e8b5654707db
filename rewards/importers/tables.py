"""Imported tasks -> the three tables of preference data."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from annotation.records import prompt_id, split_of, write_preferences
from reelhf.errors import UserError
from reelhf.hashing import content_hash, sha256_file
from reelhf.progress import track
from reelhf.video import probe_video
from rewards.importers.alike import Alike, write_alike

UNKNOWN_MODEL = "unknown"


@dataclass(frozen=True)
class ImportedVerdict:
    """What was said of two clips of a task in one dimension."""

    a: int
    b: int
    dimension: str
    preference: int
    """+1: a, -1: b, 0: tie."""


@dataclass(frozen=True)
class ImportedTask:
    """A prompt, its clips and what was said of them."""

    prompt: str
    clips: tuple[tuple[Path, str], ...]
    """File and the model that made it."""
    verdicts: tuple[ImportedVerdict, ...]
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Dimension -> rating of each clip, where clips were rated and the verdicts follow from it."""


@dataclass(frozen=True)
class ImportCounts:
    """What an import wrote."""

    tasks: int
    clips: int
    verdicts: int
    repeated: int
    """Tasks that came more than once, word for word, and count once."""


def write_tasks(
    tasks: Sequence[ImportedTask],
    out: Path,
    *,
    project: str,
    alike: Alike | None = None,
    split: str | None = None,
) -> ImportCounts:
    """Write preference data; which clip of a pair is called a is drawn from the task's own hash.

    Args:
        alike: how clips are made alike, written under out/media; None refers to the files where they are.
        split: one split for all, such as "test" for a benchmark; None splits by prompt as every export does.
    Raises: UserError for a clip that is missing or no video, before anything is written.
    """
    out = Path(out)
    paths = sorted({path for task in tasks for path, _ in task.clips})
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(paths)} clips are missing, first {missing[0]}")
    for path in paths:
        probe_video(path)  # before anything is written
    files = {
        path: write_alike(path, out / "media", alike) if alike else path.resolve()
        for path in track(paths, label="read clips")
    }
    hashes = {path: sha256_file(file) for path, file in files.items()}
    unique = {_task_id(task, hashes): task for task in tasks}
    clips: dict[str, dict[str, Any]] = {}
    judgments: list[dict[str, Any]] = []
    preferences: list[dict[str, Any]] = []
    for task_id, task in unique.items():
        for path, model in task.clips:
            row = _clip_row(files[path], hashes[path], task, model, project, out)
            clips.setdefault(hashes[path], row)
        for dimension in dict.fromkeys(v.dimension for v in task.verdicts):
            judgment = _judgment_row(task_id, task, dimension, hashes, project)
            judgments.append(judgment)
            preferences += _preference_rows(task, judgment, hashes, split)
    write_preferences(
        out,
        clips=clips.values(),
        judgments=judgments,
        preferences=preferences,
        guideline_version=project,
        source_query=f"rewards import {project}",
    )
    return ImportCounts(len(unique), len(clips), len(preferences), len(tasks) - len(unique))


def _task_id(task: ImportedTask, hashes: Mapping[Path, str]) -> str:
    verdicts = [[v.a, v.b, v.dimension, v.preference] for v in task.verdicts]
    return "t" + content_hash(task.prompt, [hashes[path] for path, _ in task.clips], verdicts)[:16]


def _clip_row(
    file: Path, sha: str, task: ImportedTask, model: str, project: str, out: Path
) -> dict[str, Any]:
    info = probe_video(file)
    inside = file.is_relative_to(out.resolve()) or file.is_relative_to(out)
    return {
        "sha256": sha,
        "uri": os.path.relpath(file, out) if inside else str(file),
        "project": project,
        "prompt_id": prompt_id(task.prompt),
        "prompt": task.prompt,
        "language": "en",
        "task_kind": "t2v",
        "model": model,
        "stage": model,
        "fps": info.fps,
        "num_frames": info.frames,
        "width": info.width,
        "height": info.height,
    }


def _judgment_row(
    task_id: str, task: ImportedTask, dimension: str, hashes: Mapping[Path, str], project: str
) -> dict[str, Any]:
    own = [v for v in task.verdicts if v.dimension == dimension]
    scores = task.scores.get(dimension)
    best = worst = None
    if scores:
        if scores.count(max(scores)) == scores.count(min(scores)) == 1:
            best, worst = scores.index(max(scores)), scores.index(min(scores))
    elif len(own) == 1 and own[0].preference:
        best, worst = (own[0].a, own[0].b)[:: own[0].preference]
    tie = all(v.preference == 0 for v in own)
    return {
        "judgment_id": f"{task_id}/{dimension}",
        "task_id": task_id,
        "annotator": f"import-{project}",  # published labels are already people's joint opinion
        "simulated": False,
        "project": project,
        "round": 1,
        "prompt_id": prompt_id(task.prompt),
        "dimension": dimension,
        "kind": "score" if scores else "gsb",
        "candidates": [hashes[path] for path, _ in task.clips],
        "scores": None if scores is None else list(scores),
        "pick": "final",
        "status": "tie" if tie else "ok",
        "best": best,
        "worst": worst,
        "tie": tie,
        "admissible": True,
        "constrained": False,
        "dimension_position": 0,
        "surplus": False,
        "submitted_at": datetime.now(timezone.utc),
        "guideline_version": project,
    }


def _preference_rows(
    task: ImportedTask, judgment: Mapping[str, Any], hashes: Mapping[Path, str], split: str | None
) -> Iterator[dict[str, Any]]:
    rng = random.Random(judgment["judgment_id"])
    for verdict in task.verdicts:
        if verdict.dimension != judgment["dimension"]:
            continue
        a, b, preference = verdict.a, verdict.b, verdict.preference
        if rng.random() < 0.5:  # which clip is called a must say nothing of which is better
            a, b, preference = b, a, -preference
        yield {
            "prompt_id": prompt_id(task.prompt),
            "prompt": task.prompt,
            "language": "en",
            "task_kind": "t2v",
            "task_id": judgment["task_id"],
            "round": 1,
            "dimension": verdict.dimension,
            "clip_a": hashes[task.clips[a][0]],
            "clip_b": hashes[task.clips[b][0]],
            "preference": preference,
            "kind": "explicit",
            "weight": 1.0,
            "judgment_ids": [judgment["judgment_id"]],
            "annotator": judgment["annotator"],
            "simulated": False,
            "admissible": True,
            "constrained": False,
            "same_stage": task.clips[a][1] == task.clips[b][1],
            "split": split or split_of(prompt_id(task.prompt)),
        }

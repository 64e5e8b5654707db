"""Anyone's clips become a labelling project in one command.

Understood: a folder `<model>/<prompt>.mp4` (the file name is the prompt, `_` reads as a space), a manifest `.csv` or `.jsonl` with
the columns path, prompt, model (and, if known, stage, checkpoint, seed, language, task_kind, first_frame), or a JSONL of one object
per prompt with its `clips` (FETV's layout). A folder that holds `manifest.csv`, `manifest.jsonl` or `ratings.jsonl` is read by it.
"""

from __future__ import annotations

import csv
import json
import secrets
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from annotation.known import known_answers
from annotation.presentation import PresentationConfig
from annotation.records import DIMENSIONS, MAX_CLIPS, MIN_CLIPS, ClipRecord, prompt_id
from annotation.store import Store
from reelhf.errors import UserError, did_you_mean
from reelhf.hashing import sha256_file
from reelhf.video import VIDEO_SUFFIXES, probe_video

MANIFEST_NAMES = ("manifest.csv", "manifest.jsonl", "ratings.jsonl")
REQUIRED_COLUMNS = ("path", "prompt", "model")
OPTIONAL_COLUMNS = ("stage", "checkpoint", "seed", "language", "task_kind", "first_frame")
PASSWORD_BYTES = 9


@dataclass(frozen=True)
class Plan:
    """What a source would become."""

    groups: list[list[ClipRecord]]
    """One list of clips per task."""
    mismatches: list[str]
    """What was found and cannot be used, one sentence each."""

    @property
    def num_clips(self) -> int:
        return sum(len(group) for group in self.groups)


@dataclass(frozen=True)
class Project:
    """A project that was made, and how to sign in."""

    folder: Path
    plan: Plan
    num_tasks: int = 0
    admin: str = ""
    password: str = field(default="", repr=False)


def quickstart(
    source: Path | str,
    out: Path | str,
    *,
    k: int = 4,
    need: int = 1,
    dry_run: bool = False,
    with_ratings: bool = False,
    presentation: PresentationConfig | None = None,
) -> Project:
    """Makes an annotation project of the clips in `source`, with an admin account.

    Args:
        k: clips per task, 2 to 8; prompts with more are cut into several tasks, with fewer become smaller tasks.
        need: judgments wanted per task.
        dry_run: only reports; `out` is not touched.
        with_ratings: also imports the ratings of a FETV file as judgments.
        presentation: how clips are made alike.
    Raises: UserError if `k` is out of range, the source is not understood, or no prompt has two usable clips.
    """
    source, out = Path(source), Path(out)
    if not MIN_CLIPS <= k <= MAX_CLIPS:
        raise UserError(f"k is {k}; best and worst need {MIN_CLIPS} to {MAX_CLIPS} clips per task")
    plan = plan_project(source, k=k)
    if not plan.groups and not dry_run:
        shown = "; ".join(plan.mismatches[:3])
        raise UserError(
            f"{source}: no prompt has {MIN_CLIPS} usable clips, so there is nothing to compare. {shown}"
        )
    if dry_run:
        return Project(out, plan)
    if (out / "annotation.db").exists():
        raise UserError(f"{out} already holds a project; name a new folder with --out")
    with Store.open(out) as store:
        if store.counts()["clips"] or store.find_user("admin") is not None:
            raise UserError(f"{out} already holds a project; name a new folder with --out")
        password = secrets.token_urlsafe(PASSWORD_BYTES)
        store.add_user("admin", password, role="admin")
        if with_ratings:
            from annotation.importers import fetv

            tasks = fetv(source, store, need=need, presentation=presentation).num_tasks
        else:
            project = source.resolve().name
            tasks = len(
                add_plan(store, plan, need=need, project=project, presentation=presentation)
            )
    return Project(out, plan, tasks, "admin", password)


def add_plan(
    store: Store,
    plan: Plan,
    *,
    need: int,
    project: str,
    presentation: PresentationConfig | None = None,
) -> list[int]:
    """Adds the plan's clips and tasks to a store; returns the task ids."""
    clips = [clip for group in plan.groups for clip in group]
    ids = iter(store.add_clips(clips, project=project, label="clips"))
    groups = [[next(ids) for _ in group] for group in plan.groups]
    return store.create_tasks(
        groups, need=need, presentation=presentation, label="copies for showing"
    )


def plan_project(source: Path, *, k: int) -> Plan:
    """Groups the clips of a source by prompt and lists what does not fit. Opens every video, writes nothing."""
    records, mismatches = read_source(source)
    by_prompt: dict[str, list[ClipRecord]] = defaultdict(list)
    seen: dict[str, Path] = {}
    for record in records:
        try:
            probe_video(record.path)
        except UserError as error:
            mismatches.append(str(error))
            continue
        sha256 = sha256_file(record.path)
        if sha256 in seen:
            mismatches.append(f"{record.path} has the same bytes as {seen[sha256]}: left out")
            continue
        seen[sha256] = record.path
        by_prompt[prompt_id(record.prompt)].append(record)
    models = {record.model for record in records}
    groups: list[list[ClipRecord]] = []
    for clips in by_prompt.values():
        name = _short(clips[0].prompt)
        if len(clips) < MIN_CLIPS:
            mismatches.append(f"prompt {name!r} has {len(clips)} clip: left out")
            continue
        absent = sorted(models - {clip.model for clip in clips})
        if absent:
            mismatches.append(f"prompt {name!r} has no clip by {', '.join(absent)}")
        clips = sorted(clips, key=lambda clip: (clip.model, str(clip.path)))
        chunks = [clips[start : start + k] for start in range(0, len(clips), k)]
        if len(chunks) > 1 and len(chunks[-1]) < MIN_CLIPS:
            mismatches.append(f"prompt {name!r}: one clip is over after tasks of {k}: left out")
            chunks.pop()
        groups += chunks
    return Plan(groups, mismatches)


@dataclass(frozen=True)
class KnownTask:
    """One line of a file of known answers."""

    clips: list[ClipRecord]
    answers: dict[str, Any]
    kind: str


def read_known(source: Path) -> list[KnownTask]:
    """Tasks with known answers from JSONL. Raises UserError naming the line that lacks something."""
    found = []
    for number, row in jsonl_rows(source):
        missing = [name for name in ("prompt", "clips", "answers") if not row.get(name)]
        if missing:
            raise UserError(f"{source} line {number} has no {', '.join(missing)}")
        try:
            clips = [_record(source.parent, flat) for _, flat in _flatten([(number, row)], source)]
            known_answers(row["answers"], range(1, len(clips) + 1), DIMENSIONS)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{source} line {number}: {error}") from error
        found.append(KnownTask(clips, dict(row["answers"]), str(row.get("kind", "best_worst"))))
    if not found:
        raise UserError(f"{source} names no task")
    return found


def read_source(source: Path) -> tuple[list[ClipRecord], list[str]]:
    """The clips a folder or manifest names, and what in it cannot be used."""
    if source.is_file():
        return _read_manifest(source)
    if not source.is_dir():
        raise UserError(f"no folder or manifest at {source}")
    for name in MANIFEST_NAMES:
        if (source / name).is_file():
            return _read_manifest(source / name)
    return _read_folder(source)


def _read_folder(folder: Path) -> tuple[list[ClipRecord], list[str]]:
    records, mismatches = [], []
    models = sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES:
            mismatches.append(f"{path} lies outside a model's folder: left out")
    for model in models:
        files = [path for path in sorted(model.iterdir()) if not path.name.startswith(".")]
        for path in files:
            if path.suffix.lower() not in VIDEO_SUFFIXES:
                mismatches.append(f"{path} is no video: left out")
            else:
                prompt = path.stem.replace("_", " ").strip()
                records.append(ClipRecord(path, prompt, model.name, model.name))
    if not records:
        raise UserError(
            f"{folder} holds neither `<model>/<prompt>.mp4` nor one of {', '.join(MANIFEST_NAMES)}"
        )
    return records, mismatches


def _read_manifest(path: Path) -> tuple[list[ClipRecord], list[str]]:
    if path.suffix.lower() == ".csv":
        rows = _csv_rows(path)
    elif path.suffix.lower() in (".jsonl", ".json"):
        rows = list(_flatten(jsonl_rows(path), path))
    else:
        raise UserError(f"{path}: a manifest is a .csv or .jsonl file")
    records, mismatches = [], []
    for number, row in rows:
        missing = [name for name in REQUIRED_COLUMNS if not row.get(name)]
        if missing:
            near = "".join(did_you_mean(name, row) for name in missing)
            raise UserError(f"{path} line {number} has no {', '.join(missing)}.{near}")
        try:
            records.append(_record(path.parent, row))
        except ValueError as error:
            mismatches.append(f"{path} line {number}: {error}")
    if not records:
        raise UserError(f"{path} names no clip")
    return records, mismatches


def _record(folder: Path, row: Mapping[str, Any]) -> ClipRecord:
    clip = folder / str(row["path"])
    if not clip.is_file():
        raise ValueError(f"{clip} is missing")
    values = {name: row[name] for name in OPTIONAL_COLUMNS if row.get(name) not in (None, "")}
    if "seed" in values:
        values["seed"] = int(values["seed"])
    if "first_frame" in values:
        values["first_frame"] = folder / str(values["first_frame"])
        values.setdefault("task_kind", "i2v")
    if values.get("checkpoint") is not None:
        values["checkpoint"] = str(values["checkpoint"])
    values.setdefault("stage", str(row["model"]))
    return ClipRecord(clip, str(row["prompt"]), str(row["model"]), **values)


def _csv_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [(number, row) for number, row in enumerate(csv.DictReader(file), start=2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def jsonl_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line. Raises UserError naming the first line that is not a JSON object."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number} is not a JSON object")
        rows.append((number, row))
    return rows


def _flatten(
    rows: Sequence[tuple[int, dict[str, Any]]], path: Path
) -> Iterable[tuple[int, dict[str, Any]]]:
    """One row per clip, also where a line holds a prompt and its list of clips."""
    for number, row in rows:
        clips = row.get("clips")
        if clips is None:
            yield number, row
            continue
        if not isinstance(clips, list) or not all(isinstance(clip, dict) for clip in clips):
            raise UserError(f"{path} line {number}: `clips` is not a list of objects")
        for clip in clips:
            yield number, {"prompt": row.get("prompt"), **clip}


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"

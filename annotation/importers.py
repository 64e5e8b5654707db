"""Judgments that other projects collected, as ours."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select

from annotation import schema as t
from annotation.accounts import Account
from annotation.presentation import PresentationConfig
from annotation.quickstart import Plan, add_plan, jsonl_rows
from annotation.records import MAX_CLIPS, MIN_CLIPS, ClipRecord
from annotation.rules import clashes, derive_pick
from annotation.store import Store
from reelhf.errors import UserError
from reelhf.hashing import content_hash

FETV_DIMENSIONS = {
    "alignment": "prompt_following",
    "static_quality": "aesthetic_quality",
    "temporal_quality": "motion_quality",
}
"""FETV's rating -> our dimension."""
FETV_ANNOTATOR = "import-fetv-mean"
"""The ratings are means over FETV's raters: one pseudonym stands for all of them."""


@dataclass(frozen=True)
class Imported:
    """What came in."""

    num_tasks: int
    num_clips: int
    num_judgments: int


def fetv(
    folder: Path | str,
    store: Store,
    *,
    need: int = 1,
    presentation: PresentationConfig | None = None,
) -> Imported:
    """Imports FETV: a task per prompt for people to judge, and its ratings as judgments of kind `score`.

    The ratings take no place of a person: the tasks stay open for `need` judgments. Importing the same file again adds nothing.

    Args:
        folder: holds `ratings.jsonl` and the clips it names.
        presentation: how clips are made alike.
    Raises: UserError naming a line without the expected fields, or a clip that is missing.
    """
    folder = Path(folder)
    path = folder / "ratings.jsonl" if folder.is_dir() else folder
    rows = jsonl_rows(path)
    groups = [_clips(path, number, row) for number, row in rows]
    with store.read() as connection:
        known = set(connection.execute(select(t.judgment.c.idempotency_key)).scalars())
    keys = [f"import:fetv:{content_hash(row)[:40]}" for _, row in rows]
    new = [index for index, key in enumerate(keys) if key not in known]
    plan = Plan([groups[index] for index in new], [])
    tasks = (
        add_plan(store, plan, need=need, project="fetv", presentation=presentation) if new else []
    )
    account = _import_account(store)
    for task_id, index in zip(tasks, new, strict=True):
        _store_ratings(store, account, task_id, keys[index], rows[index][1])
    return Imported(len(tasks), plan.num_clips, len(tasks))


def _clips(path: Path, number: int, row: Mapping[str, Any]) -> list[ClipRecord]:
    clips = row.get("clips")
    if not isinstance(row.get("prompt"), str) or not isinstance(clips, list):
        raise UserError(f"{path} line {number}: expected `prompt` and a list `clips`")
    if not MIN_CLIPS <= len(clips) <= MAX_CLIPS:
        raise UserError(
            f"{path} line {number} has {len(clips)} clips; a task takes {MIN_CLIPS} to {MAX_CLIPS}"
        )
    records = []
    for clip in clips:
        absent = [name for name in ("model", "path") if name not in clip]
        if absent:
            raise UserError(f"{path} line {number}: a clip has no {', '.join(absent)}")
        file = path.parent / clip["path"]
        if not file.is_file():
            raise UserError(f"{path} line {number}: {file} is missing")
        records.append(ClipRecord(file, row["prompt"], clip["model"], clip["model"]))
    return records


def _import_account(store: Store) -> Account:
    found = store.find_user(FETV_ANNOTATOR)
    return found or store.add_user(FETV_ANNOTATOR, secrets.token_urlsafe(32))  # nobody signs in


def _store_ratings(
    store: Store, account: Account, task_id: int, key: str, row: Mapping[str, Any]
) -> None:
    """One judgment of kind `score`, with the best and worst that the ratings imply."""
    rated = {
        dimension: [float(clip[name]) for clip in row["clips"]]
        for name, dimension in FETV_DIMENSIONS.items()
        if all(clip.get(name) is not None for clip in row["clips"])
    }
    picks = {dimension: derive_pick(scores) for dimension, scores in rated.items()}
    pairs = {d: (p.best, p.worst) for d, p in picks.items() if p.best is not None}
    # Ratings have no order in time, so both sides of a clash lose their admissibility.
    clashing = {name for clash in clashes(pairs) for name in (clash.dimension, clash.other)}  # type: ignore[arg-type]
    now = store.now_ms()
    with store.write() as connection:
        clips = connection.execute(
            select(t.task_clip.c.clip_id)
            .where(t.task_clip.c.task_id == task_id)
            .order_by(t.task_clip.c.slot)
        )
        presentation = connection.execute(
            insert(t.presentation).values(
                token=secrets.token_urlsafe(18),
                task_id=task_id,
                account_id=account.id,
                clip_order=list(clips.scalars()),
                dimension_order=list(rated),
                guideline_version="fetv",
                shown_ms=now,
            )
        ).inserted_primary_key
        assert presentation is not None
        judgment = connection.execute(
            insert(t.judgment).values(
                task_id=task_id,
                account_id=account.id,
                presentation_id=presentation[0],
                idempotency_key=key,
                payload_hash=content_hash(row),
                kind="score",
                surplus=False,
                simulated=False,
                guideline_version="fetv",
                note="",
                submitted_ms=now,
            )
        ).inserted_primary_key
        assert judgment is not None
        connection.execute(
            insert(t.choice),
            [
                {
                    "judgment_id": judgment[0],
                    "dimension": dimension,
                    "position": position,
                    "status": "tie" if picks[dimension].tie else "ok",
                    "best": picks[dimension].best,
                    "worst": picks[dimension].worst,
                    "first_best": picks[dimension].best,
                    "first_worst": picks[dimension].worst,
                    "constrained": False,
                    "admissible": dimension not in clashing,
                    "scores": scores,
                }
                for position, (dimension, scores) in enumerate(rated.items())
            ],
        )

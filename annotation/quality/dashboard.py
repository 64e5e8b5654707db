"""The dashboard's figures as values of its components, by name. The page shows them; `page` says which component is which."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from annotation import schema as t
from annotation.disk import disk_use, human_bytes
from annotation.export import ExportQuery, judgment_table
from annotation.projects import project_id
from annotation.quality.report import (
    Judged,
    agreement_report,
    gold_answers,
    leaderboard_report,
    quality_report,
)
from annotation.store import Store

NEWEST_JUDGMENTS = 5000
"""Statistics are of the last so many; more would keep the page waiting."""
NUM_BOOTSTRAP = 200
KEPT_SECONDS = 20.0
HOUR_MS = 3_600_000
THROUGHPUT_HOURS = 14 * 24
LARGEST_CLIPS = 30

_kept: dict[tuple[str, str | None, str], tuple[float, dict[str, Any]]] = {}
_lock = threading.Lock()


def dashboard(store: Store, project: str | None, *, by: str = "model") -> dict[str, Any]:
    """Every component's value, no older than `KEPT_SECONDS`: many reviewers cost what one does.

    Args:
        project: figures of this project; all by default.
        by: what the leaderboard ranks.
    Raises: UserError if there is no such project or ranking.
    """
    key = (store.database.name, project, by)
    with _lock:  # one computes, the others wait for it
        at, values = _kept.get(key, (-KEPT_SECONDS, {}))
        if time.monotonic() - at > KEPT_SECONDS:
            values = _compute(store, project, by)
            _kept[key] = (time.monotonic(), values)
    return values


def _compute(store: Store, project: str | None, by: str) -> dict[str, Any]:
    query = ExportQuery(project=project)
    judgments, clips = judgment_table(store, query, newest=NEWEST_JUDGMENTS)
    judged = Judged(judgments, clips, gold_answers(store))
    states, hours = _progress(store, project)
    quality = quality_report(judged)
    board = leaderboard_report(judged, by=by, num_bootstrap=NUM_BOOTSTRAP)
    agreement = agreement_report(judged, num_bootstrap=NUM_BOOTSTRAP)
    disk = disk_use(store)
    return {
        "summary": _summary(states, judgments, disk.total),
        "progress": _plot("bar", ("state", "tasks"), sorted(states.items())),
        "throughput": _plot("line", ("hour", "judgments"), hours, temporal="hour"),
        "agreement": _plot(
            "bar",
            ("dimension", "alpha"),
            [
                (_words(n), a["alpha"])
                for n, a in agreement["orders"].items()
                if a["alpha"] is not None
            ],
        ),
        "agreement_table": _table(
            ("dimension", "alpha", "low", "high", "same order", "chance", "pairs"),
            [
                (
                    _words(name),
                    *(_round(a[k]) for k in ("alpha", "low", "high", "observed", "chance")),
                    a["num_units"],
                )
                for name, a in agreement["orders"].items()
            ],
        ),
        "annotators": _annotators(quality["annotators"]),
        "position": _plot(
            "bar",
            ("place", "times best"),
            [
                (f"{place + 1} of {num_clips}", count)
                for num_clips, bias in quality["position_bias"].items()
                for place, count in enumerate(bias["best"])
            ],
        ),
        "position_table": _table(
            ("clips", "chi-square", "p"),
            [
                (num_clips, _round(bias["chi_square"]), _round(bias["p_value"], 4))
                for num_clips, bias in quality["position_bias"].items()
            ],
        ),
        "vetoes": _plot(
            "bar",
            ("pair of dimensions", "clash %"),
            [
                (f"{_short(v['dimension'])} / {_short(v['other'])}", 100 * v["share"])
                for v in quality["vetoes"]
                if v["share"] is not None
            ],
        ),
        "board": _plot(
            "bar", ("name", "rating"), [(r["name"], r["rating"]) for r in board["ratings"]]
        ),
        "board_table": _table(
            (by, "rating", "low", "high", "wins", "ties", "losses"),
            [
                (
                    r["name"],
                    *(_round(r[k], 0) for k in ("rating", "low", "high")),
                    r["wins"],
                    r["ties"],
                    r["losses"],
                )
                for r in board["ratings"]
            ],
        ),
        "disk": _plot(
            "bar",
            ("what", "MB"),
            [
                (name, getattr(disk, name) / 2**20)
                for name in ("originals", "copies", "pictures", "database", "snapshots")
            ],
        ),
        "clips": _table(
            ("clip", "model", "original", "copies", "age, days", "past retention"),
            [
                (
                    clip.sha256[:12],
                    clip.model,
                    human_bytes(clip.original),
                    f"{human_bytes(clip.copies)} in {clip.num_copies}",
                    _round(clip.age_days, 1),
                    "yes" if clip.expired else "",
                )
                for clip in disk.clips[:LARGEST_CLIPS]
            ],
        ),
    }


def _progress(store: Store, project: str | None) -> tuple[dict[str, int], list[tuple[int, int]]]:
    """Tasks by state, and judgments per hour of the last two weeks (milliseconds of the hour, number)."""
    hour = t.judgment.c.submitted_ms - t.judgment.c.submitted_ms % HOUR_MS
    with store.read() as connection:
        where = []
        if project is not None:
            where.append(t.task.c.project_id == project_id(connection, project))
        counted = select(t.task.c.state, sa.func.count()).where(*where).group_by(t.task.c.state)
        states = {str(state): int(number) for state, number in connection.execute(counted)}
        recent = t.judgment.c.submitted_ms > store.now_ms() - THROUGHPUT_HOURS * HOUR_MS
        found = Counter(
            connection.execute(
                select(hour).join(t.task, t.task.c.id == t.judgment.c.task_id).where(recent, *where)
            ).scalars()
        )
    return states, sorted((int(at), number) for at, number in found.items())


def _summary(states: dict[str, int], judgments: Sequence[Any], num_bytes: int) -> str:
    tasks, done = sum(states.values()), states.get("done", 0)
    people = len({row["annotator"] for row in judgments})
    answers = len({(row["annotator"], row["task_id"]) for row in judgments})
    return (
        f"**{done} of {tasks}** tasks done, {states.get('open', 0)} open, {states.get('flagged', 0)} flagged · "
        f"statistics of the last **{answers}** judgments by **{people}** annotators · {human_bytes(num_bytes)} on disk"
    )


def _annotators(people: Sequence[Any]) -> dict[str, Any]:
    head = (
        "annotator",
        "tasks",
        "median s",
        "too fast %",
        "gold %",
        "retest %",
        "as others %",
        "skill",
        "ability",
    )
    return _table(
        head,
        [
            (
                one["annotator"],
                one["tasks"],
                _round(one["median_seconds"], 1),
                *(
                    _percent(one[name]["share"])
                    for name in ("too_fast", "gold", "retest", "agrees_with_others")
                ),
                _round(one["skill"]),
                _round(one["ability"]),
            )
            for one in sorted(people, key=lambda one: one["ability"] or 0.0)
        ],
    )


def _plot(
    mark: str, columns: tuple[str, str], rows: Sequence[tuple[Any, Any]], *, temporal: str = ""
) -> dict[str, Any]:
    """What a native plot takes in the browser (`gradio.components.native_plot.PlotData`)."""
    kinds = {columns[0]: "temporal" if temporal else "nominal", columns[1]: "quantitative"}
    return {
        "columns": list(columns),
        "data": [list(row) for row in rows],
        "datatypes": kinds,
        "mark": mark,
    }


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    return {
        "headers": list(head),
        "data": [["-" if cell is None else cell for cell in row] for row in rows],
        "metadata": None,
    }


def _round(value: float | None, digits: int = 2) -> float | None:
    return None if value is None else round(value, digits)


def _percent(share: float | None) -> int | None:
    return None if share is None else round(100 * share)


def _words(dimension: str) -> str:
    return dimension.replace("_", " ")


def _short(dimension: str) -> str:
    return dimension.partition("_")[0]

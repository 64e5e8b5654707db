"""Judgments become preference data (contract 3 of the design).

What a judgment yields, per dimension:
- a free, admissible pick: one `explicit` pair (best over worst, weight 1) and the other 2K - 4 pairs that best and worst imply;
- a pick made after a veto: its explicit pair only, `constrained`; beside it the vetoed free pick, whole, with `admissible` false
  (an honest opinion of this dimension that must not reach the composite or DPO);
- a tie: one explicit tie between two clips drawn at random, the other pairs as implied ties;
- a pair that was called good, same or bad (`gsb`): that pair, or a tie;
- scores: every pair; the one of best and worst is explicit, the others implied.

Of a judgment that was changed, the latest revision counts. Gold tasks and re-tests are in the table of judgments, with their
`purpose`, and yield no preferences; practice and exams are left out. What an expert decided about a conflict is one more
annotator's judgment, or (`adjudicated_only`) the only one of that task.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import combinations
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from annotation import schema as t
from annotation.history import is_latest
from annotation.records import split_of, write_preferences
from annotation.routing import COUNTED
from annotation.store import Store

IMPLIED_WEIGHT = 0.5
"""The rule has checked the explicit pair only; an implied one counts half (our choice)."""


@dataclass(frozen=True)
class Pair:
    """Two clips of one judgment, as indices in the order shown; `preference` is +1 if `a` is better, 0 for a tie."""

    a: int
    b: int
    preference: int
    kind: str


def best_worst_pairs(best: int, worst: int, num_clips: int) -> list[Pair]:
    """The 2K - 3 pairs that best and worst order; only (best, worst) is explicit."""
    rest = [i for i in range(num_clips) if i not in (best, worst)]
    return [
        Pair(best, worst, 1, "explicit"),
        *(Pair(best, i, 1, "implied") for i in rest),
        *(Pair(i, worst, 1, "implied") for i in rest),
    ]


def tie_pairs(num_clips: int, rng: random.Random) -> list[Pair]:
    """All pairs as ties; one drawn at random is explicit, so that a tie weighs as much as a pick."""
    pairs = list(combinations(range(num_clips), 2))
    chosen = rng.choice(pairs)
    return [Pair(a, b, 0, "explicit" if (a, b) == chosen else "implied") for a, b in pairs]


def score_pairs(scores: Sequence[float], best: int | None, worst: int | None) -> list[Pair]:
    """Every pair of rated clips; equal ratings are ties."""
    found = []
    for a, b in combinations(range(len(scores)), 2):
        preference = (scores[a] > scores[b]) - (scores[a] < scores[b])
        kind = "explicit" if best is not None and {a, b} == {best, worst} else "implied"
        found.append(Pair(a, b, preference, kind))
    return found


def export_preferences(
    store: Store,
    out: Path | str,
    *,
    include_implied: bool = True,
    fmt: str = "parquet",
    project: str | None = None,
    min_round: int = 0,
    max_round: int | None = None,
    exclude_simulated: bool = False,
    adjudicated_only: bool = False,
) -> Path:
    """Writes the preference data of a project; the same judgments give the same tables.

    Args:
        include_implied: also the pairs that best and worst imply (marked `implied`).
        fmt: `parquet` or `jsonl`.
        project, min_round, max_round, exclude_simulated: which judgments; written into the manifest as its source query.
        adjudicated_only: of tasks that an expert decided, the preferences come from the decision alone.
    Returns: the folder, readable by `annotation.records.read_preferences`.
    """
    out = Path(out)
    where: list[sa.ColumnElement[bool]] = [
        t.task.c.round >= min_round,
        t.judgment.c.purpose.in_(COUNTED),
        is_latest(),
    ]
    if project is not None:
        where.append(t.task.c.project == project)
    if max_round is not None:
        where.append(t.task.c.round <= max_round)
    if exclude_simulated:
        where.append(~t.judgment.c.simulated)
    with store.read() as connection:
        clips = {row.id: dict(row._mapping) for row in connection.execute(_clips)}
        judged = list(connection.execute(_choices.where(*where)))
    decided = {row.task_id for row in judged if row.purpose == "adjudication"}
    overruled = decided if adjudicated_only else set()
    judgments: list[dict[str, Any]] = []
    preferences: list[dict[str, Any]] = []
    used: set[int] = set()
    for row in judged:
        used.update(row.clip_order)
        shown = [clips[clip_id] for clip_id in row.clip_order]
        for judgment, pairs in _rows_of_choice(row, shown):
            judgments.append(judgment)
            teaches = row.purpose == "adjudication" or (
                row.purpose == "work" and row.task_id not in overruled
            )
            if not teaches:
                continue
            preferences += _preference_rows(row, shown, judgment, pairs, include_implied)
    _add_agreement(preferences)
    clip_rows = [_clip_row(store, out, clips[clip_id]) for clip_id in sorted(used)]
    counts: dict[str, int] = defaultdict(int)
    for judgment in judgments:
        if judgment["pick"] == "final":
            counts["constrained" if judgment["constrained"] else judgment["status"]] += 1
        else:
            counts["vetoed"] += 1
    query = {
        "project": project,
        "min_round": min_round,
        "max_round": max_round,
        "exclude_simulated": exclude_simulated,
        "include_implied": include_implied,
        "adjudicated_only": adjudicated_only,
    }
    versions = sorted({j["guideline_version"] for j in judgments})
    return write_preferences(
        out,
        clips=clip_rows,
        judgments=judgments,
        preferences=preferences,
        guideline_version=", ".join(versions) or store.guideline.version,
        source_query=", ".join(f"{key}={value}" for key, value in query.items()),
        fmt=fmt,
        extra={"answers": dict(counts)},
    )


_clips = select(
    t.clip, t.prompt.c.text.label("prompt_text"), t.prompt.c.language.label("prompt_language")
).join(t.prompt, t.prompt.c.prompt_id == t.clip.c.prompt_id)

_choices = (
    select(
        t.choice,
        t.judgment.c.task_id,
        t.judgment.c.kind,
        t.judgment.c.purpose,
        t.judgment.c.revision,
        t.judgment.c.surplus,
        t.judgment.c.simulated,
        t.judgment.c.guideline_version,
        t.judgment.c.seconds,
        t.judgment.c.submitted_ms,
        t.account.c.pseudonym,
        t.presentation.c.clip_order,
        t.presentation.c.shown_ms,
        t.task.c.project,
        t.task.c.round,
        t.task.c.prompt_id,
        t.task.c.task_kind,
        t.prompt.c.text,
        t.prompt.c.language,
        t.prompt.c.cluster,
    )
    .join(t.judgment, t.judgment.c.id == t.choice.c.judgment_id)
    .join(t.presentation, t.presentation.c.id == t.judgment.c.presentation_id)
    .join(t.account, t.account.c.id == t.judgment.c.account_id)
    .join(t.task, t.task.c.id == t.judgment.c.task_id)
    .join(t.prompt, t.prompt.c.prompt_id == t.task.c.prompt_id)
    .order_by(t.judgment.c.id, t.choice.c.position)
)


def _rows_of_choice(
    row: Any, shown: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[dict[str, Any], list[Pair]]]:
    """One judgment row per pick, with the pairs it yields."""
    common = {
        "task_id": f"t{row.task_id}",
        "annotator": row.pseudonym,
        "simulated": row.simulated,
        "project": row.project,
        "round": row.round,
        "prompt_id": row.prompt_id,
        "dimension": row.dimension,
        "kind": row.kind,
        "candidates": [clip["sha256"] for clip in shown],
        "scores": row.scores,
        "dimension_position": row.position,
        "surplus": row.surplus,
        "shown_at": None if row.shown_ms == row.submitted_ms else _when(row.shown_ms),
        "submitted_at": _when(row.submitted_ms),
        "seconds": row.seconds,
        "guideline_version": row.guideline_version,
        "purpose": row.purpose,
        "revision": row.revision,
        "confirmed": row.confirmed,
    }
    vetoed = row.constrained or row.status == "no_valid_pair"
    name = f"j{row.judgment_id}/{row.dimension}"
    if vetoed and row.first_best is not None:
        yield (
            {
                **common,
                "judgment_id": f"{name}/first",
                "pick": "first",
                "status": "vetoed",
                "best": row.first_best,
                "worst": row.first_worst,
                "tie": False,
                "admissible": False,
                "constrained": False,
            },
            best_worst_pairs(row.first_best, row.first_worst, len(shown)),
        )
    final = {
        **common,
        "judgment_id": f"{name}/final",
        "pick": "final",
        "status": row.status,
        "best": row.best,
        "worst": row.worst,
        "tie": row.status == "tie",
        "admissible": row.admissible,
        "constrained": row.constrained,
    }
    if row.scores is not None:
        pairs = score_pairs(row.scores, row.best, row.worst)
    elif row.status == "ok":
        pairs = best_worst_pairs(row.best, row.worst, len(shown))
    elif row.status == "tie":
        pairs = tie_pairs(len(shown), _rng(final["judgment_id"]))
    else:
        pairs = []
    if row.constrained:
        pairs = [pair for pair in pairs if pair.kind == "explicit"]
    yield final, pairs


def _preference_rows(
    row: Any,
    shown: Sequence[Mapping[str, Any]],
    judgment: Mapping[str, Any],
    pairs: Sequence[Pair],
    include_implied: bool,
) -> list[dict[str, Any]]:
    rng = _rng("order", judgment["judgment_id"], judgment["candidates"])
    pictures = [clip["first_frame_sha256"] for clip in shown if clip["first_frame_sha256"]]
    rows = []
    for pair in pairs:
        swap = rng.random() < 0.5  # which clip is called a must say nothing of which is better
        if pair.kind == "implied" and not include_implied:
            continue
        a, b = (pair.b, pair.a) if swap else (pair.a, pair.b)
        rows.append(
            {
                "prompt_id": row.prompt_id,
                "prompt": row.text,
                "language": row.language,
                "task_kind": row.task_kind,
                "first_frame_sha256": pictures[0] if pictures else None,
                "task_id": judgment["task_id"],
                "round": row.round,
                "dimension": row.dimension,
                "clip_a": shown[a]["sha256"],
                "clip_b": shown[b]["sha256"],
                "preference": -pair.preference if swap else pair.preference,
                "kind": pair.kind,
                "weight": 1.0 if pair.kind == "explicit" else IMPLIED_WEIGHT,
                "judgment_ids": [judgment["judgment_id"]],
                "annotator": row.pseudonym,
                "simulated": row.simulated,
                "admissible": judgment["admissible"],
                "constrained": judgment["constrained"],
                "same_stage": shown[a]["stage"] == shown[b]["stage"],
                "agreement": None,
                "split": split_of(row.cluster),
            }
        )
    return rows


def _add_agreement(preferences: list[dict[str, Any]]) -> None:
    """Fills `agreement`: among the other annotators' rows for the same pair and dimension, the fraction that say the same."""
    groups: dict[tuple[str, str, frozenset[str]], list[dict[str, Any]]] = defaultdict(list)
    for row in preferences:
        pair = frozenset((row["clip_a"], row["clip_b"]))
        groups[row["task_id"], row["dimension"], pair].append(row)
    for rows in groups.values():
        for row in rows:
            others = [
                other["preference"] if other["clip_a"] == row["clip_a"] else -other["preference"]
                for other in rows
                if other["annotator"] != row["annotator"]
            ]
            if others:
                row["agreement"] = sum(o == row["preference"] for o in others) / len(others)


def _clip_row(store: Store, out: Path, clip: Mapping[str, Any]) -> dict[str, Any]:
    def uri(key: str | None) -> str | None:
        return key and Path(os.path.relpath(store.media / key, out)).as_posix()

    copied = (
        "sha256",
        "project",
        "prompt_id",
        "task_kind",
        "first_frame_sha256",
        "model",
        "stage",
        "checkpoint",
        "seed",
        "fps",
        "num_frames",
        "width",
        "height",
    )
    return {
        **{name: clip[name] for name in copied},
        "prompt": clip["prompt_text"],
        "language": clip["prompt_language"],
        "uri": uri(clip["storage_key"]),
        "first_frame_uri": uri(clip["first_frame_key"]),
    }


def _rng(*parts: object) -> random.Random:
    return random.Random(hashlib.sha256(repr(parts).encode()).digest())


def _when(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, tz=timezone.utc)

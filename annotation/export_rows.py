"""From one stored choice to the rows of an export. Pure: what was read goes in, rows and pairs come out."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from annotation.pairs import Pair, judgment_pairs
from annotation.records import split_of

IMPLIED_WEIGHT = 0.5
"""The rule has checked the explicit pair only; an implied one counts half (our choice)."""

Shown = Sequence[Mapping[str, Any]]
"""The clips of one showing in their order: sha256, stage, first_frame_sha256, purged_ms."""


def picks_of(row: Any, candidates: Sequence[Any]) -> list[dict[str, Any]]:
    """What was said in one dimension: the final answer, and before it the free pick that was vetoed, if one was.

    Args:
        candidates: the clips in the order shown, by sha256 or by any other name.
    """
    name = f"j{row.judgment_id}/{row.dimension}"
    common = {"candidates": list(candidates), "scores": row.scores}
    picks = []
    if (row.constrained or row.status == "no_valid_pair") and row.first_best is not None:
        picks.append(
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
            }
        )
    picks.append(
        {
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
    )
    return picks


def pairs_of(pick: Mapping[str, Any], *, implied: bool = True) -> list[Pair]:
    """The pairs that a pick orders or ties; the same pick always gives the same."""
    return judgment_pairs(pick, lambda: _rng(pick["judgment_id"]), implied=implied)


def judgment_row(row: Any, pick: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the `judgments` table."""
    return {
        **pick,
        "task_id": f"t{row.task_id}",
        "annotator": row.pseudonym,
        "simulated": row.simulated,
        "project": row.project,
        "round": row.round,
        "prompt_id": row.prompt_id,
        "dimension": row.dimension,
        "kind": row.kind,
        "dimension_position": row.position,
        "surplus": row.surplus,
        "shown_at": _when(row.shown_ms) if _was_shown(row) else None,
        "submitted_at": _when(row.submitted_ms),
        "seconds": row.seconds,
        "guideline_version": row.guideline_version,
        "purpose": row.purpose,
        "revision": row.revision,
        "confirmed": row.confirmed,
    }


def preference_rows(
    row: Any,
    shown: Shown,
    pick: Mapping[str, Any],
    pairs: Sequence[Pair],
    *,
    include_implied: bool,
    votes: Votes,
) -> list[dict[str, Any]]:
    """Rows of the `preferences` table.

    Args:
        votes: what everyone said of this task's pairs, for `agreement`.
    """
    rng = _rng("order", pick["judgment_id"], pick["candidates"])
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
                "task_id": f"t{row.task_id}",
                "round": row.round,
                "dimension": row.dimension,
                "clip_a": shown[a]["sha256"],
                "clip_b": shown[b]["sha256"],
                "preference": -pair.preference if swap else pair.preference,
                "kind": pair.kind,
                "weight": 1.0 if pair.kind == "explicit" else IMPLIED_WEIGHT,
                "judgment_ids": [pick["judgment_id"]],
                "annotator": row.pseudonym,
                "simulated": row.simulated,
                "admissible": pick["admissible"],
                "constrained": pick["constrained"],
                "same_stage": shown[a]["stage"] == shown[b]["stage"],
                "agreement": votes.agreement(row, pair),
                "split": split_of(row.cluster),
            }
        )
    return rows


class Votes:
    """What everyone said of the pairs of one task."""

    def __init__(self, rows: Sequence[Any], *, include_implied: bool):
        """Takes the task's choices; without implied pairs only the explicit ones are compared."""
        self._said: dict[Any, list[tuple[int, int]]] = defaultdict(list)
        for row in rows:
            for pick in picks_of(row, row.clip_order):
                for pair in pairs_of(pick, implied=include_implied):
                    key, label = _unit(row, pair)
                    self._said[key].append((row.account_id, label))

    def agreement(self, row: Any, pair: Pair) -> float | None:
        """Among the other annotators' votes on this pair and dimension, the share that say the same; None without any."""
        key, label = _unit(row, pair)
        others = [said for account, said in self._said[key] if account != row.account_id]
        return sum(said == label for said in others) / len(others) if others else None


def _unit(row: Any, pair: Pair) -> tuple[Any, int]:
    """The name of a pair in a dimension, the same for everyone, and the label under that name."""
    a, b = row.clip_order[pair.a], row.clip_order[pair.b]
    if a < b:
        return (row.dimension, a, b), pair.preference
    return (row.dimension, b, a), -pair.preference


def _was_shown(row: Any) -> bool:
    """False for what was imported: nobody saw it on the page, and nobody measured the time."""
    return row.seconds is not None or row.shown_ms != row.submitted_ms


def _rng(*parts: object) -> random.Random:
    return random.Random(hashlib.sha256(repr(parts).encode()).digest())


def _when(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, tz=timezone.utc)

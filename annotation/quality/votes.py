"""Judgments as votes on pairs of clips: what agreement, rater models and leaderboards all count."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from annotation.pairs import judgment_pairs

Row = Mapping[str, Any]
"""A row of the `judgments` or `clips` table of the preference data."""


@dataclass(frozen=True)
class Vote:
    """What one annotator said of two clips in one dimension. `clip_a < clip_b`, so the same pair has one name."""

    annotator: str
    prompt_id: str
    task_id: str
    dimension: str
    clip_a: str
    clip_b: str
    label: int
    """+1: a is better, -1: b is, 0: a tie."""

    @property
    def unit(self) -> tuple[str, str, str]:
        """What several annotators may have labelled."""
        return self.task_id, self.clip_a, self.clip_b


def free_picks(judgments: Iterable[Row]) -> list[Row]:
    """The rows that say what someone freely thought: vetoed first picks count, picks made after a veto do not."""
    return [row for row in judgments if not row["constrained"]]


def votes_of(judgments: Iterable[Row], *, purpose: str = "work") -> list[Vote]:
    """Every pair that the free picks order or tie, explicit and implied.

    Args:
        purpose: of the judgments that count; gold tasks, re-tests and an expert's decisions are no votes of `work`.
    """
    found = []
    rng = random.Random(0)  # which pair of a tie is explicit plays no part here
    for row in free_picks(judgments):
        if (row.get("purpose") or "work") != purpose:
            continue
        for pair in judgment_pairs(row, lambda: rng):
            a, b, label = row["candidates"][pair.a], row["candidates"][pair.b], pair.preference
            if a > b:
                a, b, label = b, a, -label
            found.append(
                Vote(
                    row["annotator"],
                    row["prompt_id"],
                    row["task_id"],
                    row["dimension"],
                    a,
                    b,
                    label,
                )
            )
    return found

"""Known answers: how they are stated, stored and compared. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from annotation.records import SCORES, Choice

SCORE_TOLERANCE = 1
"""A score this far from the known one still counts as right."""


@dataclass(frozen=True)
class Graded:
    """One answer against the known one; clips are places in the order shown."""

    dimension: str
    correct: bool
    best: int | None = None
    worst: int | None = None
    tie: bool = False
    scores: tuple[int | None, ...] | None = None
    why: Mapping[str, str] | None = None
    """Language -> explanation."""


def known_answers(
    raw: Mapping[str, Mapping[str, Any]], clip_ids: Sequence[int], dimensions: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Answers stated by the place of a clip in its task, as they are stored: by clip id.

    Args:
        raw: dimension -> `best` and/or `worst` (counted from 0), or `tie: true`, or `scores`; and `why`, a text or one per language.
    Raises: ValueError saying what is wrong.
    """
    found: dict[str, dict[str, Any]] = {}
    for dimension, answer in raw.items():
        if dimension not in dimensions:
            raise ValueError(f"no dimension {dimension!r} is asked; asked: {', '.join(dimensions)}")
        stored: dict[str, Any] = {}
        for side in ("best", "worst"):
            if answer.get(side) is not None:
                if answer[side] not in range(len(clip_ids)):
                    raise ValueError(f"{dimension}: {side} is {answer[side]!r}; clips count from 0")
                stored[side] = clip_ids[answer[side]]
        if answer.get("tie"):
            stored["tie"] = True
        if answer.get("scores") is not None:
            if len(answer["scores"]) != len(clip_ids) or set(answer["scores"]) - set(SCORES):
                raise ValueError(f"{dimension}: scores are {len(clip_ids)} numbers from 1 to 5")
            stored["scores"] = dict(zip(map(str, clip_ids), answer["scores"], strict=True))
        if not stored or stored.get("best") == stored.get("worst", -1):
            raise ValueError(f"{dimension}: state best, worst, tie or scores; best is not worst")
        why = answer.get("why")
        if why:
            stored["why"] = {"en": why} if isinstance(why, str) else dict(why)
        found[dimension] = stored
    if not found:
        raise ValueError("no answer is stated")
    return found


def grade(
    answers: Mapping[str, Mapping[str, Any]], choices: Sequence[Choice], clip_order: Sequence[int]
) -> list[Graded]:
    """Each answer with a known one, against it. Where the rule vetoed a pick, the free pick is what is graded."""
    place: dict[int | None, int] = {clip_id: index for index, clip_id in enumerate(clip_order)}
    graded = []
    for choice in choices:
        answer = answers.get(choice.dimension)
        if answer is None:
            continue
        best, worst = place.get(answer.get("best")), place.get(answer.get("worst"))
        tie, why = bool(answer.get("tie")), answer.get("why")
        scores: tuple[int | None, ...] | None = None
        if answer.get("scores"):
            scores = tuple(answer["scores"].get(str(clip_id)) for clip_id in clip_order)
            given = choice.scores or ()
            correct = len(given) == len(scores) and all(
                known is None or abs(known - score) <= SCORE_TOLERANCE
                for known, score in zip(scores, given, strict=True)
            )
        elif tie:
            correct = choice.status == "tie"
        else:
            first = choice.with_first()
            correct = best in (None, first.first_best) and worst in (None, first.first_worst)
            correct = correct and first.first_best is not None
        graded.append(Graded(choice.dimension, correct, best, worst, tie, scores, why))
    return graded

"""A verdict as it arrives: decoded JSON becomes records, or is refused with the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from annotation.records import LANGUAGES, Choice, Verdict
from annotation.refusals import Refused

MAX_NOTE = 2000
"""Characters."""


def parse_verdict(raw: Mapping[str, Any]) -> Verdict:
    """A verdict from decoded JSON. Raises Refused if it does not have the right shape."""
    try:
        choices = tuple(_choice(choice) for choice in raw["choices"])
        seconds = None if raw.get("seconds") is None else float(raw["seconds"])
        verdict = Verdict(
            choices=choices,
            note=str(raw.get("note") or ""),
            seconds=None if seconds is None else max(0.0, seconds),
            watched_seconds=tuple(
                None if s is None else float(s) for s in raw.get("watched_seconds") or ()
            ),
            language=str(raw.get("language") or LANGUAGES[0]),
        )
        if not all(math.isfinite(s or 0.0) for s in (seconds, *verdict.watched_seconds)):
            raise ValueError("seconds must be finite")
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise Refused([f"the answer has the wrong shape: {error}"]) from error
    if verdict.language not in LANGUAGES:
        raise Refused([f"language {verdict.language!r} is not one of {', '.join(LANGUAGES)}"])
    for choice in verdict.choices:
        _check_types(choice)
    return verdict


def check_note(note: str) -> list[str]:
    return (
        []
        if len(note) <= MAX_NOTE
        else [f"the note has {len(note)} characters; at most {MAX_NOTE}"]
    )


def _choice(raw: Mapping[str, Any]) -> Choice:
    choice = Choice(**raw)
    return choice if choice.scores is None else replace(choice, scores=tuple(choice.scores))


def _check_types(choice: Choice) -> None:
    indices = (choice.best, choice.worst, choice.first_best, choice.first_worst)
    if not all(i is None or _is_whole(i) for i in indices):
        raise Refused(["best and worst are whole numbers, counted from 0, or null"])
    if not isinstance(choice.constrained, bool) or not isinstance(choice.dimension, str):
        raise Refused(["a choice has a dimension (text) and `constrained` (true or false)"])
    if choice.confirmed is not None and not isinstance(choice.confirmed, bool):
        raise Refused(["`confirmed` is true, false or null"])
    if choice.scores is not None and not all(_is_whole(score) for score in choice.scores):
        raise Refused(["scores are whole numbers, one per clip, or null"])


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

"""GenAI-Bench's video votes (TIGER-Lab): left, right, tie or both bad, over all of a clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reelhf.errors import UserError
from rewards.importers.tables import UNKNOWN_MODEL, ImportedTask, ImportedVerdict
from rewards.importers.videoalign import OVERALL

VOTES = {"leftvote": 1, "rightvote": -1, "tievote": 0, "bothbad_vote": 0}
"""A scorer of single clips cannot tell "both good" from "both bad": each is a tie, as in published three-way results."""
NEEDED = ("prompt", "left_video", "right_video", "vote_type")


def read_genai_bench(source: Path) -> list[ImportedTask]:
    """Tasks of a JSON list or JSON lines whose rows name their clips as files beside it: prompt, left_video, right_video,
    vote_type, and left_model and right_model where known."""
    try:
        text = source.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{source} is not JSON: {error}") from None
    if not rows:
        raise UserError(f"{source} holds no votes")
    return [_task(source, number, row) for number, row in enumerate(rows, 1)]


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _task(source: Path, number: int, row: Any) -> ImportedTask:
    absent = [n for n in NEEDED if not isinstance(row, dict) or not isinstance(row.get(n), str)]
    if absent:
        raise UserError(
            f"{source} row {number}: no {', '.join(absent)}; expected {', '.join(NEEDED)}"
        )
    if row["vote_type"] not in VOTES:
        raise UserError(
            f"{source} row {number}: vote_type {row['vote_type']!r}; expected {', '.join(VOTES)}"
        )
    clips = tuple(
        (source.parent / row[f"{side}_video"], row.get(f"{side}_model") or UNKNOWN_MODEL)
        for side in ("left", "right")
    )
    return ImportedTask(
        row["prompt"], clips, (ImportedVerdict(0, 1, OVERALL, VOTES[row["vote_type"]]),)
    )

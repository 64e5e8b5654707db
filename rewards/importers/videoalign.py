"""VideoAlign's pairs and VideoGen-RewardBench (KwaiVGI): a CSV row per pair, labelled A, B or same per dimension."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from reelhf.errors import UserError
from rewards.importers.tables import UNKNOWN_MODEL, ImportedTask, ImportedVerdict

DIMENSIONS = {
    "VQ": "aesthetic_quality",  # visual quality
    "MQ": "motion_quality",
    "TA": "prompt_following",  # text alignment
}
"""Their dimension -> ours."""
OVERALL = "overall"
"""The benchmark's fourth label; no reward of ours scores it, their sum stands for it (`rewards.importers.published`)."""
LABELS = {"A": 1, "B": -1, "same": 0}
NEEDED = ("path_A", "path_B", "prompt")


def read_videoalign(source: Path) -> list[ImportedTask]:
    """Training pairs: columns path_A, path_B, prompt and some of VQ, MQ, TA; an empty label is a missing one."""
    return _read(source, DIMENSIONS)


def read_videogen_rewardbench(source: Path) -> list[ImportedTask]:
    """The benchmark: the same columns, A_model and B_model, and Overall (in some releases ALL)."""
    return _read(source, {**DIMENSIONS, "Overall": OVERALL, "ALL": OVERALL})


def _read(source: Path, dimensions: Mapping[str, str]) -> list[ImportedTask]:
    if source.is_dir():
        tables = sorted(source.glob("*.csv"))
        if len(tables) != 1:
            raise UserError(
                f"{source} holds {len(tables)} CSV files; expected one, or name the file"
            )
        source = tables[0]
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}") from None
    columns = list(rows[0]) if rows else []
    absent = [name for name in NEEDED if name not in columns]
    labelled = [name for name in dimensions if name in columns]
    if absent or not labelled:
        raise UserError(
            f"{source} has the columns {', '.join(columns) or 'of an empty file'}; expected {', '.join(NEEDED)} and some of "
            f"{', '.join(dimensions)}"
        )
    own = {name: dimensions[name] for name in labelled}
    return [_task(source, line, row, own) for line, row in enumerate(rows, 2)]


def _task(
    source: Path, line: int, row: Mapping[str, str], dimensions: Mapping[str, str]
) -> ImportedTask:
    verdicts = []
    for name, dimension in dimensions.items():
        label = (row[name] or "").strip()
        if not label:
            continue
        if label not in LABELS:
            raise UserError(f"{source} line {line}: {name} is {label!r}; expected A, B or same")
        verdicts.append(ImportedVerdict(0, 1, dimension, LABELS[label]))
    if not verdicts or not (row["prompt"] or "").strip():
        what = "no label" if not verdicts else "no prompt"
        raise UserError(f"{source} line {line} has {what}")
    clips = tuple(
        (source.parent / row[f"path_{side}"], row.get(f"{side}_model") or UNKNOWN_MODEL)
        for side in "AB"
    )
    return ImportedTask(row["prompt"], clips, tuple(verdicts))

"""Which clips are to be scored, and for which prompts: files, folders and manifests."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reelhf.errors import UserError
from reelhf.video import VIDEO_SUFFIXES

TABLES = ("captions.jsonl", "captions.csv", "manifest.jsonl", "manifest.csv")
"""Names under which a folder may describe its clips."""
PATH_COLUMNS = ("path", "video", "uri", "file")
PROMPT_COLUMNS = ("prompt", "caption", "text")


@dataclass(frozen=True)
class Item:
    """One clip to score."""

    path: Path
    prompt: str


def find_items(sources: Sequence[Path], prompt: str | None) -> list[Item]:
    """Every clip of the sources, in their order; a clip with a prompt of its own keeps it, others take `prompt`.

    Args:
        sources: video files; folders, searched with all below, described by a captions.jsonl, captions.csv or manifest beside the
            clips if there is one; and manifests, .jsonl or .csv with columns `path` and `prompt` (or `caption`).
    Raises: UserError for a source that is none of these, an empty folder, or clips without a prompt.
    """
    found: list[tuple[Path, str | None]] = []
    for source in map(Path, sources):
        if source.is_dir():
            found += _folder(source)
        elif source.suffix.lower() in (".jsonl", ".csv"):
            found += _manifest(source)
        elif source.suffix.lower() in VIDEO_SUFFIXES:
            found.append((source, None))
        else:
            raise UserError(
                f"{source} is no folder, no manifest (.jsonl, .csv) and no video ({', '.join(VIDEO_SUFFIXES)})"
            )
    items = [(path, own or prompt) for path, own in found]
    without = [path for path, own in items if not own or not own.strip()]
    if without:
        raise UserError(
            f"{len(without)} of {len(items)} clips have no prompt, first {without[0]}; give --prompt, or a manifest with the columns "
            "path and prompt"
        )
    return [Item(path, own) for path, own in items if own]


def _folder(folder: Path) -> list[tuple[Path, str | None]]:
    prompts = {}
    for name in TABLES:
        for table in sorted(folder.rglob(name)):
            prompts |= {path.resolve(): own for path, own in _manifest(table)}
    videos = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    videos = [path for path in videos if not path.name.startswith(".")]
    if not videos:
        raise UserError(f"{folder} holds no videos ({', '.join(VIDEO_SUFFIXES)})")
    return [(path, prompts.get(path.resolve())) for path in videos]


def _manifest(path: Path) -> list[tuple[Path, str | None]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    rows: list[tuple[int, dict[str, Any]]]
    if path.suffix.lower() == ".csv":
        rows = list(enumerate(csv.DictReader(text.splitlines()), 2))
    else:
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    rows.append((number, json.loads(line)))
                except ValueError as error:
                    raise UserError(f"{path} line {number} is not JSON: {error}") from None
    if not rows:
        raise UserError(f"{path} names no clips")
    return [_row(path, number, row) for number, row in rows]


def _row(path: Path, number: int, row: Any) -> tuple[Path, str | None]:
    names = row if isinstance(row, dict) else {}
    file = next((names[key] for key in PATH_COLUMNS if names.get(key)), None)
    if not isinstance(file, str):
        raise UserError(
            f"{path} line {number} names no clip; expected one of {', '.join(PATH_COLUMNS)}"
        )
    prompt = next((names[key] for key in PROMPT_COLUMNS if names.get(key)), None)
    return path.parent / file, prompt if isinstance(prompt, str) else None

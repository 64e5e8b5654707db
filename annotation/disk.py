"""What a project takes on disk, clip by clip, and what is past its time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import select

from annotation import schema as t
from annotation.erasure import expired_clips, size_of
from annotation.store import Store


@dataclass(frozen=True)
class ClipOnDisk:
    """One clip: its own bytes and those of the copies made for showing it."""

    sha256: str
    model: str
    original: int
    copies: int
    num_copies: int
    age_days: float
    expired: bool
    """Past the retention of every project it belongs to."""


@dataclass(frozen=True)
class Disk:
    """Bytes on this machine. With object storage, what is not fetched yet counts as nothing."""

    clips: list[ClipOnDisk]
    """The largest first."""
    originals: int
    copies: int
    pictures: int
    database: int
    snapshots: int

    @property
    def total(self) -> int:
        return self.originals + self.copies + self.pictures + self.database + self.snapshots


def disk_use(store: Store) -> Disk:
    """Looks at every file of the project."""
    shown: dict[int, set[str]] = {}
    with store.read() as connection:
        rows = connection.execute(select(t.clip).where(t.clip.c.purged_ms.is_(None))).all()
        for clip_id, key in connection.execute(
            sa.select(t.task_clip.c.clip_id, t.task_clip.c.shown_key).distinct()
        ):
            shown.setdefault(clip_id, set()).add(key)
    expired = set(expired_clips(store))
    now = store.now_ms()
    clips = [
        ClipOnDisk(
            row.sha256,
            row.model,
            size_of(store.media / row.storage_key),
            sum(size_of(store.media / key) for key in shown.get(row.id, ())),
            len(shown.get(row.id, ())),
            (now - row.created_ms) / 86_400_000,
            row.sha256 in expired,
        )
        for row in rows
    ]
    folder = store.media.parent
    return Disk(
        sorted(clips, key=lambda clip: -(clip.original + clip.copies)),
        sum(clip.original for clip in clips),
        sum(clip.copies for clip in clips),
        _tree(store.media / "pictures"),
        sum(size_of(path) for path in folder.glob("annotation.db*")),
        _tree(folder / "snapshots"),
    )


def human_bytes(number: float) -> str:
    """1536 -> `1.5 kB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TB"


def _tree(folder: Path) -> int:
    return sum(size_of(path) for path in folder.rglob("*")) if folder.is_dir() else 0

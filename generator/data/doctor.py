"""`reelhf generator data doctor`: every clip of a folder with its frames, rate, bucket, or why it would be skipped."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from generator.data.buckets import Bucket, BucketConfig, Placement, place
from generator.data.manifest import MANIFEST_SUFFIXES, ManifestClip, place_clip, read_clips
from reelhf.errors import UserError
from reelhf.video import VIDEO_SUFFIXES, VideoInfo, probe_video


@dataclass(frozen=True)
class Examined:
    """One file and what becomes of it."""

    name: str
    info: VideoInfo | None
    """None where the file cannot be read."""
    placement: Placement

    @property
    def columns(self) -> list[str]:
        info, where = self.info, self.placement
        seen = (
            ["", "", "", ""]
            if info is None
            else [
                str(info.frames),
                f"{info.fps:.3f}".rstrip("0").rstrip("."),
                f"{info.width}x{info.height}",
                f"{info.seconds:.2f}",
            ]
        )
        bucket = "" if where.bucket is None else str(where.bucket)
        crop = "" if where.bucket is None else f"{where.cropped:.0%}"
        return [self.name, *seen, bucket, str(where.windows), crop, where.reason or ""]


HEADER = ["clip", "frames", "fps", "size", "seconds", "bucket", "windows", "cropped", "skipped"]


def examine(folder: Path, config: BucketConfig) -> list[Examined]:
    """Probe every video under a folder, or of a manifest, and place it; a damaged file is a row, not the end.

    Raises: UserError when there is no such folder, or no video in it.
    """
    from reelhf.progress import track

    folder = Path(folder)
    if folder.suffix.lower() in MANIFEST_SUFFIXES:
        return examine_clips(read_clips(folder), config)
    if not folder.is_dir():
        raise UserError(f"--clips {folder}: there is no such folder")
    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not videos:
        raise UserError(
            f"{folder} holds no videos; expected names ending in {', '.join(VIDEO_SUFFIXES)}"
        )
    rows = []
    for path in track(videos, label="examining clips"):
        name = path.relative_to(folder).as_posix()
        try:
            info = probe_video(path)
        except UserError as error:
            rows.append(Examined(name, None, Placement(None, f"unreadable: {error}", 0)))
            continue
        where = place(info.frames, info.fps, info.width, info.height, config)
        rows.append(Examined(name, info, where))
    return rows


def examine_clips(clips: Sequence[ManifestClip], config: BucketConfig) -> list[Examined]:
    """`examine` for the parts of files that a manifest names; frames and seconds are the file's."""
    from reelhf.progress import track

    rows = []
    for clip in track(clips, label="examining clips"):
        try:
            info = probe_video(clip.path)
        except UserError as error:
            rows.append(Examined(clip.name, None, Placement(None, f"unreadable: {error}", 0)))
            continue
        rows.append(Examined(clip.name, info, place_clip(clip, info, config)))
    return rows


def format_report(rows: Sequence[Examined], config: BucketConfig) -> str:
    """The table, then what each bucket holds, then how many are skipped and why."""
    from reelhf.tables import format_table

    parts = [format_table(HEADER, [row.columns for row in rows])]
    held: Counter[Bucket] = Counter()
    windows: Counter[Bucket] = Counter()
    for row in rows:
        if row.placement.bucket is not None:
            held[row.placement.bucket] += 1
            windows[row.placement.bucket] += row.placement.windows
    if held:
        table = [
            [str(bucket), str(held[bucket]), str(windows[bucket]), str(bucket.tokens(config.spec))]
            for bucket in sorted(held)
        ]
        parts.append(format_table(["bucket", "clips", "windows", "tokens per window"], table))
    skipped = [row for row in rows if row.placement.bucket is None]
    parts.append(f"{len(rows) - len(skipped)} of {len(rows)} clips have a bucket")
    if skipped:
        parts[-1] += f"; {len(skipped)} would be skipped, each for the reason in its row"
    return "\n\n".join(parts)


def write_csv(rows: Sequence[Examined], path: Path) -> None:
    """The table as a CSV file. Raises: UserError when it cannot be written."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(HEADER)
            writer.writerows(row.columns for row in rows)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None

"""What to train on: a manifest of real video files with their captions, or a folder of captioned clips.

A manifest is a .jsonl or a .parquet file with one row per clip; paths are relative to it:

    {"path": "a.mp4", "caption": "...", "long_caption": "...", "motion_caption": "...", "tags": ["people"], "start": 2.0, "end": 7.5}

`path` and `caption` are needed. `start` and `end` are seconds; without them a clip is the whole file. An image is a clip of one frame.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from generator.data.buckets import BucketConfig, Placement, place
from reelhf.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from reelhf.video import VideoInfo

CaptionKind = Literal["caption", "long_caption", "motion_caption"]
CAPTION_KINDS: tuple[CaptionKind, ...] = get_args(CaptionKind)
COLUMNS = ("path", *CAPTION_KINDS, "tags", "start", "end")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MANIFEST_SUFFIXES = (".jsonl", ".parquet")
MAX_ROWS_SHOWN = 3


@dataclass(frozen=True)
class ManifestClip:
    """One row: a part of a file and what is said of it."""

    path: Path
    name: str
    """The path as the manifest has it."""
    captions: dict[CaptionKind, str]
    """At least `caption`."""
    tags: tuple[str, ...] = ()
    start: float = 0.0
    """Seconds."""
    end: float | None = None
    """Seconds; None is the end of the file."""

    @property
    def is_image(self) -> bool:
        return self.path.suffix.lower() in IMAGE_SUFFIXES

    def frame_range(self, num_frames: int, fps: float) -> tuple[int, int]:
        """Half-open range of frame numbers that lie in [start, end] of a file; may be empty."""
        first = math.ceil(self.start * fps - 1e-6)
        last = num_frames if self.end is None else math.floor(self.end * fps + 1e-6) + 1
        return first, max(first, min(last, num_frames))


def read_clips(source: str | Path) -> list[ManifestClip]:
    """The clips of a manifest, or of a folder as `reelhf.clips` reads it.

    Raises: UserError naming the rows that are wrong, and in what; nothing is left out in silence.
    """
    source = Path(source)
    if source.is_dir():
        return list(_of_folder(source))
    if source.suffix.lower() not in MANIFEST_SUFFIXES:
        raise UserError(
            f"{source}: expected a folder of captioned clips, or a manifest ending in {' or '.join(MANIFEST_SUFFIXES)}"
        )
    if not source.is_file():
        raise UserError(f"there is no manifest at {source}")
    clips, wrong = [], []
    for number, row in _rows(source):
        try:
            clips.append(_clip(source.parent, row))
        except ValueError as error:
            wrong.append(f"row {number}: {error}")
    if wrong:
        more = f"; and {len(wrong) - MAX_ROWS_SHOWN} more" if len(wrong) > MAX_ROWS_SHOWN else ""
        raise UserError(
            f"{source}: {len(wrong)} of {len(wrong) + len(clips)} rows are wrong: {'; '.join(wrong[:MAX_ROWS_SHOWN])}{more}"
        )
    if not clips:
        raise UserError(f"{source} holds no rows; expected one per clip with 'path' and 'caption'")
    return clips


def place_clip(clip: ManifestClip, info: VideoInfo, config: BucketConfig) -> Placement:
    """The bucket of a part of a file, or why it has none."""
    first, last = clip.frame_range(info.frames, info.fps)
    if first >= last:
        until = f" to {clip.end:g} s" if clip.end is not None else ""
        lasts = f"the file lasts {info.seconds:.2f} s"
        return Placement(None, f"no frame from {clip.start:g} s{until}: {lasts}", 0)
    size = (info.width, info.height)
    where = place(last - first, info.fps, *size, config, is_image=clip.is_image)
    unfit = None if where.bucket is None else _shots_that_do_not_fit(clip, where, config)
    return where if unfit is None else Placement(None, unfit, where.usable_frames)


def _shots_that_do_not_fit(
    clip: ManifestClip, where: Placement, config: BucketConfig
) -> str | None:
    """Why captions of several shots do not tell of this clip's windows; None if they do, or are of one."""
    assert where.bucket is not None
    if not any("[" in text for text in clip.captions.values()):
        return None
    from generator.shots import parse_shots, prompt_shots

    try:
        several = [text for text in clip.captions.values() if len(parse_shots(text)) > 1]
        if several and where.windows > 1:
            return f"a caption of several shots, and the clip is cut into {where.windows} windows"
        prompt_shots(several, where.bucket.num_frames, temporal_ratio=config.temporal_ratio)
    except UserError as error:
        return str(error)
    return None


def _of_folder(folder: Path) -> Iterator[ManifestClip]:
    from reelhf.clips import load_clip_folder

    for entry in load_clip_folder(folder):
        # half a frame inside, so that no rounding takes a neighbour's frame
        end = (entry.end_frame - 0.5) / entry.fps
        start = max(0.0, (entry.start_frame - 0.5) / entry.fps)
        name = entry.path.relative_to(folder).as_posix()
        yield ManifestClip(entry.path, name, {"caption": entry.caption}, (), start, end)


def _rows(source: Path) -> Iterator[tuple[int, Any]]:
    """Numbered from 1; a line that is no JSON is a string, which `_clip` refuses."""
    if source.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(source)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{source} cannot be read as Parquet: {error}") from None
        yield from enumerate(table.to_pylist(), start=1)
        return
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, f"not JSON: {error.msg}"


def _clip(folder: Path, row: Any) -> ManifestClip:
    """Raises: ValueError saying what is wrong with the row."""
    if not isinstance(row, dict):
        raise ValueError(row if isinstance(row, str) else f"expected an object, got {row!r}")
    row = {key: value for key, value in row.items() if value is not None}
    for key in row:
        if key not in COLUMNS:
            raise ValueError(
                f"unknown column '{key}'.{did_you_mean(key, COLUMNS)} Expected {', '.join(COLUMNS)}"
            )
    name = row.get("path")
    if not isinstance(name, str) or not name:
        raise ValueError("no 'path'")
    captions: dict[CaptionKind, str] = {}
    for kind in CAPTION_KINDS:
        text = row.get(kind, "")
        if not isinstance(text, str):
            raise ValueError(f"{name}: {kind} is {text!r}; expected text")
        if text.strip():
            captions[kind] = text.strip()
    if "caption" not in captions:
        raise ValueError(f"{name}: no 'caption'")
    tags = row.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"{name}: tags is {tags!r}; expected a list of words")
    start, end = _seconds(name, row, "start"), _seconds(name, row, "end")
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"{name}: ends at {end:g} s, before it starts at {start or 0.0:g} s")
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{name}: there is no such file")
    return ManifestClip(path, name, captions, tuple(tags), start or 0.0, end)


def _seconds(name: str, row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{name}: {key} is {value!r}; expected seconds")
    return float(value)


def caption_counts(captions: Sequence[dict[CaptionKind, str]]) -> dict[CaptionKind, int]:
    """How many clips have each kind of caption."""
    return {kind: sum(kind in own for own in captions) for kind in CAPTION_KINDS}

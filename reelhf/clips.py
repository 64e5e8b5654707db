"""A folder of captioned videos becomes training windows: the same for rendered clips and real footage.

Captions are in `captions.jsonl`, one object per line, or in a .txt beside each video:

    {"path": "a.mp4", "caption": "...", "caption_zh": "..."}                     a clip of one shot
    {"path": "b.mp4", "shots": [{"end_frame": 240, "caption": "..."},           frames 0 to 239
                                {"end_frame": null, "caption": "..."}]}         from 240 to the end
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from reelhf.errors import UserError
from reelhf.hashing import content_hash, sha256_file
from reelhf.progress import track
from reelhf.video import MAX_READERS, VIDEO_SUFFIXES, iterate_frames, probe_video

MAX_NAMES_SHOWN = 5
CACHE_VERSION = 1  # raise when the same arguments must give other windows


@dataclass(frozen=True)
class ClipEntry:
    """One shot of one video with its caption: frames `start_frame` up to, not including, `end_frame`."""

    path: Path
    caption: str
    start_frame: int
    end_frame: int
    fps: float
    language: str
    """`en` or `zh`."""


@dataclass(frozen=True)
class ClipTensors:
    """Windows cut from clips, all of one length, rate and size."""

    frames: Tensor
    """uint8 `[N, 3, F, H, W]`."""
    captions: list[str]
    fps: float
    entry_index: list[int]
    """Which entry each window was cut from."""


def load_clip_folder(folder: str | Path) -> list[ClipEntry]:
    """Every captioned shot in a folder; a caption in a second language makes a second entry.

    Raises: UserError naming the files if a video has no caption, a caption no video, or a line is malformed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder of clips at {folder}.")
    table = folder / "captions.jsonl"
    if table.is_file():
        rows = _read_table(table)
    else:
        rows = [
            {
                "path": video.relative_to(folder).as_posix(),
                "caption": video.with_suffix(".txt").read_text(encoding="utf-8").strip(),
            }
            for video in _videos(folder)
            if video.with_suffix(".txt").is_file()
        ]
    captioned = {(folder / row["path"]).resolve() for row in rows}
    videos = _videos(folder)
    bare = [
        video.relative_to(folder).as_posix() for video in videos if video.resolve() not in captioned
    ]
    if not videos:
        raise UserError(
            f"{folder} holds no videos; expected names ending in {', '.join(VIDEO_SUFFIXES)}."
        )
    if bare:
        raise UserError(
            f"{len(bare)} of {len(videos)} videos in {folder} have no caption: {_listing(bare)}; "
            "write captions.jsonl, or a .txt of the same name beside each."
        )
    return [entry for row in rows for entry in _entries(folder, table, row)]


def load_windows(
    entries: Sequence[ClipEntry],
    *,
    num_frames: int,
    fps: float,
    size: tuple[int, int],
    max_windows: int,
    seed: int,
) -> ClipTensors:
    """Cut windows out of the clips: exact rate, centre crop, antialiased resize.

    A window's frame k is the source frame nearest to its start plus k / fps seconds. Long shots give
    several windows, overlapping by at most half; if there are more than `max_windows`, the entries
    take turns, so that no long clip crowds out the others. Shots shorter than a window are left out.

    Args:
        size: height and width in pixels; the aspect is kept and the longer side cropped.
    Returns: windows in a seeded random order, cached by content under `cache_folder()`.
    Raises: UserError if no shot is long enough.
    """
    chosen, skipped = _choose_windows(entries, num_frames, fps, max_windows, seed)
    if not chosen:
        seconds = max((len_seconds(entry) for entry in entries), default=0.0)
        raise UserError(
            f"no shot is long enough for {num_frames} frames at {fps:g} fps "
            f"({num_frames / fps:.2f} s); the longest lasts {seconds:.2f} s."
        )
    if skipped:
        print(
            f"{skipped} of {len(entries)} shots are shorter than a window and left out",
            file=sys.stderr,
        )
    captions = [entries[index].caption for index, _ in chosen]
    entry_index = [index for index, _ in chosen]
    files = {str(entry.path): None for entry in entries}
    identity = {path: sha256_file(path) for path in files}
    windows = [[identity[str(entries[index].path)], picks] for index, picks in chosen]
    key = content_hash(CACHE_VERSION, list(size), windows)
    cached = cache_folder() / "windows" / f"{key}.safetensors"
    if cached.is_file():
        frames = load_file(cached)["frames"]
    else:
        frames = _decode_windows(entries, chosen, size)
        cached.parent.mkdir(parents=True, exist_ok=True)
        aside = cached.with_suffix(f".{os.getpid()}.tmp")
        save_file({"frames": frames}, aside)
        os.replace(aside, cached)
    return ClipTensors(frames, captions, fps, entry_index)


def resize_frames(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Centre crop to the target's aspect, then resize with antialiasing; float `[3, F, H, W]` in [0, 1].

    Args:
        frames: uint8, or float in [0, 1], `[3, F, H', W']`.
    """
    pictures = frames.transpose(0, 1)  # [F, 3, H', W']
    pictures = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures.float()
    height, width = pictures.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    crop_h, crop_w = min(height, round(size[0] / scale)), min(width, round(size[1] / scale))
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    pictures = pictures[..., top : top + crop_h, left : left + crop_w]
    if (crop_h, crop_w) != size:
        pictures = F.interpolate(
            pictures, size=size, mode="bicubic", antialias=True, align_corners=False
        )
    return pictures.clamp(0, 1).transpose(0, 1)


def cache_folder() -> Path:
    """Where derived data is kept between runs: `REELHF_CACHE`, else `~/.cache/reelhf`."""
    return Path(os.environ.get("REELHF_CACHE") or Path.home() / ".cache" / "reelhf").expanduser()


def len_seconds(entry: ClipEntry) -> float:
    """Length of a shot in seconds."""
    return (entry.end_frame - entry.start_frame) / entry.fps


def _videos(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES)


def _read_table(table: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{table}, line {number} is not JSON: {error.msg}.") from None
        if not isinstance(row, dict) or not row.get("path"):
            raise UserError(f"{table}, line {number} has no 'path'.")
        if not row.get("shots") and not str(row.get("caption") or "").strip():
            raise UserError(
                f"{table}, line {number}: {row['path']} has neither 'caption' nor 'shots'."
            )
        rows.append(row)
    missing = [row["path"] for row in rows if not (table.parent / row["path"]).is_file()]
    if missing:
        raise UserError(
            f"{table} names {len(missing)} videos that are not there: {_listing(missing)}."
        )
    return rows


def _entries(folder: Path, table: Path, row: dict[str, Any]) -> list[ClipEntry]:
    info = probe_video(folder / row["path"])
    shots = row.get("shots") or [{**row, "end_frame": None}]
    entries = []
    start = 0
    for shot in shots:
        end = info.frames if shot.get("end_frame") is None else int(shot["end_frame"])
        caption = str(shot.get("caption") or "").strip()
        if not start < end <= info.frames or not caption:
            raise UserError(
                f"{table}: {row['path']} has a shot from frame {start} to {end} with caption '{caption}'; "
                f"expected rising end frames up to {info.frames} and a caption for each."
            )
        language = shot.get("language") or row.get("language") or _language(caption)
        entries.append(ClipEntry(info.path, caption, start, end, info.fps, language))
        if shot.get("caption_zh"):
            entries.append(
                ClipEntry(info.path, shot["caption_zh"].strip(), start, end, info.fps, "zh")
            )
        start = end
    return entries


def _language(text: str) -> str:
    return "zh" if any("一" <= character <= "鿿" for character in text) else "en"


def _choose_windows(
    entries: Sequence[ClipEntry], num_frames: int, fps: float, max_windows: int, seed: int
) -> tuple[list[tuple[int, list[int]]], int]:
    """Windows as (entry index, source frame numbers), and the number of entries too short for one."""
    rng = random.Random(seed)
    queues: list[list[tuple[int, list[int]]]] = []
    skipped = 0
    for index, entry in enumerate(entries):
        offsets = [round(k * entry.fps / fps) for k in range(num_frames)]
        slack = entry.end_frame - entry.start_frame - 1 - offsets[-1]
        if slack < 0:
            skipped += 1
            continue
        stride = max(1, (offsets[-1] + 1) // 2)
        starts = list(range(entry.start_frame, entry.start_frame + slack + 1, stride))
        rng.shuffle(starts)
        queues.append([(index, [start + offset for offset in offsets]) for start in starts])
    chosen: list[tuple[int, list[int]]] = []
    rng.shuffle(queues)
    for turn in range(max(map(len, queues), default=0)):
        chosen += [queue[turn] for queue in queues if turn < len(queue)]
        if len(chosen) >= max_windows:
            break
    chosen = chosen[:max_windows]
    rng.shuffle(chosen)
    return chosen, skipped


def _decode_windows(
    entries: Sequence[ClipEntry], chosen: list[tuple[int, list[int]]], size: tuple[int, int]
) -> Tensor:
    """uint8 `[N, 3, F, H, W]`; every file is decoded once, and only the frames in use are kept."""
    users: dict[Path, dict[int, list[tuple[int, int]]]] = {}  # path -> source frame -> (window, k)
    for window, (index, picks) in enumerate(chosen):
        for k, pick in enumerate(picks):
            users.setdefault(entries[index].path, {}).setdefault(pick, []).append((window, k))
    frames = torch.empty(len(chosen), 3, len(chosen[0][1]), *size, dtype=torch.uint8)

    def decode(path: Path) -> None:
        by_frame = users[path]
        numbers = sorted(by_frame)
        decoded = 0
        for number, picture in zip(numbers, iterate_frames(path, indices=numbers), strict=False):
            pixels = torch.from_numpy(picture).permute(2, 0, 1)[:, None]  # [3, 1, H', W']
            small = resize_frames(pixels, size)[:, 0].mul(255).round().to(torch.uint8)
            for window, k in by_frame[number]:
                frames[window, :, k] = small
            decoded += 1
        if decoded < len(numbers):
            raise UserError(f"{path} is damaged: frame {numbers[decoded]} cannot be decoded.")

    # decoding happens outside Python's lock, and each file fills its own windows
    with ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1)) as readers:
        for _ in track(readers.map(decode, sorted(users)), label="reading clips", total=len(users)):
            pass
    return frames


def load_folder_windows(
    folder: str | Path,
    *,
    frame_shape: tuple[int, int, int],
    fps: float,
    max_windows: int,
    seed: int,
) -> ClipTensors:
    """`load_windows` of a folder of captioned clips for a generator's clips of (F, H, W)."""
    num_frames, height, width = frame_shape
    return load_windows(
        load_clip_folder(folder),
        num_frames=num_frames,
        fps=fps,
        size=(height, width),
        max_windows=max_windows,
        seed=seed,
    )


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_NAMES_SHOWN])
    rest = len(names) - MAX_NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown

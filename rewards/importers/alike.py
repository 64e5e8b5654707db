"""Clips of many generators made alike, so that neither size, shape, length nor frame rate tells who made one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reelhf.clips import resize_frames
from reelhf.errors import UserError
from reelhf.hashing import sha256_file
from reelhf.video import read_video, write_video


@dataclass(frozen=True)
class Alike:
    """What every clip becomes."""

    size: int
    """Side of the square cut from the middle, in pixels."""
    fps: float
    """Frames per second, by showing the frame nearest in time: true speed is kept."""
    num_frames: int
    """From the start on."""


def nearest_frames(count: int, fps: float, alike: Alike) -> list[int] | None:
    """Source frame shown at each new frame's time; None where the clip of `count` frames at `fps` is too short."""
    chosen = [round(index * fps / alike.fps) for index in range(alike.num_frames)]
    return chosen if chosen[-1] < count else None


def write_alike(path: Path, folder: Path, alike: Alike) -> Path:
    """The clip made alike, in `folder` under its hash. Raises UserError where it is too short."""
    frames, fps = read_video(path)
    chosen = nearest_frames(frames.shape[1], fps, alike)
    if chosen is None:
        raise UserError(
            f"{path} lasts {frames.shape[1] / fps:.2f} s; {alike.num_frames} frames at {alike.fps:g} per second need "
            f"{(alike.num_frames - 1) / alike.fps:.2f} s: ask for fewer frames or a higher rate"
        )
    resized = resize_frames(frames[:, chosen], (alike.size, alike.size))
    draft = Path(folder) / f".{path.stem}.mp4"
    write_video(draft, resized, alike.fps)
    return draft.rename(Path(folder) / f"{sha256_file(draft)}.mp4")

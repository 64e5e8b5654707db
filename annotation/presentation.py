"""The copies annotators see. Size, rate, length and metadata give a model away, so all clips of a task get the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt

from annotation.transcoding import Pool
from reelhf.config import Config
from reelhf.hashing import content_hash, sha256_file

COPY_VERSION = 3  # part of the file name: raise it when the copies would look different
COPY_PRESET = "veryfast"
"""Of x264: 0.6 of the time of "medium", and files no larger."""


class PresentationConfig(Config):
    """How clips are made alike before anyone sees them."""

    min_side: PositiveInt = 256
    """Smaller clips are enlarged until their longer side has this many pixels."""
    max_side: PositiveInt = 720
    """Larger clips are reduced to this longer side."""
    max_fps: PositiveFloat = 30.0
    """All clips of a task play at the highest of their rates, up to this."""
    max_seconds: PositiveFloat = 20.0
    """Longer clips are cut here."""
    crf: int = Field(default=16, ge=0, le=51)
    """H.264 quality of the copies."""


@dataclass(frozen=True)
class Measured:
    """What the plan needs to know of one original."""

    path: Path
    sha256: str
    num_frames: int
    fps: float
    width: int
    height: int


@dataclass(frozen=True)
class Plan:
    """What all copies of one task have in common."""

    fps: float
    num_frames: int
    width: int
    height: int


def plan_task(clips: Sequence[Measured], config: PresentationConfig) -> Plan:
    """One box, one rate and one length for the clips of a task.

    The box is the smallest that holds every clip at its own size, then scaled; shorter clips hold their last frame.
    """
    fps = min(max(clip.fps for clip in clips), config.max_fps)
    seconds = min(max(clip.num_frames / clip.fps for clip in clips), config.max_seconds)
    width, height = max(clip.width for clip in clips), max(clip.height for clip in clips)
    longer = max(width, height)
    scale = min(max(longer, config.min_side), config.max_side) / longer
    return Plan(fps, max(1, round(seconds * fps)), _even(width * scale), _even(height * scale))


Shown = tuple[Plan, list[Path]]
"""How a task is shown, and the copy of each of its clips."""


def copy_tasks(
    tasks: Sequence[Sequence[Measured]], folder: Path, config: PresentationConfig, pool: Pool
) -> list[Shown]:
    """The plan of each task and the copies of its clips, written in `folder` if not there yet; all copies at once in the pool."""
    plans = [plan_task(clips, config) for clips in tasks]
    jobs = [(clip, plan) for clips, plan in zip(tasks, plans, strict=True) for clip in clips]
    make = partial(_make_copy, folder=folder, crf=config.crf)
    distinct = list(dict.fromkeys(jobs))
    made = dict(zip(distinct, pool.map(make, distinct), strict=True))
    return [
        (plan, [made[clip, plan] for clip in clips])
        for clips, plan in zip(tasks, plans, strict=True)
    ]


def _make_copy(job: tuple[Measured, Plan], *, folder: Path, crf: int) -> Path:
    return shown_copy(*job, folder, crf=crf)


def shown_copy(clip: Measured, plan: Plan, folder: Path, *, crf: int) -> Path:
    """Writes the copy if it is not there yet, and returns its path: `folder/<hash>.mp4`."""
    name = content_hash(
        COPY_VERSION, clip.sha256, plan.fps, plan.num_frames, plan.width, plan.height, crf
    )
    path = folder / f"{name[:32]}.mp4"
    if not path.exists():
        _write_copy(clip, plan, path, crf)
    return path


def _write_copy(clip: Measured, plan: Plan, path: Path, crf: int) -> None:
    import numpy as np
    import torch
    from PIL import Image

    from reelhf.video import iterate_frames, write_video

    wanted = [
        min(int(frame / plan.fps * clip.fps + 1e-6), clip.num_frames - 1)
        for frame in range(plan.num_frames)
    ]
    distinct = sorted(set(wanted))
    boxes: dict[int, np.ndarray] = {}
    for index, picture in zip(distinct, iterate_frames(clip.path, indices=distinct), strict=False):
        height, width = picture.shape[:2]
        scale = min(plan.width / width, plan.height / height)
        size = (
            max(1, min(plan.width, round(width * scale))),
            max(1, min(plan.height, round(height * scale))),
        )
        if size != (width, height):
            picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
        left, top = (plan.width - size[0]) // 2, (plan.height - size[1]) // 2
        box = np.zeros((plan.height, plan.width, 3), np.uint8)
        box[top : top + size[1], left : left + size[0]] = picture
        boxes[index] = box
    last = max(boxes)  # a file may hold fewer frames than its index says
    frames = torch.from_numpy(np.stack([boxes[min(index, last)] for index in wanted]))
    write_video(path, frames.permute(3, 0, 1, 2), plan.fps, crf=crf, preset=COPY_PRESET)


def store_picture(source: Path, folder: Path) -> tuple[Path, str]:
    """Copies a first frame as a PNG without metadata. Returns its path and sha256.

    Raises: UserError naming the file if it is not a picture.
    """
    from PIL import Image, UnidentifiedImageError

    from reelhf.errors import UserError

    try:
        with Image.open(source) as image:
            pixels = image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{source} is not a readable picture: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{source.name}.tmp"
    pixels.save(aside, format="PNG")
    sha256 = sha256_file(aside)
    path = folder / f"{sha256}.png"
    aside.replace(path)
    return path, sha256


def _even(side: float) -> int:
    return max(2, round(side / 2) * 2)

"""Tiny clips made once, and projects of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from annotation.store import Store
from reelhf.video import write_video
from tests.annotation.annotation_cases import NUM_PROMPTS, PASSWORD, SMALL, Clock, records


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def clip_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """4 clips for each of 3 prompts, of different brightness, 5 frames of 32 x 32 at 8 fps."""
    folder = tmp_path_factory.mktemp("clips")
    files = []
    for index in range(4 * NUM_PROMPTS):
        frames = torch.full((3, 5, 32, 32), 0.1 + 0.05 * index)
        frames[0, :, 8:16, 8:16] = torch.linspace(0, 1, 5)[:, None, None]
        path = folder / f"secretmodel{index}.mp4"
        write_video(path, frames, 8.0)
        files.append(path)
    return files


@pytest.fixture
def new_project(
    tmp_path: Path, clip_files: list[Path], clock: Clock
) -> Iterator[Callable[..., Store]]:
    """Makes a project with `tasks` tasks of 4 clips and annotators `ann0`, `ann1`, ..."""
    opened = []

    def make(*, tasks: int = 3, need: int = 1, annotators: int = 2, name: str = "project") -> Store:
        store = Store.open(tmp_path / name, now=clock)
        opened.append(store)
        ids = store.add_clips(records(clip_files))
        groups = [ids[4 * i : 4 * i + 4] for i in range(NUM_PROMPTS)]
        store.create_tasks(
            [groups[i % NUM_PROMPTS] for i in range(tasks)], need=need, presentation=SMALL
        )
        for index in range(annotators):
            store.add_user(f"ann{index}", PASSWORD)
        return store

    yield make
    for store in opened:
        store.close()

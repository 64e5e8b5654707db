"""Tiny clips made once, and projects of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from annotation.place import Place, write_place
from annotation.records import ClipRecord
from annotation.store import Store
from reelhf.video import write_video
from tests.annotation.annotation_cases import NUM_PROMPTS, PASSWORD, SMALL, Clock, records
from tests.annotation.browser_cases import XSS, moving_clips
from tests.postgres_cluster import Cluster

if TYPE_CHECKING:
    from playwright.sync_api import Browser

DATABASES = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


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


@pytest.fixture(params=DATABASES)
def database(request: pytest.FixtureRequest) -> str:
    """Which database the test's projects live in; a module that cares for one alone overrides this."""
    return str(request.param)


@pytest.fixture(scope="session")
def migrated(postgres: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a PostgreSQL database with all tables and no rows, to copy."""
    folder = tmp_path_factory.mktemp("template")
    url = postgres.new_database()
    write_place(folder, Place(database=url))
    Store.open(folder).close()
    return url.partition("@/")[2].partition("?")[0]


@pytest.fixture
def project_folder(
    database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[[str], Path]]:
    """Where a project of that name goes: an empty folder that says which database is its own."""

    if database == "sqlite":
        yield lambda name: tmp_path / name
        return
    cluster: Cluster = request.getfixturevalue("postgres")
    template: str = request.getfixturevalue("migrated")
    urls = []

    def make(name: str) -> Path:
        folder = tmp_path / name
        if not folder.exists():
            urls.append(cluster.new_database(template))
            write_place(folder, Place(database=urls[-1]))
        return folder

    yield make
    for url in urls:
        cluster.drop_database(url)


@pytest.fixture
def new_project(
    project_folder: Callable[[str], Path], clip_files: list[Path], clock: Clock
) -> Iterator[Callable[..., Store]]:
    """Makes a project with `tasks` tasks of 4 clips and annotators `ann0`, `ann1`, ..."""
    opened = []

    def make(*, tasks: int = 3, need: int = 1, annotators: int = 2, name: str = "project") -> Store:
        store = Store.open(project_folder(name), now=clock)
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


@pytest.fixture(scope="module")
def running_browser(chromium: str) -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as driver:
        running = driver.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"], headless=True
        )
        yield running
        running.close()


@pytest.fixture
def browser(running_browser: Browser) -> Iterator[Browser]:
    """The system's Chromium. Use with `@pytest.mark.browser`; pages left open would go on playing their clips beside later tests."""
    yield running_browser
    for context in list(running_browser.contexts):
        context.close()


@pytest.fixture
def moving_project(tmp_path: Path) -> Path:
    """Two tasks of four clips that move, and one annotator. The prompt of the first tries to run a script."""
    prompts = [XSS] * 4 + ["A second prompt."] * 4
    clips = [
        ClipRecord(path, prompt, "secretmodel", "secretstage")
        for path, prompt in zip(moving_clips(tmp_path, 8), prompts, strict=True)
    ]
    with Store.open(tmp_path / "project") as store:
        ids = store.add_clips(clips)
        store.create_tasks([ids[:4], ids[4:]], presentation=SMALL)
        store.add_user("ann", PASSWORD)
    return tmp_path / "project"

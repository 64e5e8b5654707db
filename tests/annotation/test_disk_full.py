"""A disk that fills up while people answer: a small one of its own, really full, under SQLite, under PostgreSQL's tables, under its log."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psycopg
import pytest
from sqlalchemy.exc import OperationalError

from annotation import schema
from annotation.api.errors import unavailable
from annotation.place import Place, write_place
from annotation.store import Store
from tests.annotation.annotation_cases import PASSWORD, SMALL, records, rows
from tests.annotation.test_api import signed_in
from tests.annotation.test_faults import server
from tests.annotation.test_hostile import answer_to
from tests.postgres_cluster import USER, Cluster

TASKS, NUM_DIMENSIONS = 30, 4
TABLES_MB, LOG_MB = 24, 64
PATIENCE_SECONDS = 60.0


@dataclass
class SmallDisk:
    """A file system in memory."""

    folder: Path

    def fill(self) -> None:
        """Until not one more byte fits."""
        with (self.folder / "ballast").open("ab", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                try:
                    while file.write(bytes(size)):
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        (self.folder / "ballast").unlink()


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root, and a container that allows it")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def project_folder(
    database: str, small_disk: SmallDisk, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[[str], Path]]:
    """Where a project goes whose tables lie on the small disk."""
    if database == "sqlite":
        yield lambda name: small_disk.folder / name
        return
    cluster: Cluster = request.getfixturevalue("postgres")
    template: str = request.getfixturevalue("migrated")
    space = small_disk.folder / "tables"
    space.mkdir()
    opened_to_postgres(space)
    with psycopg.connect(cluster.url(), autocommit=True) as connection:
        connection.execute(f"CREATE TABLESPACE small LOCATION '{space}'")
        url = cluster.new_database(template, tablespace="small")
        write_place(tmp_path / "project", Place(database=url))
        yield lambda name: tmp_path / name
        cluster.drop_database(url)
        connection.execute("DROP TABLESPACE small")


def opened_to_postgres(folder: Path) -> None:
    """Its server runs as another user, who must get to the folder."""
    shutil.chown(folder, USER)
    for parent in folder.parents:
        if parent.stat().st_mode & 0o005 != 0o005:
            parent.chmod(parent.stat().st_mode | 0o055)


@dataclass
class Person:
    """Answers one task after the other, with notes that take room."""

    http: httpx.Client
    confirmed: list[int] = field(default_factory=list)
    """Ids of the judgments they were told are stored."""
    next: tuple[str, dict] = ("/api/claim", {})
    """What to ask for: if it was refused, the same again."""

    def ask(self) -> httpx.Response:
        path, body = self.next
        answer = self.http.post(path, json=body)
        if answer.status_code != 200:
            return answer
        if path == "/api/submit":
            self.confirmed.append(answer.json()["judgment_id"])
            self.next = ("/api/claim", {})
        elif task := answer.json()["task"]:
            key = f"key-number-{len(self.confirmed)}"
            body = answer_to(task, key, note=secrets.token_hex(900))
            self.next = ("/api/submit", body)
        return answer

    def work(self) -> httpx.Response:
        """Until a request is refused or nothing is left to do; the last answer."""
        while True:
            answer = self.ask()
            if answer.status_code != 200 or answer.json().get("task", True) is None:
                return answer


def check_whole(store: Store, confirmed: list[int]) -> None:
    """What was confirmed is there, each once with all its choices, and nothing else is."""
    stored = rows(store, schema.judgment)
    assert [row.id for row in stored] == confirmed
    assert len({row.task_id for row in stored}) == len(confirmed)
    parts = Counter(row.judgment_id for row in rows(store, schema.choice))
    assert parts == dict.fromkeys(confirmed, NUM_DIMENSIONS)


@pytest.mark.parametrize("small_disk", [TABLES_MB], indirect=True)
def test_a_disk_that_fills_up_is_said_clearly_and_no_judgment_is_lost_halved_or_doubled(
    new_project, small_disk
):
    store = new_project(tasks=TASKS, annotators=1)
    with server(store.media.parent) as (url, process), signed_in(url) as http:
        person = Person(http)
        assert person.ask().status_code == person.ask().status_code == 200
        small_disk.fill()
        for _ in range(3):
            full = person.work()
            assert full.status_code == 507, full.text
            assert "disk is full; nothing was stored" in full.json()["detail"]
            assert int(full.headers["retry-after"]) > 0
            check_whole(store, person.confirmed)
            judged = http.get("/api/progress").json()["judged"]
            assert judged == len(person.confirmed), "reading goes on"
        small_disk.free()
        assert person.work().json()["task"] is None
        assert process.poll() is None
    assert len(person.confirmed) == TASKS
    check_whole(store, person.confirmed)


def use_up_a_segment(cluster: Cluster) -> None:
    """What a busy day writes, at once: the log goes on in its next megabyte."""
    with (
        suppress(psycopg.OperationalError),  # it is this that met the full disk
        psycopg.connect(cluster.url(), autocommit=True) as connection,
    ):
        connection.execute("SELECT pg_switch_wal()")


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.parametrize("small_disk", [LOG_MB], indirect=True)
def test_a_full_log_stops_postgres_and_with_room_again_everything_is_there_once(
    clip_files, small_disk, tmp_path
):
    """A full disk under PostgreSQL's tables is an error, under its write-ahead log a crash."""
    log = small_disk.folder / "log"
    opened_to_postgres(small_disk.folder)
    cluster = Cluster(f"--waldir={log}", "--wal-segsize=1")
    folder = tmp_path / "project"
    try:
        write_place(folder, Place(database=cluster.new_database()))
        with Store.open(folder) as store:
            ids = store.add_clips(records(clip_files)[:4])
            store.create_tasks([ids] * TASKS, presentation=SMALL)
            store.add_user("ann0", PASSWORD)
            with server(folder) as (url, process), signed_in(url) as http:
                person = Person(http)
                assert person.ask().status_code == person.ask().status_code == 200
                small_disk.fill()
                while (first := person.ask()).status_code == 200:
                    use_up_a_segment(cluster)
                assert "PANIC" in (cluster.folder / "log").read_text()
                for away in (first, person.work(), person.work()):
                    assert away.status_code in (503, 507), away.text
                    assert "nothing was stored" in away.json()["detail"]
                    assert int(away.headers["retry-after"]) > 0
                small_disk.free()
                give_up = time.monotonic() + PATIENCE_SECONDS
                while (last := person.work()).status_code == 503:
                    assert time.monotonic() < give_up, (cluster.folder / "log").read_text()
                    if cluster.pid() is None:  # its recovery failed once more
                        cluster.start()
                    time.sleep(0.2)
                assert last.json()["task"] is None
                assert process.poll() is None
            check_whole(store, person.confirmed)
    finally:
        cluster.stop()


def test_a_full_disk_is_known_by_its_code_whatever_language_postgres_speaks():
    full = psycopg.errors.DiskFull("konnte Datei nicht erweitern: Kein Platz mehr")
    other = psycopg.errors.AdminShutdown("Verbindung wird abgebrochen")
    codes = [
        unavailable(None, OperationalError("INSERT", {}, error)).status_code
        for error in (full, other)
    ]
    assert codes == [507, 503]

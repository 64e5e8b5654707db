"""What breaks in a day of labelling: a killed server, a full disk, a database that is busy or gone, a clock that jumps, two tabs."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from annotation import claims, schema
from annotation.api.app import create_app
from annotation.store import Store
from tests.annotation.annotation_cases import PASSWORD, UNWATCHED, plain_verdict
from tests.annotation.test_access import sign_in
from tests.annotation.test_hostile import answer_to

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-m", "tests.annotation.fault_processes"]


def start(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*PROGRAM, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ}
    )


@contextmanager
def server(folder: Path, dies: str = "never") -> Iterator[tuple[str, subprocess.Popen]]:
    process = start("serve", str(folder), dies)
    try:
        yield process.stdout.readline().strip(), process
    finally:
        process.kill()
        process.wait()


@contextmanager
def browser(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        answer = http.post("/api/login", json={"name": "ann0", "password": PASSWORD})
        http.headers["X-CSRF-Token"] = answer.headers["X-CSRF-Token"]
        yield http


# --- the server dies ---


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_server_killed_around_the_commit_leaves_exactly_one_judgment_after_the_replay(
    new_project, moment
):
    store = new_project(tasks=1, annotators=1)
    folder = store.media.parent
    with server(folder, moment) as (url, process), browser(url) as http:
        task = http.post("/api/claim", json={}).json()["task"]
        with pytest.raises(httpx.TransportError):
            http.post("/api/submit", json=answer_to(task))
        assert process.wait(timeout=30) == -signal.SIGKILL
    assert store.counts()["judgments"] == (1 if moment == "after" else 0)
    with server(folder) as (url, _), browser(url) as http:
        replayed = http.post("/api/submit", json=answer_to(task))
        again = http.post("/api/submit", json=answer_to(task))
    assert replayed.status_code == 200
    assert again.json() == replayed.json()
    assert store.counts()["judgments"] == 1
    with store.read() as connection:
        stored = connection.execute(sa.select(schema.judgment.c.id)).scalar_one()
        chosen = connection.execute(
            sa.select(sa.func.count()).select_from(schema.choice)
        ).scalar_one()
    assert stored == replayed.json()["judgment_id"]
    assert chosen == len(task["dimensions"])


# --- many at once ---


@pytest.mark.parametrize(
    ("processes", "threads", "tasks"),
    [(2, 8, 40), pytest.param(4, 32, 500, marks=pytest.mark.slow)],
)
def test_many_processes_and_threads_lease_each_task_exactly_once(
    new_project, processes, threads, tasks
):
    store = new_project(tasks=tasks, annotators=0)
    each = tasks // processes + 3
    with store.write() as connection:
        connection.execute(
            sa.insert(schema.account),
            [
                {
                    "name": f"w{n}",
                    "password_hash": "none",
                    "role": "annotator",
                    "pseudonym": f"p{n}",
                    "simulated": True,
                    "created_ms": 1,
                }
                for n in range(each * processes)
            ],
        )
    folder = str(store.media.parent)
    running = [
        start("claim_all", folder, str(each * n), str(each), str(threads)) for n in range(processes)
    ]
    got = [process.communicate(timeout=300)[0].split() for process in running]
    assert [process.returncode for process in running] == [0] * processes
    taken = Counter(name for lines in got for name in lines)
    assert taken.pop("none") == each * processes - tasks, "everyone got an answer"
    assert len(taken) == tasks
    with store.read() as connection:
        leased = Counter(connection.execute(sa.select(schema.lease.c.task_id)).scalars())
    assert leased == dict.fromkeys(range(1, tasks + 1), 1)


# --- the clock ---


def test_a_clock_that_jumps_gives_no_task_to_two_and_loses_no_answer(new_project, clock):
    store = new_project(tasks=1, annotators=3)
    people = [store.find_user(f"ann{n}") for n in range(3)]

    def claim(n: int):
        return claims.claim(store, people[n], lease_seconds=60)

    mine = claim(0)
    clock.seconds -= 3600
    assert claim(1) is None, "set back: the lease still stands"
    assert claim(0) == mine
    clock.seconds += 2 * 3600
    theirs = claim(1)
    assert theirs is not None, "set forward: it ran out"
    clock.seconds -= 3600
    late = claims.submit(store, people[0], mine.presentation, "late-key", plain_verdict(mine))
    second = claims.submit(
        store, people[1], theirs.presentation, "their-key", plain_verdict(theirs)
    )
    assert (late.surplus, second.surplus) == (False, True)
    assert claim(2) is None
    assert store.counts()["judgments"] == 2


# --- the disk ---


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_full_disk_is_one_clear_line_and_the_replay_goes_through(new_project):
    store = new_project(tasks=1, annotators=1)
    folder = store.media.parent
    with server(folder) as (url, process), browser(url) as http:
        task = http.post("/api/claim", json={}).json()["task"]
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        written = (folder / "annotation.db-wal").stat().st_size
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (written, hard))
        full = http.post("/api/submit", json=answer_to(task, note="n" * 2000))
        assert full.status_code == 507, full.text
        assert "disk is full; nothing was stored" in full.json()["detail"]
        assert int(full.headers["retry-after"]) > 0
        assert http.get("/api/progress").json()["judged"] == 0, "reading goes on"
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))
        assert http.post("/api/submit", json=answer_to(task, note="n" * 2000)).status_code == 200
    assert store.counts()["judgments"] == 1


# --- the database ---


def test_a_busy_database_is_a_503_that_says_when_to_try_again(new_project):
    new = new_project(tasks=2, annotators=1)
    with Store.open(new.media.parent, busy_seconds=0.3) as store:
        with TestClient(create_app(store, UNWATCHED, page=False)) as client:
            headers = sign_in(client, "ann0")
            task = client.post("/api/claim", json={}, headers=headers).json()["task"]
            with new.write() as other:
                other.execute(sa.select(schema.task).with_for_update())
                other.execute(sa.select(schema.account).with_for_update())
                started = time.monotonic()
                codes = []
                threads = [
                    threading.Thread(
                        target=lambda: codes.append(
                            client.post("/api/submit", json=answer_to(task), headers=headers)
                        )
                    )
                    for _ in range(4)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                waited = time.monotonic() - started
                progress = client.get("/api/progress", headers=headers)
            assert [answer.status_code for answer in codes] == [503] * 4
            assert all(int(answer.headers["retry-after"]) > 0 for answer in codes)
            assert "nothing was stored, try again" in codes[0].json()["detail"]
            assert waited < 20, "nobody waits for everybody's patience in turn"
            assert progress.status_code == 200, "reading goes on"
            replayed = client.post("/api/submit", json=answer_to(task), headers=headers)
            assert replayed.status_code == 200
        assert store.counts()["judgments"] == 1


@pytest.mark.postgres
@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_a_database_that_is_gone_is_a_503_and_the_same_server_goes_on_when_it_is_back(
    new_project, postgres
):
    store = new_project(tasks=2, annotators=1)
    with TestClient(create_app(store, UNWATCHED, page=False)) as client:
        headers = sign_in(client, "ann0")
        task = client.post("/api/claim", json={}, headers=headers).json()["task"]
        postgres.kill()
        for _ in range(3):
            gone = client.post("/api/submit", json=answer_to(task), headers=headers)
            assert gone.status_code == 503, gone.text
            assert "postgres" not in gone.text
            assert int(gone.headers["retry-after"]) > 0
        postgres.start()
        codes = [
            client.post("/api/submit", json=answer_to(task), headers=headers).status_code
            for _ in range(3)
        ]
        assert codes[1:] == [200, 200], "at most one more connection of the old server is met"
    assert store.counts()["judgments"] == 1


# --- two tabs ---


def test_two_tabs_of_one_person_show_one_task_and_store_one_judgment(new_project):
    store = new_project(tasks=3, annotators=1)
    with TestClient(create_app(store, UNWATCHED, page=False)) as client:
        tabs = [sign_in(client, "ann0"), sign_in(client, "ann0")]
        shown = []

        def claim(tab: dict[str, str]) -> None:
            shown.append(client.post("/api/claim", json={}, headers=tab).json()["task"])

        threads = [threading.Thread(target=claim, args=(tabs[n % 2],)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({task["presentation"] for task in shown}) == 1
        first = client.post("/api/submit", json=answer_to(shown[0], "tab-one-key"), headers=tabs[0])
        second = client.post(
            "/api/submit", json=answer_to(shown[1], "tab-two-key"), headers=tabs[1]
        )
        assert (first.status_code, second.status_code) == (200, 409)
        beat = {"presentation": shown[0]["presentation"]}
        answer = client.post("/api/heartbeat", json=beat, headers=tabs[1])
        assert answer.json() == {"leased": False}
        following = {
            client.post("/api/claim", json={}, headers=tab).json()["task"]["presentation"]
            for tab in tabs
        }
        assert len(following) == 1
        assert following != {shown[0]["presentation"]}
    assert store.counts()["judgments"] == 1

"""The database goes away under a running server for as long as a restart takes, while people work: stopped, or locked by another program."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from annotation import database, schema
from annotation.api.app import create_app
from annotation.api.server import running_server
from annotation.client import AnnotationClient
from annotation.database import open_postgres
from annotation.store import Store
from tests.annotation.annotation_cases import PASSWORD, UNWATCHED, plain_verdict, rows
from tests.annotation.test_api import signed_in
from tests.annotation.test_faults import PROGRAM, ROOT
from tests.annotation.test_hostile import answer_to

PEOPLE, TASKS = 4, 12
PAUSE = 0.05
"""Between two requests of one person, so that the work lasts longer than the outage begins late."""
BUSY_SECONDS = 2.0
"""What `fault_processes serve` gives a write; a request may meet it twice: at the lock, then at the database."""
SLOWEST = 2 * BUSY_SECONDS + 2.0
SECONDS = [2.5, pytest.param(30.0, marks=pytest.mark.slow)]

Outage = Callable[[], AbstractContextManager[None]]


@dataclass
class Answer:
    """What one request got."""

    path: str
    status: int
    began: float
    seconds: float
    said: str
    retry_after: str | None


@dataclass
class Worker:
    """One person who judges every task, repeating whatever was not confirmed, under its own key."""

    url: str
    name: str
    answers: list[Answer] = field(default_factory=list)
    in_hand: threading.Event = field(default_factory=threading.Event)
    """Set when they have their second task."""
    go_on: threading.Event = field(default_factory=threading.Event)
    """Until it is set they do not submit it."""
    receipts: dict[str, int] = field(default_factory=dict)
    """Idempotency key -> judgment id."""

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self) -> None:
        with httpx.Client(base_url=self.url, trust_env=False, timeout=60) as http:
            signed = http.post("/api/login", json={"name": self.name, "password": PASSWORD})
            http.headers["X-CSRF-Token"] = signed.headers["X-CSRF-Token"]
            while len(self.receipts) < TASKS:
                task = self.insist(http, "/api/claim", {})["task"]
                if task is None:  # the last one is being answered by someone else this moment
                    continue
                key = f"key-{self.name}-{len(self.receipts)}"
                if self.receipts:
                    self.in_hand.set()
                    self.go_on.wait()
                receipt = self.insist(http, "/api/submit", answer_to(task, key))
                self.receipts[key] = receipt["judgment_id"]

    def insist(self, http: httpx.Client, path: str, body: dict) -> dict:
        while True:
            time.sleep(PAUSE)
            began = time.monotonic()
            answer = http.post(path, json=body)
            took = time.monotonic() - began
            retry = answer.headers.get("retry-after")
            self.answers.append(Answer(path, answer.status_code, began, took, answer.text, retry))
            if answer.status_code == 200:
                return answer.json()
            assert answer.status_code == 503, answer.text


@contextmanager
def server(folder: Path, said: Path) -> Iterator[str]:
    """The site in a process of its own, whose every word of complaint lands in `said`."""
    with said.open("w") as errors:
        process = subprocess.Popen(
            [*PROGRAM, "serve", str(folder), "never"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield process.stdout.readline().strip()
            assert process.poll() is None, "the server ended by itself"
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def outage(database: str, request: pytest.FixtureRequest) -> Callable[[Store], Outage]:
    """The database of a store is out of reach inside the `with`."""

    @contextmanager
    def locked(file: Path) -> Iterator[None]:
        holder = subprocess.Popen(
            [*PROGRAM, "hold", str(file)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert holder.stdout.readline() == "held\n"
        yield
        holder.communicate("\n")

    @contextmanager
    def stopped() -> Iterator[None]:
        cluster = request.getfixturevalue("postgres")
        cluster.kill()
        try:
            yield
        finally:
            cluster.start()

    if database == "sqlite":
        return lambda store: lambda: locked(store.media.parent / "annotation.db")
    return lambda store: stopped


@pytest.mark.parametrize("seconds", SECONDS)
def test_a_database_that_goes_away_under_a_team_costs_no_judgment_and_no_restart(
    new_project, outage, database, tmp_path, seconds
):
    store = new_project(tasks=TASKS, need=PEOPLE, annotators=PEOPLE)
    away = outage(store)
    said = tmp_path / "server.log"
    with server(store.media.parent, said) as url:
        team = [Worker(url, f"ann{n}") for n in range(PEOPLE)]
        for person in team:
            person.thread.start()
        for person in team:
            person.in_hand.wait(60)
        team[1].go_on.set()  # is anywhere when it happens, the others are about to submit
        with away():
            down = time.monotonic()
            for person in team:
                person.go_on.set()
            time.sleep(seconds)
            up = time.monotonic()
        for person in team:
            person.thread.join(timeout=120)
            assert not person.thread.is_alive()

    refused = [a for person in team for a in person.answers if a.status == 503]
    assert {a.path for a in refused} >= {"/api/submit"}
    for answer in refused:
        assert "nothing was stored, try again" in answer.said
        assert int(answer.retry_after) > 0
        assert "postgres" not in answer.said
    during = [a for p in team for a in p.answers if down < a.began and a.began + a.seconds < up]
    assert {a.status for a in during} == {503}, "no judgment can be confirmed meanwhile"
    assert max(a.seconds for p in team for a in p.answers) < SLOWEST
    assert "Traceback" not in said.read_text()

    confirmed = [number for person in team for number in person.receipts.values()]
    stored = rows(store, schema.judgment)
    assert sorted(confirmed) == [row.id for row in stored], "each is there once, and none but them"
    assert len({(row.task_id, row.account_id) for row in stored}) == TASKS * PEOPLE == len(stored)
    assert store.counts()["open_tasks"] == 0


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_locked_sqlite_holds_one_thread_and_not_every_visitor(new_project, outage):
    """A server has 40 threads: were each to wait its full time for the lock, those who only read would wait behind them."""
    new = new_project(tasks=1, annotators=1)
    with (
        Store.open(new.media.parent, busy_seconds=BUSY_SECONDS) as store,
        running_server(create_app(store, UNWATCHED, page=False)) as url,
        signed_in(url) as http,
    ):
        task = http.post("/api/claim", json={}).json()["task"]

        def submit() -> httpx.Response:
            return http.post("/api/submit", json=answer_to(task))

        with outage(new)(), ThreadPoolExecutor(80) as crowd:
            assert submit().status_code == 503
            began = time.monotonic()
            refused = [crowd.submit(submit) for _ in range(120)]
            read = crowd.submit(http.get, "/api/progress")
            assert read.result().status_code == 200
            assert {answer.result().status_code for answer in refused} == {503}
            waited = time.monotonic() - began
        assert waited < 2 * BUSY_SECONDS, "three times 40 threads in turn would take thrice as long"
        assert submit().status_code == 200
    assert new.counts()["judgments"] == 1


def test_a_simulated_annotator_waits_until_the_database_is_back(new_project, outage):
    new = new_project(tasks=1, annotators=1)
    with (
        Store.open(new.media.parent, busy_seconds=0.3) as store,
        running_server(create_app(store, UNWATCHED, page=False)) as url,
        AnnotationClient(url, "ann0", PASSWORD) as client,
        ThreadPoolExecutor() as aside,
    ):
        task = client.claim()
        with outage(new)():
            sent = aside.submit(client.submit, task, plain_verdict(task))
            time.sleep(1.0)
            assert not sent.done()
        assert [sent.result(timeout=30)] == [row.id for row in rows(new, schema.judgment)]


@pytest.mark.browser
@pytest.mark.parametrize(
    ("database", "seconds"),
    [
        ("sqlite", 3.0),
        pytest.param("postgres", 30.0, marks=[pytest.mark.slow, pytest.mark.postgres]),
    ],
    indirect=["database"],
)
def test_the_page_keeps_an_answer_while_the_database_is_away_and_sends_it_by_itself(
    new_project, outage, browser, seconds
):
    from tests.annotation.browser_cases import press, sign_in, wait_for_text

    new = new_project(tasks=2, annotators=0)
    new.add_user("ann", PASSWORD)
    with (
        Store.open(new.media.parent, busy_seconds=0.5) as store,
        running_server(create_app(store, UNWATCHED)) as url,
    ):
        page, errors, _ = sign_in(browser, url)
        answered = []
        page.on(
            "response",
            lambda got: answered.append(got.status) if got.url.endswith("/api/submit") else None,
        )
        with outage(new)():
            press(page, "t", "t", "t", "t", "Enter")
            wait_for_text(page, "#status", "kept on this device and will be sent by itself")
            page.wait_for_timeout(1000 * seconds)
            assert "kept on this device" in page.inner_text("#status")
        wait_for_text(page, "#status", "Saved as #1")
        wait_for_text(page, "#progress", "1 of 2")
        assert answered[-1] == 200
        assert len(answered) > 2
        assert set(answered[:-1]) == {503}
        assert errors == []
    assert [row.id for row in rows(new, schema.judgment)] == [1]


@pytest.mark.postgres
def test_hardly_anybody_meets_a_connection_that_was_cut(postgres, monkeypatch):
    import psycopg

    url, pings = postgres.new_database(), []
    with closing(open_postgres(url)) as opened:
        dialect = opened.engine.dialect
        ping = dialect.do_ping
        monkeypatch.setattr(dialect, "do_ping", lambda raw: pings.append(raw) or ping(raw))

        def cut() -> None:
            with psycopg.connect(url, autocommit=True) as other:
                other.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity "
                    "where datname = current_database() and pid <> pg_backend_pid()"
                )

        def ask() -> int:
            with opened.write() as connection:
                return connection.exec_driver_sql("select 1").scalar_one()

        def look() -> int:
            with opened.read() as connection:
                return connection.exec_driver_sql("select 1").scalar_one()

        monkeypatch.setattr(database, "BELIEVED_SECONDS", 600.0)
        assert ask() == ask() == look() == 1
        assert not pings, "a connection used a moment ago is believed"
        cut()
        with pytest.raises(sa.exc.OperationalError):
            ask()
        assert ask() == 1
        assert look() == 1, "since one was found dead, the others are not believed"
        cut()
        monkeypatch.setattr(database, "BELIEVED_SECONDS", 0.0)
        assert ask() == 1, "one that was idle is asked, and the dead one replaced unseen"
        assert pings


@pytest.mark.postgres
def test_a_database_server_that_vanished_is_given_up_within_seconds(postgres):
    """What the kernel is told; a cable cannot be cut in a test."""
    with closing(open_postgres(postgres.url())) as opened:
        for engine in (opened.engine, opened.read_engine):
            with engine.connect() as connection:
                told = connection.connection.driver_connection.info.get_parameters()
            assert int(told["connect_timeout"]) * 1000 == int(told["tcp_user_timeout"]) <= 10_000
            idle, interval, count = (
                int(told[f"keepalives_{name}"]) for name in ("idle", "interval", "count")
            )
            assert idle + interval * count < 60

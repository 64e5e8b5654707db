"""What the tests of this room share beside fixtures."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from annotation import claims, schema
from annotation.accounts import Account
from annotation.config import AnnotateConfig
from annotation.presentation import PresentationConfig
from annotation.records import Choice, ClipRecord, TaskView, Verdict
from annotation.routing import RoutingConfig
from annotation.store import Store

SMALL = PresentationConfig(min_side=32)
PASSWORD = "correct horse"
UNWATCHED = AnnotateConfig(must_watch=0)
"""Served to those who have no eyes."""
NUM_PROMPTS = 3


class Clock:
    """A clock that tests turn by hand."""

    def __init__(self) -> None:
        self.seconds = 1_800_000_000.0

    def __call__(self) -> float:
        return self.seconds


def records(files: list[Path]) -> list[ClipRecord]:
    return [
        ClipRecord(
            path,
            f"Prompt number {index // 4}: something {['red', 'green', 'blue'][index // 4]} moves.",
            model=f"secretmodel{index % 4}",
            stage=f"secretstage{index % 2}",
            seed=index,
        )
        for index, path in enumerate(files)
    ]


def plain_verdict(task: TaskView, best: int = 0, worst: int = 1) -> Verdict:
    """The same pair in every dimension: always admissible."""
    return Verdict(tuple(Choice(d, best, worst) for d in task.dimensions), seconds=4.0)


LEASE = 60.0


@dataclass
class Person:
    """One annotator at a store, without HTTP."""

    store: Store
    name: str
    routing: RoutingConfig | None = None

    @property
    def account(self) -> Account:
        account = self.store.find_user(self.name)
        assert account is not None
        return account

    def claim(self) -> TaskView | None:
        return claims.claim(self.store, self.account, lease_seconds=LEASE, routing=self.routing)

    def submit(
        self, task: TaskView, verdict: Verdict | None = None, *, key: str = "", **options: Any
    ) -> claims.Receipt:
        verdict = verdict or plain_verdict(task)
        key = key or secrets.token_hex(8)
        options.setdefault("routing", self.routing)
        return claims.submit(self.store, self.account, task.presentation, key, verdict, **options)

    def judge(self, best: int = 0, worst: int = 1) -> claims.Receipt:
        """Claims a task and gives the same pair of places in every dimension."""
        task = self.claim()
        assert task is not None
        return self.submit(task, plain_verdict(task, best, worst))


def slots(store: Store, task: TaskView) -> dict[int, int]:
    """Clip id -> place in the order shown."""
    with store.read() as connection:
        order = connection.execute(
            sa.select(schema.presentation.c.clip_order).where(
                schema.presentation.c.token == task.presentation
            )
        ).scalar_one()
    return {clip_id: place for place, clip_id in enumerate(order)}


def state_of(store: Store, task_id: int) -> str:
    with store.read() as connection:
        query = sa.select(schema.task.c.state).where(schema.task.c.id == task_id)
        return str(connection.execute(query).scalar_one())


def rows(store: Store, table: sa.Table) -> list[Any]:
    """All rows of a table, oldest first."""
    with store.read() as connection:
        return list(connection.execute(sa.select(table).order_by(*table.primary_key.columns)))


@contextmanager
def counted(store: Store) -> Iterator[Counter[str]]:
    """Counts statements and transactions."""
    seen: Counter[str] = Counter()

    def statement(_connection: object, _cursor: object, said: str, *_: object) -> None:
        seen["statements"] += not said.startswith("BEGIN")

    def begin(_: object) -> None:
        seen["transactions"] += 1

    engines = (store.database.engine, store.database.read_engine)
    for engine in engines:
        event.listen(engine, "before_cursor_execute", statement)
        event.listen(engine, "begin", begin)
    try:
        yield seen
    finally:
        for engine in engines:
            event.remove(engine, "before_cursor_execute", statement)
            event.remove(engine, "begin", begin)

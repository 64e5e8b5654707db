"""What one request costs: CPU per claim and per submit in the server, the database and the client, and statements sent.

    python -m benchmarks.annotation_cost --database postgres --judged 5000

The project holds `--judged` tasks that are done (two judgments by others each and one by everyone in turn) before the open ones, so that a
claim whose query grew with them would show. Requests come one after the other; unlike in `annotation_load` nothing waits here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import sqlalchemy as sa

from annotation import claims
from annotation import schema as t
from annotation.records import Choice, Verdict
from annotation.store import Store
from benchmarks.annotation_load import (
    ANNOTATORS,
    CLIPS,
    Annotator,
    Stage,
    cpu_seconds,
    make_project,
    served,
)
from tests.annotation.annotation_cases import counted
from tests.postgres_cluster import Cluster

ROUNDS = 3
KINDS = ("claim", "media", "draft", "heartbeat", "submit")


def judge_beforehand(store: Store, number: int) -> None:
    """Marks the first `number` tasks as done, with the rows that judging leaves behind."""
    with store.write() as connection:
        accounts = list(connection.execute(sa.select(t.account.c.id)).scalars())
        tasks = list(
            connection.execute(sa.select(t.task).order_by(t.task.c.id).limit(number)).all()
        )
        clips: dict[int, list[int]] = {}
        for row in connection.execute(sa.select(t.task_clip)):
            clips.setdefault(row.task_id, []).append(row.clip_id)
        who = {
            task.id: [accounts[(index * 4 + k) % len(accounts)] for k in range(4)]
            for index, task in enumerate(tasks)
        }
        shown = [
            {
                "id": index + 1,
                "token": f"before-{index}",
                "task_id": task_id,
                "account_id": account,
                "clip_order": clips[task_id],
                "dimension_order": ["motion_quality"],
                "guideline_version": "0",
                "shown_ms": 1,
            }
            for index, (task_id, account) in enumerate(
                (task_id, account) for task_id, them in who.items() for account in them
            )
        ]
        if not shown:
            return
        connection.execute(sa.insert(t.presentation), shown)
        connection.execute(
            sa.insert(t.judgment),
            [
                {
                    "task_id": row["task_id"],
                    "account_id": row["account_id"],
                    "presentation_id": row["id"],
                    "idempotency_key": row["token"],
                    "payload_hash": "0",
                    "kind": "best_worst",
                    "surplus": index % 4 >= 2,
                    "simulated": True,
                    "guideline_version": "0",
                    "note": "",
                    "submitted_ms": 1,
                }
                for index, row in enumerate(shown)
            ],
        )
        connection.execute(
            sa.update(t.task)
            .where(t.task.c.id.in_(list(who)))
            .values(state="done", num_judgments=t.task.c.need_n)
        )
        if not store.database.is_sqlite:
            connection.exec_driver_sql(
                "select setval(pg_get_serial_sequence('presentation', 'id'), max(id)) from presentation"
            )
    if not store.database.is_sqlite:
        with store.database.engine.connect().execution_options(
            isolation_level="AUTOCOMMIT"
        ) as connection:
            connection.exec_driver_sql("vacuum analyze")


def statements(folder: Path) -> dict[str, dict[str, int]]:
    """Sent by one claim and one submit."""
    with Store.open(folder) as store:
        account = next(one for one in store.users() if one.simulated)
        with counted(store) as claimed:
            task = claims.claim(store, account, lease_seconds=60)
        assert task is not None
        verdict = Verdict(tuple(Choice(name, 0, 1).with_first() for name in task.dimensions))
        with counted(store) as submitted:
            claims.submit(store, account, task.presentation, "cost-key-1", verdict)
    return {"claim": dict(claimed), "submit": dict(submitted)}


async def cost(
    port: int, pid: int, database_pid: int | None, signed_in: list[tuple[str, str]]
) -> dict[str, dict[str, float]]:
    """Milliseconds of CPU per request of each kind, after a round that warms everything up."""
    crowd = [Annotator(port, cookie, csrf) for cookie, csrf in signed_in]
    spent: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    stage = Stage()

    def now() -> dict[str, float]:
        return {
            "server": cpu_seconds(pid),
            "database": cpu_seconds(database_pid) if database_pid else 0.0,
            "client": time.process_time(),
            "wall": time.perf_counter(),
        }

    async def each(kind: str, act: Callable[[Annotator], Awaitable[None]]) -> None:
        before = now()
        for one in crowd:
            await act(one)
        for name, value in now().items():
            spent[kind][name] += value - before[name]

    for number in range(ROUNDS + 1):
        if number == 1:
            spent = {kind: Counter() for kind in KINDS}
        clip = number % CLIPS
        await each("claim", lambda one: one.claim(stage, 0.0))
        await each("media", lambda one, clip=clip: one.media(stage, 0.0, clip))
        await each("draft", lambda one: one.draft(stage, 0.0))
        await each("heartbeat", lambda one: one.heartbeat(stage, 0.0))
        await each("submit", lambda one: one.submit(stage, 0.0))
    assert not stage.failures, stage.failures
    share = 1000 / (ROUNDS * len(crowd))
    return {
        kind: {name: round(value * share, 2) for name, value in found.items()}
        for kind, found in spent.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--database", choices=("postgres", "sqlite"), default="postgres")
    parser.add_argument("--judged", type=int, default=5000, help="tasks that are done already")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        cluster = None
        if options.database == "postgres":
            cluster = Cluster(durable=True)
            stack.callback(cluster.stop)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reelhf-cost-")))
        open_tasks = ANNOTATORS * (ROUNDS + 2)
        signed_in = make_project(
            folder, cluster and cluster.new_database(), options.judged + open_tasks
        )
        with Store.open(folder) as store:
            judge_beforehand(store, options.judged)
        print("sent", json.dumps(statements(folder)), flush=True)
        database_pid = cluster and cluster.pid()
        with served(folder, 1) as (port, pid):
            found = asyncio.run(cost(port, pid, database_pid, signed_in))
    print("milliseconds per request: CPU of each process, and wall")
    for kind, row in found.items():
        print(f"  {kind:<10}" + "  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()

"""Programs that the fault tests run in processes of their own, so that they can be killed and starved."""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import threading
import time

from annotation import claims
from annotation.api.app import create_app
from annotation.api.server import running_server
from annotation.config import AnnotateConfig
from annotation.store import Store


def serve(folder: str, dies: str) -> None:
    """Serves a project; `dies` is `never`, or when a submission kills the process: `before` or `after` its commit."""
    submit = claims.submit

    def fatal_submit(*arguments, **options):
        if dies == "after":
            submit(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    if dies != "never":
        claims.submit = fatal_submit
    with (
        Store.open(folder, busy_seconds=2.0) as store,
        running_server(create_app(store, AnnotateConfig(must_watch=0), page=False)) as url,
    ):
        print(url, flush=True)
        time.sleep(600)


def hold(file: str) -> None:
    """Takes SQLite's write lock and keeps it until a line comes in."""
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    print("held", flush=True)
    sys.stdin.readline()
    connection.execute("ROLLBACK")


def claim_all(folder: str, first: str, number: str, threads: str) -> None:
    """Claims one task for each of `number` accounts, from many threads at once; prints what each got."""
    with Store.open(folder) as store:
        waiting = store.users()[int(first) : int(first) + int(number)]
        taken: list[str] = []

        def work() -> None:
            while waiting:
                try:
                    account = waiting.pop()
                except IndexError:
                    return
                task = claims.claim(store, account, lease_seconds=600)
                taken.append("none" if task is None else task.presentation)

        workers = [threading.Thread(target=work) for _ in range(int(threads))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    print("\n".join(taken), flush=True)


if __name__ == "__main__":
    {"serve": serve, "claim_all": claim_all, "hold": hold}[sys.argv[1]](*sys.argv[2:])

"""Several server processes that are one site: each opens the project for itself, PostgreSQL keeps them apart."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from annotation.api.server import server_options
from annotation.config import AnnotateConfig
from annotation.database import Database
from reelhf.errors import UserError

CHECK_SECONDS = 0.5
STOP_SECONDS = 15.0
QUICK_SECONDS = 20.0
MAX_QUICK_DEATHS = 6
SERVER_BUSY_SECONDS = 5.0
"""A request that cannot write for so long is answered 503; the browser keeps what was said and tries again."""


def usual_workers(database: Database, cores: int) -> int:
    """One process computes on one core only, and a second carries bursts that one cannot; SQLite has one writer anyway."""
    return 1 if database.is_sqlite else min(2, cores)


def serve_with_workers(
    project: Path, config: AnnotateConfig, listeners: Sequence[socket.socket]
) -> None:
    """Serves a project from a process per socket until a signal ends it; one that dies is replaced, on its socket.

    Raises: UserError if processes die as soon as they start.
    """
    told = json.dumps({"project": str(project), "config": config.model_dump()})
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    spawn = multiprocessing.get_context("spawn")

    def start(listener: socket.socket) -> BaseProcess:
        process = spawn.Process(target=work, args=(told, listener), daemon=True)
        process.start()
        return process

    running = [start(listener) for listener in listeners]
    quick_deaths, last_death = 0, time.monotonic()
    while not ended.wait(CHECK_SECONDS):
        for index, process in enumerate(running):
            if process.is_alive():
                continue
            now = time.monotonic()
            quick_deaths = quick_deaths + 1 if now - last_death < QUICK_SECONDS else 1
            last_death = now
            if quick_deaths > MAX_QUICK_DEATHS:
                _stop(running)
                raise UserError("server processes die as soon as they start; see the lines above")
            running[index] = start(listeners[index])
    _stop(running)


def work(told: str, listener: socket.socket) -> None:
    """One server process; leaves when it is told to, or when its parent is gone."""
    import uvicorn

    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the parent, which ends us in order
    settings = json.loads(told)
    config = AnnotateConfig.model_validate(settings["config"])
    options = server_options(config.trusted_proxies)
    site = worker_app(settings["project"], config)
    server = uvicorn.Server(uvicorn.Config(site, **options))
    threading.Thread(target=_leave_with_parent, args=(server,), daemon=True).start()
    server.run(sockets=[listener])


def _leave_with_parent(server: Any) -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(CHECK_SECONDS)
    server.should_exit = True


def _stop(running: list[BaseProcess]) -> None:
    for process in running:
        process.terminate()
    for process in running:
        process.join(timeout=STOP_SECONDS)
        if process.is_alive():
            process.kill()


def worker_app(project: str, config: AnnotateConfig) -> FastAPI:
    """The site, in a server process of its own."""
    from annotation.api.app import create_app
    from annotation.store import Store

    store = Store.open(project, create=False, busy_seconds=SERVER_BUSY_SECONDS)
    return create_app(store, config)


def check_exposure(host: str, *, demo: bool, encrypted: bool, plain_http: bool) -> str | None:
    """What is wrong with listening on an address that other machines reach; None if nothing is."""
    if host in ("127.0.0.1", "::1", "localhost"):
        return None
    if demo:
        return "--demo signs in without a password, so it serves this machine alone: leave --host out, or --demo"
    if not encrypted and not plain_http:
        return (
            f"on {host} passwords would cross the network in the clear: put a TLS proxy in front and add --secure-cookie, "
            "or add --plain-http if the network is yours alone"
        )
    return None

"""Several server processes that are one site: each opens the project for itself, PostgreSQL keeps them apart."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from fastapi import FastAPI

from annotation.api.server import server_options
from annotation.config import AnnotateConfig

VARIABLE = "REELHF_SERVES"
"""What a worker process reads: the project and its settings as JSON."""
SERVER_BUSY_SECONDS = 5.0
"""A request that cannot write for so long is answered 503; the browser keeps what was said and tries again."""


def serve_with_workers(
    project: Path, config: AnnotateConfig, listener: socket.socket, workers: int
) -> None:
    """Serves a project from `workers` processes until a signal ends it; a process that dies is replaced."""
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    os.environ[VARIABLE] = json.dumps({"project": str(project), "config": config.model_dump()})
    settings = uvicorn.Config(
        "annotation.api.workers:worker_app",
        factory=True,
        workers=workers,
        **server_options(config.trusted_proxies),
    )
    server = uvicorn.Server(settings)
    Multiprocess(settings, target=server.run, sockets=[listener]).run()


def worker_app() -> FastAPI:
    """The site, in a worker process."""
    from annotation.api.app import create_app
    from annotation.store import Store

    told = json.loads(os.environ[VARIABLE])
    store = Store.open(told["project"], create=False, busy_seconds=SERVER_BUSY_SECONDS)
    return create_app(store, AnnotateConfig.model_validate(told["config"]))


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

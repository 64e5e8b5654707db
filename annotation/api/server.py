"""Any FastAPI app, served from a thread of this process."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI

from reelhf.errors import UserError


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening socket; `shared` lets others of this user listen on the port too. Raises UserError if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; with it, a browser's second request on a connection
    # waits 40 ms for an acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror}. Choose another port with --port"
        ) from error
    return listener


def bind_several(host: str, port: int, count: int) -> list[socket.socket]:
    """A listening socket per server process, among which Linux deals out the connections.

    Processes that share one socket do not get equal shares: whoever wakes first accepts all that wait. Elsewhere than on Linux
    they share one all the same: only there does the kernel deal.
    """
    if sys.platform != "linux":
        return [bind(host, port)] * count
    return [bind(host, port, shared=True) for _ in range(count)]


def server_options(trusted_proxies: Sequence[str]) -> dict[str, Any]:
    """How uvicorn is told to serve: no access log, and nobody's word on where a request came from but the trusted proxies'."""
    return {
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "proxy_headers": bool(trusted_proxies),
        "forwarded_allow_ips": list(trusted_proxies),
        "timeout_keep_alive": 75,
    }


@contextmanager
def running_server(
    app: FastAPI, *, host: str = "127.0.0.1", port: int = 0, trusted_proxies: Sequence[str] = ()
) -> Iterator[str]:
    """Serves an app from a thread; yields its base URL and stops at the end.

    Args:
        port: 0 takes a free one.
        trusted_proxies: addresses whose X-Forwarded-For and -Proto are believed.
    """
    import uvicorn

    listener = bind(host, port)
    server = uvicorn.Server(uvicorn.Config(app, **server_options(trusted_proxies)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        yield f"http://{host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()

"""Where the copies for showing are made: in threads of this machine, or on the nodes of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

from reelhf.errors import UserError

ENGINES = ("local", "ray")
MAX_THREADS = 8


class Pool(Protocol):
    """Anything that applies a function to many things at once and gives the results in order."""

    def map(self, function: Callable[[Any], Any], items: Iterable[Any], /) -> Iterable[Any]: ...


class RayPool:
    """Each item is a task of a Ray cluster. Its nodes must see the project's media folder under the same path."""

    def __init__(self, ray: Any):
        self._ray = ray

    def map(self, function: Callable[[Any], Any], items: Iterable[Any], /) -> Iterable[Any]:
        remote = self._ray.remote(num_cpus=1)(lambda item: function(item))
        return self._ray.get([remote.remote(item) for item in items])


@contextmanager
def copy_pool(engine: str = "local") -> Iterator[Pool]:
    """Workers to make copies with; Ray's are those of RAY_ADDRESS, or of this machine where that is not set.

    Raises: UserError for an engine we do not know, or one that is not installed.
    """
    if engine == "local":
        with ThreadPoolExecutor(max_workers=min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            yield pool
        return
    if engine != "ray":
        raise UserError(f"engine is {engine!r}; expected one of {', '.join(ENGINES)}")
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install 'reelhf[ray]'") from error
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        yield RayPool(ray)
    finally:
        if ours:
            ray.shutdown()

"""Guessing passwords gets slow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

ADDRESS_FACTOR = 10
"""Failures an address may have for each that a name may have: a whole office can sit behind one address."""


class LoginThrottle:
    """Counts failed sign-ins per name and per address; forgets them after the pause."""

    def __init__(self, failures: int, pause: float, clock: Callable[[], float] = time.monotonic):
        self._failures, self._pause, self._clock = failures, pause, clock
        self._seen: dict[str, list[float]] = {}
        self._lock = threading.Lock()

    def wait(self, *keys: str) -> float:
        """Seconds until the next try is allowed; 0 if it is now."""
        now = self._clock()
        with self._lock:
            return max(self._wait_for(key, now) for key in keys)

    def failed(self, *keys: str) -> None:
        with self._lock:
            for key in keys:
                self._seen.setdefault(key, []).append(self._clock())

    def succeeded(self, key: str) -> None:
        with self._lock:
            self._seen.pop(key, None)

    def _wait_for(self, key: str, now: float) -> float:
        """Seconds one key must wait; forgets what is older than the pause."""
        recent = [at for at in self._seen.pop(key, ()) if now - at < self._pause]
        if recent:
            self._seen[key] = recent
        limit = self._failures * (ADDRESS_FACTOR if key.startswith("address ") else 1)
        return self._pause - (now - recent[-limit]) if len(recent) >= limit else 0.0

"""Guessing passwords gets slow, whichever server process is asked."""

from __future__ import annotations

import hashlib
import math

from sqlalchemy import delete, insert, select

from annotation import schema as t
from annotation.store import Store

ADDRESS_FACTOR = 10
"""Failures an address may have for each that a name may have: a whole office can sit behind one address."""


class LoginThrottle:
    """Counts failed sign-ins per name and per address in the database; forgets them after the pause.

    Args:
        failures: wrong passwords for one name before it pauses.
        pause: how long, in seconds.
    """

    def __init__(self, store: Store, failures: int, pause: float):
        self._store, self._failures = store, failures
        self._pause_ms = math.ceil(pause * 1000)

    def wait(self, *keys: str) -> float:
        """Seconds until the next try is allowed; 0 if it is now."""
        now = self._store.now_ms()
        waits = [0.0]
        with self._store.read() as connection:
            for key in keys:
                limit = self._failures * (ADDRESS_FACTOR if key.startswith("address ") else 1)
                failed = t.sign_in_failure.c.failed_ms
                decisive = connection.execute(
                    select(failed)
                    .where(
                        t.sign_in_failure.c.key_hash == _hash(key),
                        failed > now - self._pause_ms,
                        failed <= now,  # a clock that was set back must lock nobody out
                    )
                    .order_by(failed.desc())
                    .offset(limit - 1)
                    .limit(1)
                ).scalar()
                if decisive is not None:
                    waits.append((decisive + self._pause_ms - now) / 1000)
        return max(waits)

    def failed(self, *keys: str) -> None:
        now = self._store.now_ms()
        with self._store.write() as connection:
            connection.execute(
                delete(t.sign_in_failure).where(
                    t.sign_in_failure.c.failed_ms <= now - self._pause_ms
                )
            )
            connection.execute(
                insert(t.sign_in_failure),
                [{"key_hash": _hash(key), "failed_ms": now} for key in keys],
            )

    def succeeded(self, key: str) -> None:
        with self._store.write() as connection:
            connection.execute(
                delete(t.sign_in_failure).where(t.sign_in_failure.c.key_hash == _hash(key))
            )


def _hash(key: str) -> str:
    """So that the table names nobody."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()

"""Links to media that expire: an HMAC with a key that all server processes of a project share."""

from __future__ import annotations

import hashlib
import hmac
import secrets

from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError

from annotation import schema as t
from annotation.store import Store


class Forged(Exception):
    """The signature is missing or wrong."""


class Expired(Exception):
    """The signature is right, but its time is over."""


class Signer:
    """Signs paths of this site.

    Args:
        key: of the project, from `site_key`.
    """

    def __init__(self, store: Store, key: bytes):
        self._store, self._key = store, key

    def sign(self, path: str, *, seconds: float) -> str:
        """The path with its last second and its signature."""
        until = self._store.now_ms() // 1000 + int(seconds)
        return f"{path}?until={until}&signature={self._signature(path, str(until))}"

    def check(self, path: str, until: str, signature: str) -> None:
        """Raises Forged or Expired."""
        expected = self._signature(path, until)
        if not hmac.compare_digest(signature.encode(), expected.encode()):
            raise Forged
        if int(until) < self._store.now_ms() // 1000:
            raise Expired

    def _signature(self, path: str, until: str) -> str:
        message = f"{path}\n{until}".encode("utf-8", "surrogatepass")
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()[:40]


def site_key(store: Store, name: str) -> bytes:
    """The project's secret of that name, made on first use."""
    query = select(t.site_secret.c.value).where(t.site_secret.c.name == name)
    with store.read() as connection:
        value = connection.execute(query).scalar()
    if value is None:
        try:
            with store.write() as connection:
                connection.execute(
                    insert(t.site_secret).values(name=name, value=secrets.token_hex(32))
                )
        except IntegrityError:  # another process was first: its key is everyone's
            pass
        with store.read() as connection:
            value = connection.execute(query).scalar_one()
    return bytes.fromhex(value)

"""Clips as files: a local folder, which mirrors object storage where several servers share one project.

Every file is immutable and named by its content, so a copy once fetched stays right.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from reelhf.errors import UserError


class Files:
    """The media of a project by their keys, such as `shown/0123abcd.mp4`.

    Args:
        folder: where they lie here.
        remote: address of the object storage that holds all of them (`s3://bucket/prefix`, anything fsspec knows); None if
            the folder does.
    """

    def __init__(self, folder: Path, remote: str | None = None):
        self.folder = folder
        self.remote = remote

    def local(self, key: str) -> Path:
        """Where the file lies on this machine, fetched first if need be.

        Raises: FileNotFoundError if it is nowhere; ValueError if the key leads out of the folder.
        """
        path = self.folder / key
        inside = self.folder.resolve()
        if PurePosixPath(key).is_absolute() or not path.resolve().is_relative_to(inside):
            raise ValueError(f"{key!r} leads out of the media folder")
        if not path.is_file():
            if self.remote is None:
                raise FileNotFoundError(path)
            self._fetch(key, path)
        return path

    def share(self, keys: Iterable[str]) -> None:
        """Puts files that were made here into the object storage, if there is one."""
        if self.remote is None:
            return
        for key in keys:
            target = f"{self._root}/{key}"
            if not self._filesystem.exists(target):
                self._try(self._filesystem.put_file, str(self.folder / key), target)

    def delete(self, keys: Iterable[str]) -> None:
        """Removes files here and in the object storage; one that is gone already is no error."""
        for key in keys:
            (self.folder / key).unlink(missing_ok=True)
            if self.remote is not None and self._filesystem.exists(f"{self._root}/{key}"):
                self._try(self._filesystem.rm_file, f"{self._root}/{key}")

    def _fetch(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{secrets.token_hex(4)}.tmp")
        try:
            self._try(self._filesystem.get_file, f"{self._root}/{key}", str(aside))
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)

    def _try(self, action: Any, *arguments: str) -> None:
        try:
            action(*arguments)
        except FileNotFoundError:
            raise
        except Exception as error:  # each kind of storage has errors of its own
            raise UserError(f"the object storage {self.remote} failed: {error}") from error

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        assert self.remote is not None
        try:
            filesystem, root = url_to_fs(self.remote)
            if "file" in filesystem.protocol:  # a shared folder has real folders; a bucket has none
                filesystem.auto_mkdir = True
            return filesystem, root
        except ImportError as error:
            raise UserError(
                f"{self.remote} needs another package: {error}. For s3://: pip install 'reelhf[s3]'"
            ) from error
        except ValueError as error:
            raise UserError(f"{self.remote!r} is no address of object storage: {error}") from error

    @property
    def _filesystem(self) -> Any:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1].rstrip("/")

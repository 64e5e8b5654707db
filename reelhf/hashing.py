"""Content hashes: the key of every cache and the identity of every file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

BLOCK_BYTES = 1 << 20


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def content_hash(*objects: Any) -> str:
    """Hex sha256 of what the objects hold, 64 characters, the same on every machine.

    Args:
        objects: JSON-able values, pydantic models, or paths. A `Path` counts by content: a file by
            its bytes, a folder by the relative names and bytes of all files under it. A string is
            a string, even when it spells a path.
    """
    digest = hashlib.sha256()
    for item in objects:
        digest.update(hashlib.sha256(_canonical(item).encode()).digest())
    return digest.hexdigest()


def weight_hashes(folder: str | Path) -> dict[str, str]:
    """sha256 of a model folder's weight files by relative name; its other files are written anew at each save and may differ in form."""
    files = sorted(Path(folder).rglob("*.safetensors"))
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def _canonical(item: Any) -> str:
    return json.dumps(_plain(item), sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _plain(item: Any) -> Any:
    if isinstance(item, BaseModel):
        return {"model": type(item).__name__, "fields": item.model_dump(mode="json")}
    if isinstance(item, Path):
        return {"content": _path_content(item)}
    if isinstance(item, dict):
        return {str(key): _plain(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [_plain(value) for value in item]
    if item is None or isinstance(item, (bool, int, float, str)):
        return item
    raise TypeError(f"cannot hash a {type(item).__name__}; pass JSON-able values, models or paths")


def _path_content(path: Path) -> Any:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return {file.relative_to(path).as_posix(): sha256_file(file) for file in files}
    return sha256_file(path)

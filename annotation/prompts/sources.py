"""Prompts from files: plain text, CSV, JSON, JSON lines, usage logs."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from reelhf.errors import UserError, did_you_mean

FORMATS = ("text", "csv", "jsonl", "json", "log")
SUFFIXES = {".txt": "text", ".csv": "csv", ".jsonl": "jsonl", ".json": "json", ".log": "log"}
PROMPT_KEYS = ("prompt", "prompt_en", "text", "caption", "input", "query")
CATEGORY_KEYS = ("category", "dimension", "categories", "tags")
LOGGED_URL = re.compile(r'"?(?:GET|POST) (\S+)')


@dataclass(frozen=True)
class RawPrompt:
    """One prompt as it was found."""

    text: str
    source: str
    """File and line, or place."""
    category: str | None = None
    language: str | None = None
    uses: int = 1
    """How often it was asked for; logs count."""


def read_prompts(
    path: Path, *, fmt: str | None = None, field: str | None = None
) -> list[RawPrompt]:
    """Every prompt of a file, in its order.

    Args:
        fmt: of `FORMATS`; by default what the suffix says.
        field: the column or (dotted) key that holds the prompt; by default the first of `PROMPT_KEYS` that is there.
    Raises: UserError if the file cannot be read, or its first row holds no prompt.
    """
    fmt = fmt or SUFFIXES.get(path.suffix.lower())
    if fmt not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"{path}: say what it is with --format, one of {known}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    if fmt == "text":
        lines = enumerate(text.splitlines(), start=1)
        found = [RawPrompt(line, f"{path.name}:{n}") for n, line in lines if line.strip()]
    elif fmt == "log":
        found = _logged(text, path, field)
    else:
        found = [_prompt(row, path, place, field) for place, row in _rows(text, path, fmt)]
    if not found:
        raise UserError(f"{path} holds no prompt")
    return found


def _rows(text: str, path: Path, fmt: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if fmt == "csv":
        for number, row in enumerate(csv.DictReader(text.splitlines()), start=2):
            yield f"{path.name}:{number}", row
    elif fmt == "jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield f"{path.name}:{number}", _json(line, f"{path} line {number}")
    else:
        whole = _json(text, str(path))
        if isinstance(whole, dict):  # one object per prompt, by name
            whole = list(whole.values())
        if not isinstance(whole, list):
            raise UserError(f"{path} is neither a JSON list nor an object of objects")
        for number, row in enumerate(whole):
            yield f"{path.name}[{number}]", {"prompt": row} if isinstance(row, str) else row


def _prompt(row: Any, path: Path, place: str, field: str | None) -> RawPrompt:
    if not isinstance(row, Mapping):
        raise UserError(f"{path}: {place} is no object")
    keys = (field,) if field else PROMPT_KEYS
    text = next((value for key in keys if isinstance(value := _dig(row, key), str)), None)
    if text is None:
        wanted = field or "one of " + ", ".join(PROMPT_KEYS)
        near = did_you_mean(field, row) if field else ""
        raise UserError(f"{path}: {place} has no text under {wanted}.{near}")
    category = next((row[key] for key in CATEGORY_KEYS if row.get(key)), None)
    if isinstance(category, list):
        category = category[0]
    language = row.get("language") or row.get("lang")
    return RawPrompt(
        text,
        place,
        str(category) if category else None,
        str(language) if language else None,
    )


def _logged(text: str, path: Path, field: str | None) -> list[RawPrompt]:
    """The prompts of a usage log, each once with its number of uses. Nothing else of a line is kept: it may name people."""
    found: dict[str, RawPrompt] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        prompt = _prompt_of_line(line, field)
        if prompt and prompt in found:
            found[prompt] = replace(found[prompt], uses=found[prompt].uses + 1)
        elif prompt:
            found[prompt] = RawPrompt(prompt, f"{path.name}:{number}")
    return list(found.values())


def _prompt_of_line(line: str, field: str | None) -> str | None:
    """From a JSON event (`request.prompt` with a field, or any of the usual keys), or from the query of a logged URL."""
    start = line.find("{")
    if start >= 0:
        try:
            event = json.loads(line[start:])
        except ValueError:
            event = None
        if isinstance(event, dict):
            return _search(event, field)
    logged = LOGGED_URL.search(line)
    query = parse_qs(urlsplit(logged.group(1)).query) if logged else {}
    keys = (field,) if field else PROMPT_KEYS
    return next((query[key][0] for key in keys if key in query), None)


def _search(event: Mapping[str, Any], field: str | None) -> str | None:
    """The prompt of an event: where `field` says, or under the first usual key, outermost first."""
    if field:
        found = _dig(event, field)
        return found if isinstance(found, str) else None
    for key in PROMPT_KEYS:
        if isinstance(event.get(key), str):
            return str(event[key])
    inner = (value for value in event.values() if isinstance(value, Mapping))
    return next((found for value in inner if (found := _search(value, None))), None)


def _dig(row: Mapping[str, Any], dotted: str) -> Any:
    value: Any = row
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error

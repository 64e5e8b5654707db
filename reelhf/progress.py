"""Progress of long work: a bar with the time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

TERMINAL_SECONDS = 0.1  # between two redraws of the bar
PLAIN_SECONDS = 10.0  # between two lines in a log file
BAR_WIDTH = 24
_plain_lines = False


def use_plain_lines() -> None:
    """No bars from now on, on a terminal either: for a process that shares it with others at work."""
    global _plain_lines
    _plain_lines = True


def track(iterable: Iterable[T], *, label: str, total: int | None = None) -> Iterator[T]:
    """Yield every item, and say on stderr how far the work has come and how long the rest will take.

    Args:
        total: number of items; by default the length of the iterable, if it has one.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if int(os.environ.get("RANK", "0")) != 0:
        yield from iterable
        return
    terminal = sys.stderr.isatty() and not _plain_lines
    start = last = time.monotonic()
    done = 0
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= (TERMINAL_SECONDS if terminal else PLAIN_SECONDS):
            last = now
            _show(label, done, total, now - start, terminal, final=False)
    _show(label, done, total, time.monotonic() - start, terminal, final=True)


def silence_transformers() -> None:
    """No bars of its own from transformers: loading and saving weights is a part of work that has its own line here.

    Called where our code is about to load or save a model with it; importing it is slow.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()


def format_seconds(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _show(
    label: str, done: int, total: int | None, seconds: float, terminal: bool, *, final: bool
) -> None:
    count = f"{done}/{total}" if total is not None else str(done)
    if final:
        rest = f"done in {format_seconds(seconds)}"
    elif total is not None and done:
        rest = f"{format_seconds(seconds / done * (total - done))} left"
    else:
        rest = format_seconds(seconds)
    if not terminal:
        print(f"{label}: {count}, {rest}", file=sys.stderr, flush=True)
        return
    filled = BAR_WIDTH * done // total if total else 0
    bar = f" [{'#' * filled}{'.' * (BAR_WIDTH - filled)}]" if total else ""
    print(
        f"\r\x1b[K{label}:{bar} {count}, {rest}",
        end="\n" if final else "",
        file=sys.stderr,
        flush=True,
    )

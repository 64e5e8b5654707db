"""Scoring a list of clips on one or many processes; what is scored is kept at once, so that a run that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from reelhf.clips import cache_folder
from reelhf.engine import barrier, init_distributed, is_main, rank, world_size
from reelhf.errors import UserError
from reelhf.progress import track
from reelhf.side_by_side import run_jobs
from rewards.scoring.cache import ScoreCache
from rewards.scoring.scorer import Scorer, ScoreSettings
from rewards.scoring.sources import Item

Engine = Literal["local", "ray"]


@dataclass(frozen=True)
class ScoreRun:
    """What to score with, and how."""

    rewards: Path
    settings: ScoreSettings
    batch_size: int = 8
    workers: int = 1
    engine: Engine = "local"

    def scorer(self) -> Scorer:
        return Scorer(self.rewards, self.settings, cache=ScoreCache(score_cache_path()))


def score_cache_path() -> Path:
    """The file that holds every score of this user."""
    return cache_folder() / "scores.sqlite"


def score_all(run: ScoreRun, items: Sequence[Item]) -> list[dict[str, Any]]:
    """A row per item, in order (`Scorer.score_items`).

    Started by torchrun, the processes share the clips and the first returns every row, the others none.
    """
    if run.workers < 1 or run.batch_size < 1:
        raise UserError(
            f"workers is {run.workers}, batch size {run.batch_size}; expected 1 or more"
        )
    if world_size() > 1:
        if run.workers > 1 or run.engine != "local":
            raise UserError(
                "a launcher started several processes; give neither --workers nor --engine"
            )
        return _share(run, items)
    if run.engine == "ray":
        parts = _on_ray(run, _parts(items, run.workers))
    elif run.workers > 1:
        jobs = {
            f"scores, part {number}": partial(score_part, run, part)
            for number, part in enumerate(_parts(items, run.workers), 1)
        }
        parts = list(run_jobs(jobs, at_once=run.workers).values())
    else:
        return score_part(run, items)
    rows: list[Any] = [None] * len(items)
    for number, part in enumerate(parts):
        rows[number :: len(parts)] = part
    return rows


def _parts(items: Sequence[Item], count: int) -> list[list[Item]]:
    """Every count-th item each: long clips that lie side by side are spread."""
    count = max(1, min(count, len(items)))
    return [list(items[number::count]) for number in range(count)]


def score_part(run: ScoreRun, items: Sequence[Item]) -> list[dict[str, Any]]:
    """Score in this process, with a bar."""
    rows = run.scorer().score_items(items, batch_size=run.batch_size)
    return list(track(rows, label="score clips", total=len(items)))


def _share(run: ScoreRun, items: Sequence[Item]) -> list[dict[str, Any]]:
    """Each process of a launcher scores its share into the cache; the first then reads all of them from it."""
    init_distributed()
    score_part(run, items[rank() :: world_size()])
    barrier()
    return score_part(run, items) if is_main() else []  # from the cache, but for invalid clips


def _on_ray(run: ScoreRun, parts: Sequence[Sequence[Item]]) -> list[list[dict[str, Any]]]:
    """One Ray task per part, on whatever cluster Ray finds, or on this machine."""
    try:
        import ray
    except ImportError:
        raise UserError(
            "--engine ray needs Ray, which is not installed: pip install 'reelhf[ray]', or --engine local"
        ) from None
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
    try:
        task = ray.remote(score_part)
        return ray.get([task.remote(run, part) for part in parts])
    finally:
        if started:
            ray.shutdown()


def write_scores(rows: Sequence[dict[str, Any]], out: Path) -> Path:
    """One JSON object per line, whole or not at all."""
    from reelhf.run import write_text_atomic

    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return out


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """How many were scored, how many of them from the cache, and why the others were not."""
    invalid = [row for row in rows if not row["valid"]]
    cached = sum(bool(row["cached"]) for row in rows)
    lines = [
        f"{len(rows) - len(invalid)} of {len(rows)} clips scored, {cached} of them from the cache"
    ]
    lines += [f"invalid: {row['path']}: {row['reason']}" for row in invalid]
    return "\n".join(lines)

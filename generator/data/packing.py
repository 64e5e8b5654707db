"""Micro-batches of about equal cost, dealt to processes of about equal load: pure functions of measured or computed seconds.

Seedance 1.0's balancing (2506.09113, 6.1; Seaweed 2504.08685): a table from length to run time, balanced inside a step only.
A step's micro-batches do not depend on the number of processes; who runs which of them does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from generator.base import BackboneSpec
from generator.data.buckets import Bucket
from reelhf.errors import UserError

RuntimeTable = Mapping[Bucket, float]
"""Seconds (or anything proportional) that one sample of a bucket takes, forward and backward."""


def samples_per_micro_batch(
    table: RuntimeTable, spec: BackboneSpec, tokens: int
) -> dict[Bucket, int]:
    """How many samples of each bucket share a micro-batch, so that all take about as long.

    Args:
        tokens: latent positions of a micro-batch of the largest bucket, rounded down to whole clips, at least one; the others
            get as many samples as fit into that time.
    """
    largest = max(table, key=lambda bucket: (bucket.tokens(spec), bucket))
    clips = max(1, tokens // largest.tokens(spec))
    budget = clips * table[largest]
    counts = {
        bucket: max(1, int(budget / seconds * (1 + 1e-9))) for bucket, seconds in table.items()
    }
    return counts | {largest: clips}


def deal(costs: Sequence[float], num_processes: int) -> list[list[int]]:
    """Deal jobs to processes: as many to each, and loads as equal as the greedy rule makes them.

    The costliest job that is left goes to the process of the least load that still takes one (LPT with equal counts). Every
    process's jobs are in rising order.

    Raises: ValueError when the processes do not divide the jobs.
    """
    if num_processes < 1 or len(costs) % num_processes:
        raise ValueError(f"{len(costs)} jobs for {num_processes} processes")
    each = len(costs) // num_processes
    dealt: list[list[int]] = [[] for _ in range(num_processes)]
    loads = [0.0] * num_processes
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        taker = min(
            (process for process in range(num_processes) if len(dealt[process]) < each),
            key=lambda process: (loads[process], process),
        )
        dealt[taker].append(job)
        loads[taker] += costs[job]
    return [sorted(jobs) for jobs in dealt]


def save_table(table: RuntimeTable, file: Path) -> None:
    """As JSON, so that a resumed run packs as before."""
    from reelhf.run import write_text_atomic

    rows = {str(bucket): table[bucket] for bucket in sorted(table)}
    write_text_atomic(file, json.dumps(rows, indent=2) + "\n")


def load_table(file: Path) -> dict[Bucket, float]:
    """What `save_table` wrote. Raises: UserError when it is damaged."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return {Bucket(*map(int, key.split("x"))): float(value) for key, value in rows.items()}
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{file} is damaged; delete it, and run times are measured anew") from None

"""What one RLHF step reports: means over the global batch, seconds per phase, and the mirror on wandb."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reelhf.engine import all_reduce_sum, is_main
from reelhf.run import RunFolder
from rlhf.hacking import motion_amplitude

if TYPE_CHECKING:
    from rewards.base import CompositeScores


@torch.no_grad()
def batch_metrics(
    scores: CompositeScores, anchor: Tensor, latent_gradient: Tensor, frames: Tensor
) -> dict[str, float]:
    """Means over the valid clips of the global batch."""
    columns = {f"reward/{name}": scores.values[:, i] for i, name in enumerate(scores.dimensions)}
    columns |= {f"z/{name}": scores.z[:, i] for i, name in enumerate(scores.dimensions)}
    columns |= {
        "reward/total": scores.total,
        "anchor": anchor,
        "latent_gradient_norm": latent_gradient.flatten(1).norm(dim=1),
        "motion_amplitude": motion_amplitude(frames),
    }
    table = torch.stack([column.double() for column in columns.values()], dim=1)
    sums = table.masked_fill(~scores.valid[:, None], 0.0).sum(0)
    counts = torch.tensor([float(scores.valid.sum()), float(len(scores.valid))]).to(sums)
    *totals, num_valid, num_clips = all_reduce_sum(torch.cat([sums, counts])).tolist()
    means = [total / max(num_valid, 1.0) for total in totals]
    return dict(zip(columns, means, strict=True)) | {"valid_fraction": num_valid / num_clips}


class Clock:
    """Seconds per phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        return {f"seconds/{phase}": seconds for phase, seconds in self.seconds.items()}


def wandb_mirror(run: RunFolder) -> Callable[[int, Mapping[str, float]], None] | None:
    """A wandb run whose id survives a resume, offline unless WANDB_MODE says otherwise; on the first process only."""
    if not is_main():
        return None
    import wandb

    identity = hashlib.blake2b(str(run.path.resolve()).encode(), digest_size=8).hexdigest()
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    mirror = wandb.init(project="reelhf", id=identity, resume="allow", dir=run.path, mode=mode)
    return lambda step, metrics: mirror.log(dict(metrics), step=step)

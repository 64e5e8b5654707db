"""Batches of clips for a pre-training, with a progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rewards.pretraining.config import StageConfig


@dataclass(frozen=True)
class Batch:
    """Clips drawn for one step."""

    index: Tensor
    """Which windows, long [B]."""
    frames: Tensor
    """float [B, 3, F, H, W] in [0, 1]."""


def batches(
    frames: Tensor, stage: StageConfig, generator: Generator, label: str
) -> Iterator[Batch]:
    """Batches without replacement within an epoch, with a progress bar."""
    from reelhf.progress import track

    order = torch.empty(0, dtype=torch.long)
    size = min(stage.batch_size, len(frames))
    for _ in track(range(stage.num_steps), label=label, total=stage.num_steps):
        if len(order) < size:
            order = torch.randperm(len(frames), generator=generator)
        index, order = order[:size], order[size:]
        yield Batch(index, frames[index].float() / 255)

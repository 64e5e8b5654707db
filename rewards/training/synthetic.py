"""Lessons without votes: a clip beats itself spoiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rewards.data import Clip, RewardTask, group_by_shape
from rewards.degrade import UNVOTED, degrade
from rewards.losses import bradley_terry_loss, masked_mean

LEAST_SEVERITY = 0.3
"""Of a spoiling: one that nobody would see teaches nothing."""


def synthetic_loss(
    model: Any,
    tasks: Sequence[RewardTask],
    clips: Mapping[str, Clip],
    *,
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    """Bradley-Terry loss of one clip per task against itself spoiled, in one dimension drawn anew, and the share put in order.

    One forward call, of the clips that share the most common shape, so that several processes stay in step.
    """
    dimensions = [name for name in model.dimensions if name in UNVOTED]
    which = int(torch.randint(len(dimensions), (), generator=generator))
    picks = [int(torch.randint(len(t.clips), (), generator=generator)) for t in tasks]
    chosen = [clips[t.clips[pick]] for t, pick in zip(tasks, picks, strict=True)]
    rows, frames, fps = max(group_by_shape(chosen), key=lambda group: len(group[0]))
    severity = torch.rand(len(rows), generator=generator)
    severity = LEAST_SEVERITY + (1 - LEAST_SEVERITY) * severity
    spoiled = degrade(frames, dimensions[which], severity, generator, ways=UNVOTED)
    device = next(model.parameters()).device
    values, _ = model(
        torch.cat([frames, spoiled]).to(device),
        selection=model.select(frames.shape[2], float(fps[0]), generator),
        fps=fps.repeat(2).to(device),
        prompts=[tasks[row].prompt for row in rows] * 2,
    )
    column = list(model.dimensions).index(dimensions[which])
    clean, worse = values[:, column :: len(model.dimensions)].chunk(2)  # [N, H], a column per head
    valid = clean.isfinite() & worse.isfinite()
    losses = bradley_terry_loss(clean.masked_fill(~valid, 0.0), worse.masked_fill(~valid, 0.0))
    loss, count = masked_mean(losses, valid)
    right = ((clean > worse) & valid).sum() / count.clamp_min(1)
    return loss, float(right)

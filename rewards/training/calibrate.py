"""Calibration of a trained reward on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rewards.calibration import MIN_CLIPS, fit_temperature, spread
from rewards.data import Clip, RewardTask, score_clips
from rewards.module import RewardModule


def calibrate(model: RewardModule, tasks: Sequence[RewardTask], clips: dict[str, Clip]) -> None:
    """Set the model's mean, std, range and temperature on validation prompts (all prompts when those are too few)."""
    held = [task for task in tasks if task.split == "validation"]
    if sum(len(task.clips) for task in held) < MIN_CLIPS:
        held = list(tasks)
    scores = score_clips(model, clips, [(sha, task.prompt) for task in held for sha in task.clips])
    mean, std, low, high = spread(torch.stack(list(scores.values())))
    for name, value in (("mean", mean), ("std", std), ("low", low), ("high", high)):
        getattr(model, name).copy_(value)
    for index, dimension in enumerate(model.dimensions):
        gaps = [
            vote.preference
            * (
                scores[task.clips[vote.a], task.prompt][index]
                - scores[task.clips[vote.b], task.prompt][index]
            )
            for task in held
            for vote in task.votes
            if vote.dimension == dimension and vote.preference != 0
        ]
        model.temperature[index] = fit_temperature(torch.stack(gaps) if gaps else torch.empty(0))

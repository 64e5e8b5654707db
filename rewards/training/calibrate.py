"""Calibration of a trained reward on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewards.calibrated import CalibratedReward
from rewards.calibration import MIN_CLIPS, fit_temperature, spread
from rewards.data import Clip, RewardTask, clip_answers, score_clips
from rewards.module import RewardModule

Scores = dict[tuple[str, str], Tensor]
"""(sha256, prompt) -> values [D]."""


def calibrate_heads(
    model: RewardModule, tasks: Sequence[RewardTask], clips: dict[str, Clip]
) -> None:
    """Set the mean and std of each of several heads, so that their z-scores can be averaged."""
    if model.num_heads == 1:
        return
    wanted = [(sha, task.prompt) for task in _measured_on(tasks) for sha in task.clips]
    each = torch.stack([v.flatten() for _, v, _ in clip_answers(model.hear, model, clips, wanted)])
    mean, std, _, _ = spread(each)  # [H * D]
    model.head_mean.copy_(mean.view_as(model.head_mean))
    model.head_std.copy_(std.view_as(model.head_std))


def calibrate(
    model: CalibratedReward, tasks: Sequence[RewardTask], clips: dict[str, Clip]
) -> Scores:
    """Set the model's mean, std, range and temperature on validation prompts (all prompts when those are too few).

    Returns: the scores it was done with.
    """
    held = _measured_on(tasks)
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
    return scores


def _measured_on(tasks: Sequence[RewardTask]) -> list[RewardTask]:
    """Those of validation prompts, all where those are too few."""
    held = [task for task in tasks if task.split == "validation"]
    return held if sum(len(task.clips) for task in held) >= MIN_CLIPS else list(tasks)


def held_out_accuracy(
    dimensions: Sequence[str], held: Sequence[RewardTask], scores: Scores
) -> dict[str, dict[str, float]]:
    """Share of decided verdicts on held-out prompts that the scores agree with, and how many there are, per dimension that has any."""
    out = {}
    for index, dimension in enumerate(dimensions):
        leads = [
            vote.preference
            * float(
                scores[task.clips[vote.a], task.prompt][index]
                - scores[task.clips[vote.b], task.prompt][index]
            )
            for task in held
            for vote in task.votes
            if vote.dimension == dimension and vote.preference
        ]
        leads = [lead for lead in leads if lead == lead]  # NaN: a clip could not be scored
        if leads:
            right = sum(lead > 0 for lead in leads)
            out[dimension] = {"accuracy": right / len(leads), "verdicts": len(leads)}
    return out

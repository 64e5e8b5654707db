"""Verdicts on pairs of clips, and what a predictor's scores say of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rewards.data import RewardTask, Vote
from rewards.evaluation.metrics import accuracy_without_ties, mean_interval, right
from rewards.losses import bradley_terry_loss

Predictor = Callable[[RewardTask, int], float]
"""(task, index of a clip in it) -> score."""
Pairs = Sequence[tuple[RewardTask, Vote]]


def verdict_pairs(
    tasks: Sequence[RewardTask], dimension: str, *, same_stage: bool | None = None
) -> list[tuple[RewardTask, Vote]]:
    """Every verdict of a dimension, ties included; `same_stage` True keeps pairs of one stage, None keeps all."""
    return [
        (task, vote)
        for task in tasks
        for vote in task.votes
        if vote.dimension == dimension and (same_stage is None or vote.same_stage == same_stage)
    ]


def decided_pairs(
    tasks: Sequence[RewardTask], dimension: str, *, same_stage: bool | None
) -> list[tuple[RewardTask, Vote]]:
    """The same without ties."""
    pairs = verdict_pairs(tasks, dimension, same_stage=same_stage)
    return [(task, vote) for task, vote in pairs if vote.preference != 0]


def gaps_of(predict: Predictor, pairs: Pairs) -> Tensor:
    """Score of a minus score of b, [N] in double precision."""
    return torch.tensor(
        [predict(task, vote.a) - predict(task, vote.b) for task, vote in pairs], dtype=torch.double
    )


def verdicts_of(pairs: Pairs) -> Tensor:
    """+1, -1 or 0, long [N]."""
    return torch.tensor([vote.preference for _, vote in pairs], dtype=torch.long)


def prompts_of(pairs: Pairs) -> list[str]:
    return [task.prompt_id for task, _ in pairs]


def accuracy(predict: Predictor, pairs: Pairs) -> float | None:
    """Share of verdicts other than ties that are predicted, 1/2 for a gap of 0; None without pairs."""
    return accuracy_without_ties(gaps_of(predict, pairs), verdicts_of(pairs))


def accuracy_interval(predict: Predictor, pairs: Pairs) -> tuple[float, float] | None:
    """95 % interval of the accuracy on decided pairs, resampling prompts."""
    hits = right(gaps_of(predict, pairs), verdicts_of(pairs))
    return mean_interval(hits.tolist(), prompts_of(pairs))


def negative_log_likelihood(predict: Predictor, pairs: Pairs, temperature: float) -> float | None:
    """Mean -log sigma(gap / temperature) in nats over the decided pairs that could be scored; ln 2 is knowing nothing."""
    gaps = (gaps_of(predict, pairs) * verdicts_of(pairs)).float()
    gaps = gaps[gaps.isfinite()] / temperature
    return float(bradley_terry_loss(gaps, torch.zeros_like(gaps)).mean()) if len(gaps) else None

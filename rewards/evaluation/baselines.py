"""What a reward has to beat: scores that know nothing of quality."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.data import RewardTask
from rewards.evaluation.pairs import Pairs, decided_pairs

CHANCE = 0.5
"""Of verdicts that are no ties."""


def laplacian_sharpness(frames: Tensor) -> float:
    """Mean squared Laplacian of the grey frames: the classical focus measure. frames uint8 [3, F, H, W]."""
    grey = frames.float().mean(0)[:, None] / 255
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    return float(F.conv2d(grey, kernel).square().mean())


def stage_win_rates(
    tasks: Sequence[RewardTask], dimension: str, stages: Mapping[str, str]
) -> dict[str, float]:
    """Share of its cross-stage verdicts that each stage won on the training prompts."""
    won: dict[str, list[float]] = defaultdict(list)
    for task, vote in decided_pairs(tasks, dimension, same_stage=False):
        won[stages[task.clips[vote.a]]].append(float(vote.preference > 0))
        won[stages[task.clips[vote.b]]].append(float(vote.preference < 0))
    return {stage: sum(votes) / len(votes) for stage, votes in won.items()}


def majority_verdict(pairs: Pairs) -> int:
    """The commonest verdict, +1, -1 or 0; what a guesser says who knows only how often each is given. A tie without pairs."""
    counts = Counter(vote.preference for _, vote in pairs)
    return max((1, -1, 0), key=lambda verdict: counts[verdict]) if counts else 0

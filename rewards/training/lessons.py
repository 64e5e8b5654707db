"""Which verdicts teach a reward, and that there is something to learn from them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reelhf.errors import UserError
from rewards.data import RewardTask, check_dimensions, load_tasks
from rewards.training.loss import only_ties

if TYPE_CHECKING:
    from annotation.records import PreferenceData

LEARNED_SPLITS = ("train", "validation")
"""Splits of the preference data that teach a reward; the third, `test`, measures it."""


@dataclass(frozen=True)
class Lessons:
    """Which verdicts teach a reward."""

    preferences: Path
    """Folder of preference data (`annotation.export`)."""
    annotators: Collection[str] | None = None
    prompt_ids: Collection[str] | None = None
    """Only these; None means all."""
    splits: Collection[str] | None = LEARNED_SPLITS
    """Only rows of these splits; None means all, where the rewards are measured on other prompts altogether."""


def read_tasks(
    data: PreferenceData, lessons: Lessons, dimensions: Sequence[str]
) -> list[RewardTask]:
    """The tasks that teach a model of these dimensions; UserError when there is nothing to learn."""
    check_dimensions(data)
    tasks = load_tasks(
        data,
        dimensions=dimensions,
        splits=lessons.splits,
        annotators=lessons.annotators,
        prompt_ids=lessons.prompt_ids,
    )
    if not tasks:
        raise UserError(
            f"{lessons.preferences} holds no training rows for {', '.join(dimensions)} by these annotators and prompts"
        )
    for dimension in dimensions:
        if only_ties(dimension, tasks):
            raise UserError(
                f"every verdict on {dimension} in {lessons.preferences} is a tie; expected some clips to be better than others"
            )
    return tasks

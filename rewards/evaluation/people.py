"""How far a reward agrees with people, beside how far people agree with one another about the same pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch

from rewards.data import RewardTask
from rewards.evaluation.metrics import mean_interval, right, spearman
from rewards.evaluation.pairs import Predictor, verdict_pairs


def people_agreement(
    rows: Sequence[Mapping[str, Any]],
    gap: Callable[[Mapping[str, Any]], float],
) -> dict[str, Any] | None:
    """Agreement on pairs that at least two annotators decided, each pair counting once; None where there are none.

    Args:
        rows: rows of the `preferences` table in one dimension; ties and constrained picks are left out.
        gap: score of clip_a minus score of clip_b.
    Returns: {"pairs", "people": share of pairs of annotators who say the same, "people_interval", "reward": share of
        annotators it agrees with, "reward_interval"}; a reward above `people` agrees with a person more than another person does.
    """
    units: dict[Any, list[tuple[str, int, float]]] = defaultdict(list)
    for row in rows:
        if row["constrained"] or row["preference"] == 0:
            continue
        swap = row["clip_a"] > row["clip_b"]
        pair = tuple(sorted((row["clip_a"], row["clip_b"])))
        sign = -1 if swap else 1
        entry = (row["annotator"], sign * row["preference"], sign * gap(row))
        key = (row["prompt_id"], row["task_id"], *pair)
        units[key].append(entry)
    people, reward, prompts = [], [], []
    for key, entries in units.items():
        said = {annotator: verdict for annotator, verdict, _ in entries}
        if len(said) < 2:
            continue
        same = [float(x == y) for x, y in combinations(said.values(), 2)]
        gaps = torch.full((len(said),), entries[0][2])
        people.append(sum(same) / len(same))
        reward.append(float(right(gaps, torch.tensor(list(said.values()))).mean()))
        prompts.append(key[0])
    if not people:
        return None
    return {
        "pairs": len(people),
        "people": sum(people) / len(people),
        "people_interval": mean_interval(people, prompts),
        "reward": sum(reward) / len(reward),
        "reward_interval": mean_interval(reward, prompts),
    }


def win_balance(task: RewardTask, dimension: str) -> dict[int, float]:
    """Index of a clip -> (wins - losses) / verdicts on it: what people think of it among its task's clips."""
    totals: dict[int, list[int]] = defaultdict(list)
    for vote in task.votes:
        if vote.dimension == dimension:
            totals[vote.a].append(vote.preference)
            totals[vote.b].append(-vote.preference)
    return {clip: sum(found) / len(found) for clip, found in totals.items()}


def rank_correlation(
    tasks: Sequence[RewardTask], dimension: str, predict: Predictor
) -> dict[str, Any]:
    """Spearman's correlation of scores with people's win balance: mean within tasks, and over all clips at once."""
    within, prompts, scores, balances = [], [], [], []
    for task in tasks:
        balance = win_balance(task, dimension)
        mine = torch.tensor([predict(task, clip) for clip in balance])
        theirs = torch.tensor(list(balance.values()))
        scores.append(mine)
        balances.append(theirs)
        found = spearman(mine, theirs) if balance else None
        if found is not None:
            within.append(found)
            prompts.append(task.prompt_id)
    return {
        "within_tasks": sum(within) / len(within) if within else None,
        "within_interval": mean_interval(within, prompts),
        "tasks": len(within),
        "all_clips": spearman(torch.cat(scores), torch.cat(balances)) if scores else None,
    }


def rows_of_pairs(
    rows: Sequence[Mapping[str, Any]], tasks: Sequence[RewardTask], dimension: str
) -> list[Mapping[str, Any]]:
    """Rows of the `preferences` table behind the verdicts of these tasks in one dimension."""
    wanted = {task.task_id for task in tasks if verdict_pairs([task], dimension)}
    return [row for row in rows if row["task_id"] in wanted and row["dimension"] == dimension]

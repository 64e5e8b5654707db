"""Leave one out: what a reward is to be trained on and what it is to be measured on, when data are too few to split once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rewards.data import RewardTask, Vote

Leave = Literal["prompt", "generator"]


@dataclass(frozen=True)
class Fold:
    """One training and one measurement that share no prompt, or no generator on the measured side."""

    name: str
    """What is left out: a prompt's id, or a generator."""
    training: tuple[RewardTask, ...]
    held: tuple[tuple[RewardTask, Vote], ...]
    """Verdicts to predict."""


def without_clips(task: RewardTask, dropped: Collection[str]) -> RewardTask:
    """The task as if some of its clips had never been shown; verdicts on them go."""
    if not any(sha in dropped for sha in task.clips):
        return task
    kept = [index for index, sha in enumerate(task.clips) if sha not in dropped]
    place = {old: new for new, old in enumerate(kept)}
    votes = tuple(
        replace(vote, a=place[vote.a], b=place[vote.b])
        for vote in task.votes
        if vote.a in place and vote.b in place
    )
    clips = tuple(task.clips[index] for index in kept)
    return replace(
        task, clips=clips, votes=votes, picks=()
    )  # best and worst of all are of others now


def leave_one_out(
    tasks: Sequence[RewardTask], leave: Leave, generators: Mapping[str, str]
) -> Iterator[Fold]:
    """One fold per prompt or per generator, in order of their names.

    Args:
        generators: sha256 of a clip -> the model that made it. Leaving one out takes its clips from all training tasks; held
            are the verdicts on pairs with one of its clips.
    """
    if leave == "prompt":
        for prompt in sorted({task.prompt_id for task in tasks}):
            held = [
                (task, vote) for task in tasks if task.prompt_id == prompt for vote in task.votes
            ]
            rest = tuple(task for task in tasks if task.prompt_id != prompt)
            yield Fold(prompt, rest, tuple(held))
        return
    for generator in sorted({generators[sha] for task in tasks for sha in task.clips}):
        own = {sha for task in tasks for sha in task.clips if generators[sha] == generator}
        held = [
            (task, vote)
            for task in tasks
            for vote in task.votes
            if task.clips[vote.a] in own or task.clips[vote.b] in own
        ]
        rest = tuple(cut for task in tasks if (cut := without_clips(task, own)).votes)
        yield Fold(generator, rest, tuple(held))

"""How much each verdict counts: the annotator who gave it and how many others said the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from rewards.data import RewardTask
from rewards.losses import chance_corrected
from rewards.training.config import LossConfig

PRIOR_VERDICTS = 10
"""As many verdicts at the pool's mean agreement are added to each annotator's own, so that three lucky ones weigh little."""


def annotator_weights(tasks: Sequence[RewardTask]) -> dict[str, float]:
    """Annotator -> chance-corrected agreement of the others with them, scaled so that the mean verdict weighs 1."""
    agreement: dict[str, list[float]] = defaultdict(list)
    for task in tasks:
        for vote in task.votes:
            agreement[vote.annotator] += [] if vote.agreement is None else [vote.agreement]
    everyone = [a for votes in agreement.values() for a in votes]
    if not everyone:
        return dict.fromkeys(agreement, 1.0)
    mean = sum(everyone) / len(everyone)
    kappa = {
        name: chance_corrected((sum(votes) + PRIOR_VERDICTS * mean) / (len(votes) + PRIOR_VERDICTS))
        for name, votes in agreement.items()
    }
    scale = sum(kappa[vote.annotator] for task in tasks for vote in task.votes)
    if scale == 0:
        return dict.fromkeys(kappa, 1.0)  # nobody agrees with anybody: nothing to tell them apart
    count = sum(len(task.votes) for task in tasks)
    return {name: value * count / scale for name, value in kappa.items()}


def weighted(tasks: Sequence[RewardTask], config: LossConfig) -> list[RewardTask]:
    """The tasks with each verdict's weight multiplied by the annotator's and by its own agreement, as the settings say."""
    if not config.annotator_weights and not config.agreement_power:
        return list(tasks)
    by_annotator = annotator_weights(tasks) if config.annotator_weights else {}

    def factor(annotator: str, agreement: float | None) -> float:
        share = 1.0 if agreement is None else agreement**config.agreement_power
        return by_annotator.get(annotator, 1.0) * share

    return [
        replace(
            task,
            votes=tuple(
                replace(vote, weight=vote.weight * factor(vote.annotator, vote.agreement))
                for vote in task.votes
            ),
            picks=tuple(
                replace(pick, weight=pick.weight * factor(pick.annotator, pick.agreement))
                for pick in task.picks
            ),
        )
        for task in tasks
    ]

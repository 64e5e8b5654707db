"""How good is each annotator, when nobody knows the truth? Two models that estimate truth and skill together.

Dawid-Skene treats the label of a pair as a category and learns each annotator's confusion matrix; Bradley-Terry with a rater term
gives each clip a quality and each annotator a factor on quality gaps. Both fit in seconds for 100,000 labels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from annotation.quality.votes import Vote

if TYPE_CHECKING:
    import numpy as np

LABELS = (-1, 0, 1)


@dataclass(frozen=True)
class DawidSkene:
    """What expectation maximisation ends with. I units, R annotators, L labels."""

    posterior: np.ndarray
    """P(true label of a unit), [I, L]."""
    confusion: np.ndarray
    """P(said label | true label) per annotator, [R, L, L]."""
    prior: np.ndarray
    """Frequencies of the true labels, [L]."""

    @property
    def skill(self) -> np.ndarray:
        """P(an annotator says the true label), [R]."""
        import numpy as np

        return np.einsum("rll,l->r", self.confusion, self.prior)


def dawid_skene(
    units: Sequence[int],
    annotators: Sequence[int],
    labels: Sequence[int],
    *,
    num_labels: int,
    smoothing: float = 1.0,
    max_steps: int = 200,
    tolerance: float = 1e-7,
) -> DawidSkene:
    """Maximum a posteriori confusion matrices by expectation maximisation, begun at the majority vote.

    Args:
        units, annotators, labels: one entry per answer, each counted from 0.
        smoothing: pseudo-answers per true label, two thirds of them right: someone with few answers stays near that.
    Source: Dawid and Skene (1979).
    """
    import numpy as np

    unit, rater, label = (np.asarray(column, int) for column in (units, annotators, labels))
    if not len(unit):
        raise ValueError("no answers")
    num_units, num_raters = unit.max() + 1, rater.max() + 1
    pseudo = np.full((num_labels, num_labels), smoothing / 3 / max(1, num_labels - 1))
    np.fill_diagonal(pseudo, smoothing * 2 / 3)
    posterior = np.zeros((num_units, num_labels))
    np.add.at(posterior, (unit, label), 1.0)
    posterior /= posterior.sum(axis=1, keepdims=True)
    for _ in range(max_steps):
        confusion = np.tile(pseudo, (num_raters, 1, 1))
        np.add.at(confusion.swapaxes(1, 2), (rater, label), posterior[unit])
        confusion /= confusion.sum(axis=2, keepdims=True)
        prior = posterior.mean(axis=0)
        log = np.tile(np.log(prior + 1e-12), (num_units, 1))
        np.add.at(log, unit, np.log(confusion[rater, :, label]))
        log -= log.max(axis=1, keepdims=True)
        after = np.exp(log)
        after /= after.sum(axis=1, keepdims=True)
        change = np.abs(after - posterior).max()
        posterior = after
        if change < tolerance:
            break
    return DawidSkene(posterior, confusion, prior)


@dataclass(frozen=True)
class RaterModel:
    """Bradley-Terry with a rater term. N clips, R annotators."""

    quality: np.ndarray
    """Of each clip, in logits of an average annotator, [N]."""
    ability: np.ndarray
    """Factor on quality gaps, [R], of mean square 1: 0 guesses, below 0 answers the wrong way round."""
    tie_width: float
    """The gap at which the better clip wins half its votes; 0 if there are no ties."""


def rater_bradley_terry(
    clip_a: Sequence[int],
    clip_b: Sequence[int],
    annotators: Sequence[int],
    labels: Sequence[int],
    *,
    quality_spread: float = 1.0,
    ability_spread: float = 1.0,
) -> RaterModel:
    """Maximum a posteriori clip qualities q and rater abilities r: logit P(a over b) = r (q_a - q_b), ties after Rao and Kupper.

    Args:
        clip_a, clip_b, annotators: one entry per vote, each counted from 0.
        labels: +1, 0 or -1 of `clip_a` against `clip_b`.
        quality_spread, ability_spread: standard deviations of the priors N(0, .) and N(1, .).
    Source: the rater term is that of Chen et al. (2013), "Pairwise ranking aggregation in a crowdsourced setting", as a factor;
        ties are those of Rao and Kupper (1967).
    """
    import torch

    from reelhf.errors import UserError

    if not len(labels):
        raise UserError("no votes: nothing says how good an annotator is")
    a, b, rater = (torch.as_tensor(list(column)) for column in (clip_a, clip_b, annotators))
    label = torch.as_tensor(list(labels))
    quality = torch.zeros(int(max(a.max(), b.max())) + 1, dtype=torch.float64, requires_grad=True)
    ability = torch.ones(int(rater.max()) + 1, dtype=torch.float64, requires_grad=True)
    raw_width = torch.zeros((), dtype=torch.float64, requires_grad=True)
    ties = bool((label == 0).any())
    optimizer = torch.optim.LBFGS(
        [quality, ability, raw_width], max_iter=500, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        gap = ability[rater] * (quality[a] - quality[b])
        width = torch.nn.functional.softplus(raw_width) if ties else torch.zeros(()).double()
        win = torch.nn.functional.logsigmoid(gap - width)
        lose = torch.nn.functional.logsigmoid(-gap - width)
        said = win.where(label > 0, lose)
        if ties:
            said = said.where(label != 0, win + lose + torch.log(torch.expm1(2 * width)))
        prior = (quality / quality_spread).square().sum()
        prior = prior + ((ability - 1) / ability_spread).square().sum()
        return -said.sum() + prior / 2

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    width = float(torch.nn.functional.softplus(raw_width.detach())) if ties else 0.0
    scale = ability.detach().square().mean().sqrt().clamp(min=1e-6)  # the votes fix only r times q
    return RaterModel((quality.detach() * scale).numpy(), (ability.detach() / scale).numpy(), width)


@dataclass(frozen=True)
class RaterScore:
    """One annotator in the eyes of both models."""

    annotator: str
    num_votes: int
    skill: float
    """Dawid-Skene: how often they say the true label of a pair."""
    ability: float
    """Bradley-Terry with a rater term: 1 is usual, 0 guesses, below 0 is inverted."""


def rate_annotators(votes: Iterable[Vote]) -> list[RaterScore]:
    """Both models over all dimensions, best first. A clip has one quality per dimension; an annotator one skill."""
    votes = list(votes)
    if not votes:
        return []
    index: dict[str, dict[Any, int]] = defaultdict(dict)

    def number(kind: str, name: Any) -> int:
        return index[kind].setdefault(name, len(index[kind]))

    rater = [number("rater", vote.annotator) for vote in votes]
    unit = [number("unit", (vote.dimension, vote.unit)) for vote in votes]
    a = [number("clip", (vote.dimension, vote.task_id, vote.clip_a)) for vote in votes]
    b = [number("clip", (vote.dimension, vote.task_id, vote.clip_b)) for vote in votes]
    label = [vote.label for vote in votes]
    skill = dawid_skene(
        unit, rater, [LABELS.index(value) for value in label], num_labels=len(LABELS)
    ).skill
    ability = rater_bradley_terry(a, b, rater, label).ability
    found = [
        RaterScore(name, rater.count(place), float(skill[place]), float(ability[place]))
        for name, place in index["rater"].items()
    ]
    return sorted(found, key=lambda score: -score.ability)

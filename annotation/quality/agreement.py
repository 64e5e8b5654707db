"""How far annotators agree: Krippendorff's alpha with missing data, pairwise agreement against chance, test and retest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from annotation.quality.votes import Row, Vote, free_picks, votes_of

if TYPE_CHECKING:
    import numpy as np

Units = Mapping[Any, Sequence[float]]
"""One unit (a pair of clips, a rated clip) -> the labels it got, one per annotator."""
LEVELS = ("nominal", "ordinal", "interval")
NUM_BOOTSTRAP = 1000


@dataclass(frozen=True)
class Agreement:
    """Agreement in one dimension."""

    alpha: float | None
    """1 is perfect, 0 is chance; None if no unit was labelled twice or all labels are equal."""
    low: float | None
    high: float | None
    """95 % bootstrap interval over prompts."""
    observed: float | None
    """Of two annotators' labels of one unit, the share that are equal."""
    chance: float | None
    """The share that would be equal if labels were dealt out at random."""
    num_units: int
    """Units labelled by at least two annotators."""
    num_prompts: int


def krippendorff_alpha(units: Units, *, level: str = "nominal") -> float | None:
    """Krippendorff's alpha: 1 - observed / expected disagreement.

    Args:
        units: labels per unit; units with a single label carry no information and are left out.
        level: `nominal` (equal or not), `ordinal` (how many labels lie between), `interval` (squared difference).
    Returns: None if nothing can be paired or only one label occurs.
    Source: Krippendorff (2011), "Computing Krippendorff's alpha-reliability", coincidence matrices.
    """
    values = _values([units])
    return alpha_of_coincidences(coincidence_matrix(units, values), values, level=level)


def coincidence_matrix(units: Units, values: Sequence[float]) -> np.ndarray:
    """o[c, k]: pairs of labels c and k within units, each unit's pairs divided by its number of labels less one."""
    import numpy as np

    place = {value: index for index, value in enumerate(values)}
    matrix = np.zeros((len(values), len(values)))
    for labels in units.values():
        if len(labels) < 2:
            continue
        counts = np.bincount([place[label] for label in labels], minlength=len(values))
        matrix += (np.outer(counts, counts) - np.diag(counts)) / (len(labels) - 1)
    return matrix


def alpha_of_coincidences(
    matrix: np.ndarray, values: Sequence[float], *, level: str = "nominal"
) -> float | None:
    """Alpha of a coincidence matrix [C, C] whose labels are `values`, ascending."""
    totals = matrix.sum(axis=1)
    total = totals.sum()
    distance = _squared_distance(totals, values, level)
    expected = totals @ distance @ totals
    if total <= 1 or expected == 0:
        return None
    return float(1 - (total - 1) * (matrix * distance).sum() / expected)


def _squared_distance(totals: np.ndarray, values: Sequence[float], level: str) -> np.ndarray:
    import numpy as np

    if level == "nominal":
        return 1.0 - np.eye(len(values))
    if level == "interval":
        return np.subtract.outer(np.array(values, float), np.array(values, float)) ** 2
    if level == "ordinal":  # labels between c and k, and half of each end
        middle = np.cumsum(totals) - totals / 2
        return np.subtract.outer(middle, middle) ** 2
    raise ValueError(f"level is {level!r}; expected one of {', '.join(LEVELS)}")


def agreement_of(
    units_of_prompt: Mapping[Hashable, Units],
    *,
    level: str = "nominal",
    num_bootstrap: int = NUM_BOOTSTRAP,
    seed: int = 0,
) -> Agreement:
    """Alpha with an interval from resampling prompts: the units of one prompt stay together.

    Args:
        units_of_prompt: the units of each prompt.
        num_bootstrap: resamples; 0 gives no interval.
    """
    import numpy as np

    prompts = sorted(units_of_prompt, key=str)
    values = _values(units_of_prompt.values())
    matrices = np.stack(
        [coincidence_matrix(units_of_prompt[name], values) for name in prompts]
        or [np.zeros((0, 0))]
    )
    pooled = matrices.sum(axis=0)
    alpha = alpha_of_coincidences(pooled, values, level=level)
    low = high = observed = chance = None
    total, totals = pooled.sum(), pooled.sum(axis=1)
    if total > 1:
        observed = float(np.trace(pooled) / total)
        chance = float((totals * (totals - 1)).sum() / (total * (total - 1)))
    if alpha is not None and num_bootstrap:
        draws = bootstrap_weights(len(prompts), num_bootstrap, seed)
        samples = np.tensordot(draws, matrices, axes=1)
        found = [alpha_of_coincidences(sample, values, level=level) for sample in samples]
        low, high = interval([value for value in found if value is not None])
    paired = sum(len(v) >= 2 for units in units_of_prompt.values() for v in units.values())
    return Agreement(alpha, low, high, observed, chance, paired, len(prompts))


def bootstrap_weights(num_prompts: int, num_bootstrap: int, seed: int) -> np.ndarray:
    """How often each prompt is drawn in each resample, [B, P]."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return rng.multinomial(num_prompts, [1 / num_prompts] * num_prompts, size=num_bootstrap)


def interval(draws: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95 % percentile interval of bootstrap draws; (None, None) of none."""
    import numpy as np

    if not len(draws):
        return None, None
    low, high = np.quantile(np.asarray(draws, float), [0.025, 0.975])
    return float(low), float(high)


def agreement_by_dimension(
    judgments: Iterable[Row], *, num_bootstrap: int = NUM_BOOTSTRAP, seed: int = 0
) -> dict[str, Agreement]:
    """Alpha per dimension over the order labels (better, tie, worse) of the free picks, explicit and implied."""
    by_dimension: dict[str, dict[str, dict[Any, list[int]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for vote in votes_of(judgments):
        by_dimension[vote.dimension][vote.prompt_id][vote.unit].append(vote.label)
    return {
        dimension: agreement_of(prompts, num_bootstrap=num_bootstrap, seed=seed)
        for dimension, prompts in sorted(by_dimension.items())
    }


def rating_agreement(
    judgments: Iterable[Row], *, num_bootstrap: int = NUM_BOOTSTRAP, seed: int = 0
) -> dict[str, Agreement]:
    """Ordinal alpha per dimension of the scores that several annotators gave to the same clip."""
    by_dimension: dict[str, dict[str, dict[Any, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in judgments:
        for clip, score in zip(row["candidates"], row["scores"] or (), strict=False):
            by_dimension[row["dimension"]][row["prompt_id"]][row["task_id"], clip].append(score)
    return {
        dimension: agreement_of(prompts, level="ordinal", num_bootstrap=num_bootstrap, seed=seed)
        for dimension, prompts in sorted(by_dimension.items())
    }


@dataclass(frozen=True)
class Share:
    """So many of so many, with the 95 % interval of Wilson."""

    hits: int
    number: int
    low: float
    high: float

    @property
    def share(self) -> float | None:
        return self.hits / self.number if self.number else None


WILSON_Z = 1.959963984540054  # of 95 %


def wilson(hits: int, number: int) -> Share:
    """A share with its 95 % score interval, sound for few trials too. Source: Wilson (1927)."""
    if not number:
        return Share(0, 0, 0.0, 1.0)
    share, z2 = hits / number, WILSON_Z**2
    centre = (share + z2 / (2 * number)) / (1 + z2 / number)
    half = WILSON_Z * (share * (1 - share) / number + z2 / (4 * number**2)) ** 0.5
    half /= 1 + z2 / number
    return Share(hits, number, max(0.0, centre - half), min(1.0, centre + half))


def best_pick_agreement(judgments: Iterable[Row]) -> dict[str, tuple[Share, float]]:
    """Per dimension: how often two annotators of a task name the same best clip, and 1 / K, which is chance."""
    picks: dict[str, dict[str, list[tuple[str, int]]]] = defaultdict(lambda: defaultdict(list))
    for row in free_picks(judgments):
        if row["best"] is not None:
            best = row["candidates"][row["best"]]
            picks[row["dimension"]][row["task_id"]].append((best, len(row["candidates"])))
    found = {}
    for dimension, tasks in sorted(picks.items()):
        hits = number = 0
        chance = 0.0
        for bests in tasks.values():
            for index, (clip, num_clips) in enumerate(bests):
                hits += sum(clip == other for other, _ in bests[:index])
                number += index
                chance += index / num_clips
        if number:
            found[dimension] = (wilson(hits, number), chance / number)
    return found


def agreement_with_others(votes: Iterable[Vote]) -> dict[str, Share]:
    """Per annotator: the share of labels that equal another annotator's label of the same pair and dimension."""
    units: dict[Any, list[Vote]] = defaultdict(list)
    for vote in votes:
        units[vote.dimension, vote.unit].append(vote)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for same in units.values():
        for vote in same:
            for other in same:
                if other.annotator != vote.annotator:
                    counts[vote.annotator][0] += other.label == vote.label
                    counts[vote.annotator][1] += 1
    return {name: wilson(*count) for name, count in sorted(counts.items())}


def retest_agreement(judgments: Iterable[Row]) -> dict[str, Share]:
    """Per annotator: of the pairs they were shown again, as a re-test or in another task, the share they ordered as before."""
    judgments = list(judgments)
    seen: dict[Any, dict[tuple[bool, str], int]] = defaultdict(dict)
    for again, purpose in enumerate(("work", "retest")):
        for vote in votes_of(judgments, purpose=purpose):
            pair = (vote.annotator, vote.dimension, vote.clip_a, vote.clip_b)
            seen[pair][bool(again), vote.task_id] = vote.label
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for (annotator, *_), labels in seen.items():
        first, *later = [labels[task] for task in sorted(labels)]
        counts[annotator][0] += sum(label == first for label in later)
        counts[annotator][1] += len(later)
    return {name: wilson(*count) for name, count in sorted(counts.items()) if count[1]}


def _values(many: Iterable[Units]) -> list[float]:
    return sorted({label for units in many for labels in units.values() for label in labels})

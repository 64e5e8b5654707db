"""How far annotators agree, per dimension: Krippendorff's alpha over pairwise order labels, with missing data."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Units = Mapping[Any, Sequence[int]]
"""One unit (a pair of clips) -> the labels it got, one per annotator."""


@dataclass(frozen=True)
class Agreement:
    """Agreement in one dimension."""

    alpha: float | None
    """1 is perfect, 0 is chance; None if no pair was labelled twice or all labels are equal."""
    low: float | None
    high: float | None
    """95 % bootstrap interval over prompts."""
    num_pairs: int
    """Pairs labelled by at least two annotators."""
    num_prompts: int


def krippendorff_alpha(units: Units) -> float | None:
    """Nominal Krippendorff alpha: 1 - observed / expected disagreement.

    Args:
        units: labels per unit; units with a single label carry no information and are left out.
    Returns: None if nothing can be paired or only one label occurs.
    Source: Krippendorff (2011), "Computing Krippendorff's alpha-reliability", coincidence matrices.
    """
    coincidences: Counter[tuple[int, int]] = Counter()
    for labels in units.values():
        if len(labels) < 2:
            continue
        for i, first in enumerate(labels):
            for j, second in enumerate(labels):
                if i != j:
                    coincidences[first, second] += 1 / (len(labels) - 1)  # type: ignore[assignment]
    totals: Counter[int] = Counter()
    for (first, _), weight in coincidences.items():
        totals[first] += weight
    total = sum(totals.values())
    expected = sum(totals[a] * totals[b] for a in totals for b in totals if a != b)
    if total <= 1 or expected == 0:
        return None
    observed = sum(weight for (first, second), weight in coincidences.items() if first != second)
    return 1 - (total - 1) * observed / expected


def agreement_by_dimension(
    preferences: Sequence[Mapping[str, Any]], *, num_bootstrap: int = 200, seed: int = 0
) -> dict[str, Agreement]:
    """Alpha per dimension over the free, admissible or vetoed picks (never the constrained ones), explicit and implied.

    Args:
        preferences: rows of the `preferences` table.
        num_bootstrap: resamples of the prompts for the interval.
    """
    by_dimension: dict[str, dict[str, dict[Any, list[int]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in preferences:
        if row["constrained"]:
            continue
        a, b = sorted((row["clip_a"], row["clip_b"]))
        label = row["preference"] if a == row["clip_a"] else -row["preference"]
        by_dimension[row["dimension"]][row["prompt_id"]][row["task_id"], a, b].append(label)
    rng = random.Random(seed)
    found = {}
    for dimension, prompts in by_dimension.items():
        names = sorted(prompts)
        alpha = krippendorff_alpha({u: v for name in names for u, v in prompts[name].items()})
        draws = []
        for _ in range(num_bootstrap if alpha is not None else 0):
            sample = [rng.choice(names) for _ in names]
            resampled = krippendorff_alpha(
                {(k, u): v for k, name in enumerate(sample) for u, v in prompts[name].items()}
            )
            if resampled is not None:
                draws.append(resampled)
        draws.sort()
        paired = sum(len(v) >= 2 for units in prompts.values() for v in units.values())
        found[dimension] = Agreement(
            alpha,
            draws[int(0.025 * len(draws))] if draws else None,
            draws[int(0.975 * (len(draws) - 1))] if draws else None,
            paired,
            len(names),
        )
    return found

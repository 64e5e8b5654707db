"""What one answer says of pairs of clips. Pure; indices are places in the order shown."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any


@dataclass(frozen=True)
class Pair:
    """Two clips of one judgment; `preference` is +1 if `a` is better, 0 for a tie."""

    a: int
    b: int
    preference: int
    kind: str
    """`explicit`: the pair that was picked; `implied`: it follows from the pick."""


def best_worst_pairs(best: int, worst: int, num_clips: int) -> list[Pair]:
    """The 2K - 3 pairs that best and worst order; only (best, worst) is explicit."""
    rest = [i for i in range(num_clips) if i not in (best, worst)]
    return [
        Pair(best, worst, 1, "explicit"),
        *(Pair(best, i, 1, "implied") for i in rest),
        *(Pair(i, worst, 1, "implied") for i in rest),
    ]


def tie_pairs(num_clips: int, rng: random.Random) -> list[Pair]:
    """All pairs as ties; one drawn at random is explicit, so that a tie weighs as much as a pick."""
    pairs = list(combinations(range(num_clips), 2))
    chosen = rng.choice(pairs)
    return [Pair(a, b, 0, "explicit" if (a, b) == chosen else "implied") for a, b in pairs]


def score_pairs(scores: Sequence[float], best: int | None, worst: int | None) -> list[Pair]:
    """Every pair of rated clips; equal ratings are ties."""
    found = []
    for a, b in combinations(range(len(scores)), 2):
        preference = (scores[a] > scores[b]) - (scores[a] < scores[b])
        kind = "explicit" if best is not None and {a, b} == {best, worst} else "implied"
        found.append(Pair(a, b, preference, kind))
    return found


def judgment_pairs(
    judgment: Mapping[str, Any], rng: Callable[[], random.Random], *, implied: bool = True
) -> list[Pair]:
    """The pairs that one row of the `judgments` table orders or ties.

    A constrained pick (made after a veto) implies nothing beyond itself; `cannot_judge` and `no_valid_pair` say nothing.

    Args:
        rng: made for a tie alone, whose explicit pair is drawn.
        implied: False leaves the implied pairs out, and does not make them first where most come from.
    """
    num_clips = len(judgment["candidates"])
    if judgment["scores"] is not None:
        pairs = score_pairs(judgment["scores"], judgment["best"], judgment["worst"])
    elif judgment["best"] is not None and not implied:
        pairs = [Pair(judgment["best"], judgment["worst"], 1, "explicit")]
    elif judgment["best"] is not None:
        pairs = best_worst_pairs(judgment["best"], judgment["worst"], num_clips)
    elif judgment["tie"]:
        pairs = tie_pairs(num_clips, rng())
    else:
        pairs = []
    if judgment["constrained"] or not implied:
        pairs = [pair for pair in pairs if pair.kind == "explicit"]
    return pairs

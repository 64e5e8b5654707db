"""Annotators and pages under suspicion: position bias, haste, gold items, and how often the rule vetoes."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

from annotation.quality.agreement import Share, wilson
from annotation.quality.votes import Row, free_picks

MIN_SECONDS = 2.0
"""A judgment that took less is too fast whatever was shown."""


@dataclass(frozen=True)
class PositionBias:
    """Where the best and the worst clips stood on the page."""

    best: list[int]
    """Times each place, from the left, was called best."""
    worst: list[int]
    chi_square: float
    p_value: float
    """Of `best` if every place were equally likely; below 0.01 the page or the people favour a place."""


def chi_square_tail(statistic: float, degrees: int) -> float:
    """P(X > statistic) of a chi-square variable: the finite sums for a whole number of degrees of freedom.

    Source: Abramowitz and Stegun (1964), 26.4.4 and 26.4.5.
    """
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom; at least 1 is needed")
    half = statistic / 2
    if degrees % 2 == 0:
        term, total = 1.0, 1.0
        for k in range(1, degrees // 2):
            term *= half / k
            total += term
        return math.exp(-half) * total
    total = math.erfc(math.sqrt(half))
    term = math.sqrt(half) / math.gamma(1.5)
    for k in range(1, (degrees + 1) // 2):
        total += math.exp(-half) * term
        term *= half / (k + 0.5)
    return min(1.0, total)


def position_bias(judgments: Iterable[Row]) -> dict[int, PositionBias]:
    """Per K: chi-square test of the place of the best clip against equal chances."""
    best: dict[int, Counter[int]] = defaultdict(Counter)
    worst: dict[int, Counter[int]] = defaultdict(Counter)
    for row in free_picks(judgments):
        if row["best"] is not None and row["scores"] is None:
            best[len(row["candidates"])][row["best"]] += 1
            worst[len(row["candidates"])][row["worst"]] += 1
    found = {}
    for num_clips, counts in sorted(best.items()):
        places = [counts[place] for place in range(num_clips)]
        expected = sum(places) / num_clips
        statistic = sum((count - expected) ** 2 for count in places) / expected
        found[num_clips] = PositionBias(
            places,
            [worst[num_clips][place] for place in range(num_clips)],
            statistic,
            chi_square_tail(statistic, num_clips - 1),
        )
    return found


def play_seconds(clips: Iterable[Row]) -> dict[str, float]:
    """How long each clip plays, by sha256."""
    return {clip["sha256"]: clip["num_frames"] / clip["fps"] for clip in clips}


def too_fast(judgments: Iterable[Row], seconds_of: Mapping[str, float]) -> dict[str, Share]:
    """Per annotator: the share of tasks answered before the longest of their clips could play once.

    The clips of a task play side by side, so that is the least time in which all of them can be seen whole.
    """
    answered: dict[tuple[str, str], bool] = {}
    for row in judgments:
        if row["seconds"] is None:
            continue
        floor = max(MIN_SECONDS, *(seconds_of.get(clip, 0.0) for clip in row["candidates"]))
        answered[row["annotator"], row["task_id"]] = row["seconds"] < floor
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for (annotator, _), fast in answered.items():
        counts[annotator][0] += fast
        counts[annotator][1] += 1
    return {name: wilson(*count) for name, count in sorted(counts.items())}


@dataclass(frozen=True)
class GoldAnswer:
    """What is known of one dimension of a gold task, by sha256; a side that is None is not known."""

    best: str | None = None
    worst: str | None = None
    tie: bool = False

    def is_met_by(self, row: Row) -> bool:
        """True if every known side was picked; `cannot_judge` meets nothing."""
        if self.tie or row["best"] is None:
            return bool(self.tie and row["tie"])
        picked = (row["candidates"][row["best"]], row["candidates"][row["worst"]])
        return self.best in (None, picked[0]) and self.worst in (None, picked[1])


GoldAnswers = Mapping[tuple[str, str], GoldAnswer]
"""(task id, dimension) -> the known answer."""


def gold_accuracy(judgments: Iterable[Row], gold: GoldAnswers) -> dict[str, Share]:
    """Per annotator: of the gold questions, the share that they got right. A free pick is what counts, vetoed or not."""
    right: dict[tuple[str, str, str], bool] = {}
    for row in free_picks(judgments):
        question = (row["task_id"], row["dimension"])
        if question in gold and row["status"] != "no_valid_pair":
            right[row["annotator"], question[0], question[1]] = gold[question].is_met_by(row)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for (annotator, *_), hit in right.items():
        counts[annotator][0] += hit
        counts[annotator][1] += 1
    return {name: wilson(*count) for name, count in sorted(counts.items())}


def veto_rates(judgments: Iterable[Row]) -> dict[tuple[str, str], Share]:
    """Per pair of dimensions: of the answers with a free pick in both, the share where the two picks clash.

    A clash is the rule's (contract 3 of the design): the best of one dimension is the worst of the other.
    """
    picks: dict[tuple[str, str], dict[str, tuple[int, int]]] = defaultdict(dict)
    for row in free_picks(judgments):
        if row["best"] is not None and row["kind"] == "best_worst":
            answer = picks[row["annotator"], row["task_id"]]
            answer[row["dimension"]] = (row["best"], row["worst"])
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for answer in picks.values():
        for d, e in combinations(sorted(answer), 2):
            clash = answer[d][0] == answer[e][1] or answer[d][1] == answer[e][0]
            counts[d, e][0] += clash
            counts[d, e][1] += 1
    return {pair: wilson(*count) for pair, count in sorted(counts.items())}

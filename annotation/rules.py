"""The admissibility rule: the clip someone calls best must not be another dimension's worst, nor the other way round.

Training on a pair (best, worst) of one dimension must not teach the model to lose another. From best and worst alone the rule can
see one thing: a clash is best_d == worst_e or worst_d == best_e for another dimension e that was not called a tie.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from annotation.records import LETTERS, SCORES, STATUSES, Choice

Pair = tuple[int, int]
"""(best, worst), indices in the order shown."""


@dataclass(frozen=True)
class Clash:
    """`dimension`'s pick contradicts the pick already made in `other`."""

    dimension: str
    other: str
    reason: str


def pair_clashes(pair: Pair, other: Pair) -> bool:
    """True if the best of one pair is the worst of the other. Symmetric in its arguments."""
    return pair[0] == other[1] or pair[1] == other[0]


def clashes(picks: Mapping[str, Pair], ties: Collection[str] = ()) -> list[Clash]:
    """Every clash among the picks, each pair of dimensions once, in the order the picks were made.

    Args:
        picks: dimension -> (best, worst), in the order picked: the later pick of a clashing pair is the vetoed one.
        ties: dimensions called a tie; they clash with nothing.
    """
    made = [(dimension, pair) for dimension, pair in picks.items() if dimension not in ties]
    found = []
    for index, (dimension, pair) in enumerate(made):
        for other, other_pair in made[:index]:
            if pair_clashes(pair, other_pair):
                found.append(Clash(dimension, other, _reason(dimension, pair, other, other_pair)))
    return found


def _reason(dimension: str, pair: Pair, other: str, other_pair: Pair) -> str:
    parts = []
    if pair[0] == other_pair[1]:
        parts.append(f"{LETTERS[pair[0]]} is your best for {dimension} but your worst for {other}")
    if pair[1] == other_pair[0]:
        parts.append(f"{LETTERS[pair[1]]} is your worst for {dimension} but your best for {other}")
    return "; ".join(parts)


def admissible_pairs(
    num_clips: int, dimension: str, picks: Mapping[str, Pair], ties: Collection[str] = ()
) -> list[Pair]:
    """The (best, worst) pairs still open to `dimension` beside the other picks. May be empty: then `no_valid_pair` is honest."""
    others = [pair for name, pair in picks.items() if name != dimension and name not in ties]
    return [
        (best, worst)
        for best in range(num_clips)
        for worst in range(num_clips)
        if best != worst and not any(pair_clashes((best, worst), other) for other in others)
    ]


def check_choices(
    choices: Iterable[Choice], *, dimensions: Collection[str], num_clips: int
) -> list[str]:
    """What is wrong with one annotator's answers, as sentences; empty if they can be stored.

    Checked: each asked dimension is answered once, indices are in range and differ, an answer after a veto states the free pick,
    `no_valid_pair` is only said of a free pick that does clash, and the final pairs do not clash.
    """
    choices = [choice.with_first() for choice in choices]
    problems = _unasked(choices, dimensions)
    for choice in choices:
        problems += [f"{choice.dimension}: {text}" for text in _shape_problems(choice, num_clips)]
    if problems:
        return problems

    final = _picked((c.dimension, c.best, c.worst) for c in choices if c.status == "ok")
    first = _picked((c.dimension, c.first_best, c.first_worst) for c in choices)
    for choice in choices:
        if choice.status == "no_valid_pair":
            free = first[choice.dimension]
            others = [
                p
                for picks in (final, first)
                for name, p in picks.items()
                if name != choice.dimension
            ]
            if not any(pair_clashes(free, other) for other in others):
                problems.append(
                    f"{choice.dimension}: the free pick clashes with no other dimension, so nothing vetoed it"
                )
    problems += [clash.reason for clash in clashes(final)]
    return problems


def check_answers(
    kind: str, choices: Iterable[Choice], *, dimensions: Collection[str], num_clips: int
) -> list[str]:
    """`check_choices` for any kind of task. Pairs (`gsb`) and scores are never vetoed: a clash only costs admissibility."""
    choices = list(choices)
    if kind == "best_worst":
        problems = [f"{c.dimension}: takes no scores" for c in choices if c.scores is not None]
        return problems or check_choices(choices, dimensions=dimensions, num_clips=num_clips)
    check = _score_problems if kind == "score" else _pair_problems
    problems = _unasked(choices, dimensions)
    for choice in choices:
        problems += [f"{choice.dimension}: {text}" for text in check(choice, num_clips)]
    return problems


@dataclass(frozen=True)
class DerivedPick:
    """Best and worst that ratings imply: None where the extreme is shared; `tie` if all are equal."""

    best: int | None
    worst: int | None
    tie: bool


def derive_pick(scores: Sequence[float]) -> DerivedPick:
    """Best and worst of a list of ratings, higher is better. Only a single highest and a single lowest make a pick."""
    low, high = min(scores), max(scores)
    if low == high:
        return DerivedPick(None, None, True)
    if scores.count(high) > 1 or scores.count(low) > 1:
        return DerivedPick(None, None, False)
    return DerivedPick(scores.index(high), scores.index(low), False)


def settle(kind: str, choices: Iterable[Choice]) -> list[tuple[Choice, bool]]:
    """Checked answers as they are stored, each with whether it is admissible.

    Scores get the best and worst they imply. Pairs and scores of one task have no order in time, so both sides of a clash lose
    their admissibility.
    """
    choices = [choice.with_first() for choice in choices]
    if kind == "best_worst":
        return [(c, c.status in ("ok", "tie") and c.confirmed is not False) for c in choices]
    if kind == "score":
        choices = [_with_pick(choice) for choice in choices]
    picks = _picked((c.dimension, c.best, c.worst) for c in choices)
    clashing = {name for clash in clashes(picks) for name in (clash.dimension, clash.other)}
    return [(c, c.status in ("ok", "tie") and c.dimension not in clashing) for c in choices]


def _with_pick(choice: Choice) -> Choice:
    if choice.status != "ok" or choice.scores is None:
        return choice
    pick = derive_pick(choice.scores)
    tie = pick.tie and len(choice.scores) > 1
    best = None if pick.best is None else (pick.best, pick.worst)
    filled = replace(choice, status="tie" if tie else "ok")
    if best is None:
        return filled
    return replace(filled, best=best[0], worst=best[1], first_best=best[0], first_worst=best[1])


def _unasked(choices: Iterable[Choice], dimensions: Collection[str]) -> list[str]:
    """Dimensions that are answered twice, unasked or not at all."""
    named = [choice.dimension for choice in choices]
    problems = [
        f"{name} is answered {named.count(name)} times"
        for name in sorted(set(named))
        if named.count(name) > 1
    ]
    problems += [f"{name} was not asked" for name in named if name not in dimensions]
    return problems + [f"{name} is not answered" for name in dimensions if name not in named]


def _pair_problems(choice: Choice, num_clips: int) -> list[str]:
    if choice.status == "no_valid_pair" or choice.constrained:
        return ["a pair is good, same, bad or cannot_judge; nothing is vetoed"]
    if choice.scores is not None:
        return ["takes no scores"]
    return _shape_problems(choice, num_clips)


def _score_problems(choice: Choice, num_clips: int) -> list[str]:
    if choice.status not in ("ok", "cannot_judge"):
        return [f"status {choice.status!r} is not one of ok, cannot_judge"]
    if choice.best is not None or choice.worst is not None or choice.constrained:
        return ["takes scores, no best or worst"]
    if choice.status == "cannot_judge":
        return [] if choice.scores is None else ["cannot_judge takes no scores"]
    if choice.scores is None or len(choice.scores) != num_clips:
        return [f"needs a score for each of the {num_clips} clips"]
    if any(score not in SCORES for score in choice.scores):
        return [f"a score is {SCORES[0]} to {SCORES[-1]}"]
    return []


def _picked(rows: Iterable[tuple[str, int | None, int | None]]) -> dict[str, Pair]:
    return {
        dimension: (best, worst)
        for dimension, best, worst in rows
        if best is not None and worst is not None
    }


def _shape_problems(choice: Choice, num_clips: int) -> list[str]:
    if choice.status not in STATUSES:
        return [f"status {choice.status!r} is not one of {', '.join(STATUSES)}"]
    problems = []
    for name, pair in (
        ("answer", (choice.best, choice.worst)),
        ("free pick", (choice.first_best, choice.first_worst)),
    ):
        best, worst = pair
        if best is None and worst is None:
            continue
        if best is None or worst is None:
            problems.append(f"the {name} needs both a best and a worst clip")
        elif not all(0 <= index < num_clips for index in (best, worst)):
            problems.append(
                f"the {name} names a clip that was not shown ({num_clips} clips, counted from 0)"
            )
        elif best == worst:
            problems.append(f"{LETTERS[best]} cannot be both best and worst")
    if choice.status == "ok" and choice.best is None:
        problems.append("best and worst are missing")
    if choice.status != "ok" and choice.best is not None:
        problems.append(f"{choice.status} takes no best or worst")
    if (choice.constrained or choice.status == "no_valid_pair") and choice.first_best is None:
        problems.append("an answer given after a veto must state the free pick that was vetoed")
    return problems

"""What was said before: the latest revision of a judgment, and how often the rule vetoes what."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row, select

from annotation import schema as t
from annotation.accounts import Account
from annotation.records import Choice
from annotation.rules import pair_clashes
from annotation.store import Store

REVISABLE = ("work", "gold", "retest", "adjudication")
"""Whoever has seen the answers of a practice task or finished an exam cannot take theirs back."""

_newer = t.judgment.alias("newer")


def is_latest() -> sa.ColumnElement[bool]:
    """Condition on `judgment`: no later revision replaces it."""
    return (
        ~select(sa.literal(1))
        .select_from(_newer)
        .where(_newer.c.supersedes == t.judgment.c.id)
        .correlate(t.judgment)
        .exists()
    )


def choices_of(connection: Connection, judgment_id: int) -> list[Choice]:
    """The answers of one judgment, in the order asked."""
    rows = connection.execute(
        select(t.choice).where(t.choice.c.judgment_id == judgment_id).order_by(t.choice.c.position)
    )
    return [
        Choice(
            row.dimension,
            row.best,
            row.worst,
            row.status,
            row.first_best,
            row.first_worst,
            row.constrained,
            row.confirmed,
            None if row.scores is None else tuple(row.scores),
        )
        for row in rows
    ]


def last_judged(connection: Connection, account: Account, before: int | None) -> Row[Any] | None:
    """The latest revision of the last thing an annotator judged; its `root` is the id of the first revision.

    Args:
        before: the root of a judgment; what was judged before that one is found.
    """
    first = t.judgment.alias("first")
    query = (
        select(t.judgment, first.c.id.label("root"))
        .join(first, first.c.presentation_id == t.judgment.c.presentation_id)
        .join(t.task, t.task.c.id == t.judgment.c.task_id)
        .where(
            first.c.account_id == account.id,
            first.c.revision == 0,
            first.c.purpose.in_(REVISABLE),
            t.task.c.state != "removed",
            is_latest(),
        )
        .order_by(first.c.id.desc())
        .limit(1)
    )
    if before is not None:
        query = query.where(first.c.id < before)
    return connection.execute(query).first()


def veto_rates(store: Store) -> dict[tuple[str, str], tuple[int, int]]:
    """(dimension, dimension), in alphabetical order -> (how often their free picks clashed, how often both were picked).

    Over the latest revisions of best-and-worst judgments. The rate is the share of judgments in which the rule had to veto one.
    """
    query = (
        select(
            t.choice.c.judgment_id,
            t.choice.c.dimension,
            t.choice.c.first_best,
            t.choice.c.first_worst,
        )
        .join(t.judgment, t.judgment.c.id == t.choice.c.judgment_id)
        .where(t.judgment.c.kind == "best_worst", is_latest(), t.choice.c.first_best.is_not(None))
        .order_by(t.choice.c.judgment_id, t.choice.c.dimension)
    )
    vetoed: Counter[tuple[str, str]] = Counter()
    asked: Counter[tuple[str, str]] = Counter()

    def count(picks: list[tuple[str, tuple[int, int]]]) -> None:
        for (first, pair), (second, other) in combinations(picks, 2):
            asked[first, second] += 1
            vetoed[first, second] += pair_clashes(pair, other)

    with store.read() as connection:
        judgment, picks = None, []
        for row in connection.execute(query):
            if row.judgment_id != judgment:
                count(picks)
                judgment, picks = row.judgment_id, []
            picks.append((row.dimension, (row.first_best, row.first_worst)))
        count(picks)
    return {pair: (vetoed[pair], number) for pair, number in sorted(asked.items())}

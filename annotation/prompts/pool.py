"""A project's prompt pool: import, curation, listing. What is held back stays, with the reason, and can be taken in later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select, update

from annotation import audit
from annotation import schema as t
from annotation.projects import project_id
from annotation.prompts import curate
from annotation.prompts.near import ClusterIndex
from annotation.prompts.sources import RawPrompt
from annotation.records import PromptRecord, prompt_id
from annotation.store import Store

NEAR_DUPLICATE = "nearly the same as another prompt"
MAX_CATEGORY, MAX_SOURCE, MAX_REASON = 40, 200, 80


@dataclass(frozen=True)
class Candidate:
    """One prompt on its way into the pool."""

    text: str
    prompt_id: str
    language: str
    category: str
    source: str
    uses: int
    reason: str | None
    """Why it is held back; None if it is not."""


@dataclass
class ImportReport:
    """What an import brings, or would bring."""

    read: int = 0
    duplicates: int = 0
    """Of prompts in the same file or already in the pool, after normalisation."""
    candidates: list[Candidate] = field(default_factory=list)

    @property
    def held(self) -> Counter[str]:
        return Counter(c.reason for c in self.candidates if c.reason)

    @property
    def languages(self) -> Counter[str]:
        return Counter(c.language for c in self.candidates)

    @property
    def categories(self) -> Counter[str]:
        return Counter(c.category for c in self.candidates)


def import_prompts(
    store: Store,
    raw: Sequence[RawPrompt],
    *,
    project: str = "default",
    dry_run: bool = False,
    actor: str = audit.COMMAND_LINE,
) -> ImportReport:
    """Cleans, filters and adds prompts to a project's pool.

    An exact duplicate (after normalisation) only counts as a use; a near-duplicate or unfit prompt is held back with its reason.

    Args:
        dry_run: only report.
    """
    report = ImportReport(read=len(raw))
    with store.read() as connection:
        index, known = _known(connection, project)
    seen: dict[str, int] = {}
    uses: Counter[str] = Counter()
    for prompt in raw:
        text = curate.clean(prompt.text)
        if not text:
            report.duplicates += 1
            continue
        name = prompt_id(text)
        if name in known or name in seen:
            report.duplicates += 1
            uses[name] += prompt.uses
            continue
        language = curate.language_of(text)
        reason = curate.unfit(text, language)
        if reason is None and index.nearest(text) is not None:
            reason = NEAR_DUPLICATE
        if reason is None:
            index.add(name, text)
        seen[name] = len(report.candidates)
        report.candidates.append(
            Candidate(
                text,
                name,
                language,
                (prompt.category or curate.category_of(text))[:MAX_CATEGORY],
                prompt.source[:MAX_SOURCE],
                prompt.uses,
                reason and reason[:MAX_REASON],
            )
        )
    if not dry_run:
        _add(store, report, uses, project, actor)
    return report


def _known(connection: sa.Connection, project: str) -> tuple[ClusterIndex, set[str]]:
    """The active prompts of a project's pool, as near-duplicates see them, and the ids of all its prompts."""
    index, known = ClusterIndex(), set()
    member = t.project_prompt
    query = (
        select(t.prompt.c.prompt_id, t.prompt.c.text, member.c.status)
        .join(member, member.c.prompt_id == t.prompt.c.prompt_id)
        .join(t.project, t.project.c.id == member.c.project_id)
        .where(t.project.c.name == project)
        .order_by(member.c.created_ms, t.prompt.c.prompt_id)
    )
    for row in connection.execute(query):
        known.add(row.prompt_id)
        if row.status == "active":
            index.add(row.prompt_id, row.text)
    return index, known


def _add(store: Store, report: ImportReport, uses: Counter[str], project: str, actor: str) -> None:
    with store.write() as connection:
        found = store.project_id(connection, project)
        store.add_prompts(
            connection,
            found,
            [PromptRecord(c.text, c.language) for c in report.candidates],
            pool=[
                {
                    "category": c.category,
                    "status": "held" if c.reason else "active",
                    "reason": c.reason,
                    "source": c.source,
                    "uses": c.uses,
                }
                for c in report.candidates
            ],
        )
        member = t.project_prompt
        for name, number in uses.items():
            connection.execute(
                update(member)
                .where(member.c.project_id == found, member.c.prompt_id == name)
                .values(uses=member.c.uses + number)
            )
        detail = {
            "read": report.read,
            "added": len(report.candidates),
            "held": sum(report.held.values()),
        }
        audit.record(connection, store.now_ms(), actor, "prompts import", project, detail)


@dataclass(frozen=True)
class CurateReport:
    """What curation changes, or would change."""

    held: Counter[str]
    """Newly held back, by reason."""
    released: int
    """Held back before, fit now."""
    weights: dict[str, tuple[int, float]]
    """Category -> active prompts in it, their new weight."""


def curate_pool(
    store: Store,
    *,
    project: str = "default",
    strength: float = 0.5,
    dry_run: bool = False,
    actor: str = audit.COMMAND_LINE,
) -> CurateReport:
    """Judges every prompt of a pool again, and balances its categories.

    Args:
        strength: how far shares of categories are evened out, 0 to 1 (`curate.balance`).
    """
    index = ClusterIndex()
    with store.read() as connection:
        found = project_id(connection, project)
        rows = connection.execute(_pool(found)).all()
    changes: list[dict[str, Any]] = []
    for row in sorted(
        rows, key=lambda row: row.status
    ):  # of two near-duplicates the active one stays
        reason = curate.unfit(row.text, row.language)
        if reason is None and index.nearest(row.text) is not None:
            reason = NEAR_DUPLICATE
        if reason is None:
            index.add(row.prompt_id, row.text)
        category = row.category or curate.category_of(row.text)
        changes.append({"row": row, "reason": reason, "category": category})
    counts = Counter(change["category"] for change in changes if change["reason"] is None)
    weights = curate.balance(counts, strength=strength)
    held = Counter(c["reason"] for c in changes if c["reason"] and c["row"].status == "active")
    released = sum(c["reason"] is None and c["row"].status == "held" for c in changes)
    if not dry_run:
        member = t.project_prompt
        with store.write() as connection:
            for change in changes:
                values = {
                    "status": "held" if change["reason"] else "active",
                    "reason": change["reason"],
                    "category": change["category"][:MAX_CATEGORY],
                    "weight": weights.get(change["category"], 1.0),
                }
                mine = member.c.prompt_id == change["row"].prompt_id
                connection.execute(
                    update(member).where(member.c.project_id == found, mine).values(values)
                )
            detail = {"held": sum(held.values()), "released": released, "strength": strength}
            audit.record(connection, store.now_ms(), actor, "prompts curate", project, detail)
    return CurateReport(held, released, {name: (counts[name], w) for name, w in weights.items()})


def _pool(of_project: int) -> sa.Select[Any]:
    member = t.project_prompt
    return (
        select(t.prompt.c.text, t.prompt.c.language, t.prompt.c.cluster, member)
        .join(member, member.c.prompt_id == t.prompt.c.prompt_id)
        .where(member.c.project_id == of_project)
        .order_by(member.c.created_ms, member.c.prompt_id)
    )


def list_pool(
    store: Store,
    *,
    project: str = "default",
    status: str | None = "active",
    category: str | None = None,
    language: str | None = None,
    number: int | None = None,
    seed: int = 0,
) -> list[sa.Row[Any]]:
    """Prompts of a pool.

    Args:
        status: `active`, `held` or None for all.
        number: draw so many by their weights; all of them, oldest first, by default.
    """
    with store.read() as connection:
        query = _pool(project_id(connection, project))
        for column, wanted in (
            (t.project_prompt.c.status, status),
            (t.project_prompt.c.category, category),
            (t.prompt.c.language, language),
        ):
            if wanted is not None:
                query = query.where(column == wanted)
        rows = list(connection.execute(query))
    if number is None:
        return rows
    by_id = {row.prompt_id: row for row in rows}
    drawn = curate.sample(list(by_id), [row.weight for row in rows], number, seed=seed)
    return [by_id[name] for name in drawn]

"""A person in place of the simulated annotators: some candidate tasks become theirs, and their verdicts become preference data.

Everything is found again: the project of the same candidates keeps its tasks, its account and every judgment, so that a person
who was interrupted goes on where they stopped.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reelhf.errors import UserError
from rlhf.judging import (
    PROJECT,
    Groups,
    JudgingConfig,
    export_project,
    language_of,
    open_project,
    read_groups,
    run_panel,
    shown_spread,
    simulated_panels,
)

if TYPE_CHECKING:
    from fastapi import FastAPI

    from annotation.accounts import Account
    from annotation.store import Store
    from rlhf.compare import Gold

HUMAN = "you"
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Part:
    """The feedback or the held-out half of the candidates, and the person's share of it."""

    name: str
    prompts: tuple[str, ...]
    """One per candidate task, in the candidates' order."""
    clips: tuple[tuple[int, ...], ...]
    """Clip ids, one group per candidate task."""
    tasks: tuple[int, ...]
    """Ids of the person's tasks: the first ones of the part."""


@dataclass(frozen=True)
class Assignment:
    """What one person is asked to judge, in a project that may know much of it already."""

    store: Store
    account: Account
    parts: tuple[Part, Part]

    @property
    def num_tasks(self) -> int:
        return sum(len(part.tasks) for part in self.parts)


def assign(
    config: JudgingConfig,
    out: Path,
    candidates: Path,
    *,
    prompts: tuple[Sequence[str], Sequence[str]],
    top_up: bool,
) -> Assignment:
    """Open the project in `out`, or go on with it, and see that the person's tasks are there.

    Args:
        candidates: folder of `make_candidates`; its tasks are the prompts of `prompts[0]`, then those of `prompts[1]`.
        prompts: the feedback and the held-out prompts.
        top_up: simulated annotators will judge the rest.
    Returns: the assignment; closing its store is the caller's.
    """
    store, groups = open_project(out / PROJECT, candidates)
    share = human_share(config, (len(prompts[0]), len(prompts[1])), top_up=top_up)
    clips = groups[: len(prompts[0])], groups[len(prompts[0]) :]
    feedback, held_out = (
        Part(
            name,
            tuple(prompts[half]),
            tuple(map(tuple, clips[half])),
            tuple(ensure_tasks(store, clips[half][: share[half]])),
        )
        for half, name in enumerate(("feedback", "held-out"))
    )
    return Assignment(store, person(store), (feedback, held_out))


def human_share(config: JudgingConfig, sizes: tuple[int, int], *, top_up: bool) -> tuple[int, int]:
    """How many feedback and held-out tasks the person gets; with a top-up, simulated others judge the held-out ones."""
    held_out = 0 if top_up else min(sizes[1], max(1, config.human_tasks // 3))
    return min(sizes[0], config.human_tasks - held_out), held_out


def ensure_tasks(store: Store, groups: Sequence[Sequence[int]], *, need: int = 1) -> list[int]:
    """The task of each group of clip ids, made where the project has none yet."""
    import sqlalchemy as sa

    from annotation import schema

    clips_of: dict[int, set[int]] = {}
    with store.read() as connection:
        for row in connection.execute(sa.select(schema.task_clip)):
            clips_of.setdefault(row.task_id, set()).add(row.clip_id)
    task_of = {frozenset(clips): task for task, clips in clips_of.items()}
    missing = [group for group in groups if frozenset(group) not in task_of]
    made = store.create_tasks(missing, need=need, label="tasks") if missing else []
    task_of |= zip(map(frozenset, missing), made, strict=True)
    return [task_of[frozenset(group)] for group in groups]


def person(store: Store) -> Account:
    """The account of whoever sits in front of this machine; it is signed in by link."""
    return store.find_user(HUMAN) or store.add_user(HUMAN, secrets.token_urlsafe(12))


def human_app(store: Store, *, wanted: int | None = None) -> FastAPI:
    """The annotation site of a project, with the page; `wanted` is the number of tasks asked of a person."""
    from annotation.api.app import create_app
    from annotation.config import AnnotateConfig

    return create_app(store, AnnotateConfig(wanted_tasks=wanted, title="ReelHF: judge"))


def wait_for_human(assignment: Assignment, echo: Callable[[str], None]) -> None:
    """Return once the person has judged or skipped every task they were asked; says now and then how far they are.

    Raises: UserError if they skipped the whole of a part: nothing could be learned from it.
    """
    started, first, said = time.monotonic(), None, None
    wanted = assignment.num_tasks
    while True:
        judged, skipped = answered(assignment, [t for part in assignment.parts for t in part.tasks])
        done = judged + skipped
        first = done if first is None else first
        progress = f"      {judged} of {wanted} tasks judged"
        progress += f", {skipped} skipped" if skipped else ""
        if done == wanted:
            break
        if done != said:
            pace = (time.monotonic() - started) / (done - first) if done > first else None
            minutes = None if pace is None else max(1, round(pace * (wanted - done) / 60))
            echo(progress + ("" if minutes is None else f", about {minutes} min left"))
            said = done
        time.sleep(_POLL_SECONDS)
    for part in assignment.parts:
        if part.tasks and answered(assignment, part.tasks)[0] == 0:
            raise UserError(
                f"you skipped all {len(part.tasks)} tasks of the {part.name} prompts, so nothing can be learned from them; "
                f"move {assignment.store.media.parent} away and run the same command to judge them again"
            )
    echo(f"{progress}: going on. The page stays open.")


def answered(assignment: Assignment, tasks: Iterable[int]) -> tuple[int, int]:
    """How many of the tasks the person has judged, and how many they only skipped."""
    import sqlalchemy as sa

    from annotation import schema

    with assignment.store.read() as connection:

        def theirs(table: sa.Table) -> set[int]:
            mine = table.c.account_id == assignment.account.id
            return set(connection.execute(sa.select(table.c.task_id).where(mine)).scalars())

        judged, skipped = theirs(schema.judgment), theirs(schema.skip)
    asked = set(tasks)
    return len(asked & judged), len(asked & skipped - judged)


def export_human(
    assignment: Assignment,
    config: JudgingConfig,
    *,
    candidates: Path,
    gold: Gold | None,
    out: Path,
) -> Path:
    """Export what was judged; with `gold`, simulated annotators judge the rest before. Their votes are marked in every table."""
    extra: dict[str, Any] = {"human_tasks": assignment.num_tasks, "top_up": gold is not None}
    if gold is None:
        prompts = [part.prompts[: len(part.tasks)] for part in assignment.parts]
        groups = Groups.of((None, None), prompts)
    else:
        panels, extra["panels"] = top_up(assignment, config, candidates, gold)
        prompts = [part.prompts for part in assignment.parts]
        groups = Groups.of(([assignment.account.pseudonym, *panels[0]], panels[1]), prompts)
    return export_project(assignment.store, out, groups, extra)


def top_up(
    assignment: Assignment, config: JudgingConfig, candidates: Path, gold: Gold
) -> tuple[list[list[str]], list[Any]]:
    """Simulated annotators judge what the person was not asked. Returns the pseudonyms and the counts of both panels."""
    store, spread = assignment.store, shown_spread(candidates, gold)
    pseudonyms, counts = [], []
    for part, panel in zip(assignment.parts, simulated_panels(config), strict=True):
        rest = part.clips[len(part.tasks) :]
        ensure_tasks(store, rest, need=min(config.judgments_per_task, len(panel)))
        names, done = run_panel(store, panel, gold, seed=config.panel_seed, spread=spread)
        pseudonyms.append(names)
        counts.append(done)
    return pseudonyms, counts


def verdicts_key(store: Store, out: Path) -> str:
    """A hash of everything people said in a project, and of who teaches which rewards: what later stages depend on."""
    import sqlalchemy as sa

    from annotation import schema
    from reelhf.hashing import content_hash

    with store.read() as connection:
        rows = connection.execute(sa.select(schema.judgment).order_by(schema.judgment.c.id))
        said = [[str(value) for value in row] for row in rows]
    return content_hash(said, asdict(read_groups(out)))[:16]


def add_before_after_tasks(store: Store, comparisons: Sequence[Path]) -> list[int]:
    """Blind tasks for a person: each holds clips of one prompt from before and after RLHF, in random order."""
    from annotation.records import ClipRecord

    groups = []
    for folder in comparisons:
        comparison = json.loads((folder / "comparison.json").read_text())
        for pair in comparison["pairs"]:
            records = [
                ClipRecord(
                    path=folder / path,
                    prompt=pair["prompt"],
                    model="toy",
                    stage=f"{comparison['role']}_{side}_rlhf",
                    language=language_of(pair["prompt"]),
                    seed=pair["seed"] + draw,
                )
                for side in ("before", "after")
                for draw, path in enumerate(pair["clips"][side])
            ]
            groups.append(store.add_clips(records, project="before and after"))
    # where a run kept its start, before and after are the same files: there is nothing to judge
    different = [group for group in groups if len(set(group)) == len(group)]
    return store.create_tasks(different, round_number=1)

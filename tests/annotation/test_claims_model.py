"""Claim, submit, expire, skip, flag and revise in any order, against a reference in plain Python."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from annotation import claims, schema
from annotation.flags import FLAGS_TO_HOLD, SKIPS_TO_HOLD
from annotation.store import Store
from tests.annotation.annotation_cases import (
    LEASE,
    PASSWORD,
    SMALL,
    Clock,
    Person,
    plain_verdict,
    records,
    rows,
)
from tests.annotation.state_machines import explore

PEOPLE = [f"ann{i}" for i in range(3)]
NEEDS = {1: 1, 2: 2, 3: 1}
"""Task id -> judgments wanted; task 3 comes first by its priority."""
ORDER = [3, 1, 2]
PERSON = st.sampled_from(PEOPLE)
PLACE = st.integers(0, 8)
"""Picks one of the (person, task) pairs that were shown."""


@dataclass
class Reference:
    """What must be true, in dictionaries."""

    leases: dict[tuple[str, int], float] = field(default_factory=dict)  # (who, task) -> expiry
    judged: dict[tuple[str, int], list[tuple[int, int]]] = field(default_factory=dict)  # revisions
    surplus: set[tuple[str, int]] = field(default_factory=set)
    passed: dict[tuple[str, int], set[str]] = field(default_factory=dict)  # skip and flag kinds

    def counted(self, task: int) -> int:
        return sum(key[1] == task and key not in self.surplus for key in self.judged)

    def state(self, task: int) -> str:
        said = [what for key, kinds in self.passed.items() if key[1] == task for what in kinds]
        held = any(said.count(kind) >= number for kind, number in FLAGS_TO_HOLD.items())
        if held or said.count("skip") >= SKIPS_TO_HOLD:
            return "flagged"
        return "done" if self.counted(task) >= NEEDS[task] else "open"

    def next_for(self, who: str, now: float) -> int | None:
        """The task a claim must return."""
        for task in NEEDS:  # what one holds comes first
            if self.leases.get((who, task), 0) > now and self.state(task) == "open":
                return task
        for task in ORDER:
            others = sum(
                key[1] == task and key[0] != who and expiry > now
                for key, expiry in self.leases.items()
            )
            free = self.counted(task) + others < NEEDS[task]
            touched = (who, task) in self.judged or (who, task) in self.passed
            if self.state(task) == "open" and free and not touched:
                return task
        return None


class Claims(RuleBasedStateMachine):
    """Three people at one store; time passes in steps."""

    template: Path
    reached: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="claims-"))
        shutil.copytree(self.template, self.folder, dirs_exist_ok=True)
        self.clock = Clock()
        self.store = Store.open(self.folder, now=self.clock)
        self.people = {name: Person(self.store, name) for name in PEOPLE}
        self.reference = Reference()
        self.shown: dict[tuple[str, int], claims.TaskView] = {}
        self.keys: dict[
            tuple[str, int], tuple[str, tuple[int, int], int | None, claims.Receipt]
        ] = {}

    def teardown(self) -> None:
        now = self.reference
        revised = [revisions for revisions in now.judged.values() if len(revisions) > 1]
        came_to = {"judged": now.judged, "surplus": now.surplus, "revised": revised}
        for name, found in {**came_to, "passed on": now.passed}.items():
            self.reached.update([name] * len(found))
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(who=PERSON)
    def claim(self, who: str) -> None:
        expected = self.reference.next_for(who, self.clock.seconds)
        task = self.people[who].claim()
        assert (None if task is None else self.task_of(task)) == expected
        if task is not None and expected is not None:
            self.reference.leases[who, expected] = self.clock.seconds + LEASE
            self.shown[who, expected] = task

    @rule(seconds=st.sampled_from([1, LEASE / 2, LEASE + 1]))
    def time_passes(self, seconds: float) -> None:
        self.clock.seconds += seconds

    def one(self, of: dict[tuple[str, int], Any], place: int) -> tuple[str, int]:
        return list(of)[place % len(of)]

    @precondition(lambda self: self.shown)
    @rule(place=PLACE)
    def heartbeat(self, place: int) -> None:
        who, task = self.one(self.shown, place)
        person, now = self.people[who], self.clock.seconds
        alive = self.reference.leases.get((who, task), 0) > now
        token = self.shown[who, task].presentation
        assert claims.heartbeat(self.store, person.account, token, lease_seconds=LEASE) == alive
        if alive:
            self.reference.leases[who, task] = now + LEASE

    @precondition(lambda self: self.shown)
    @rule(place=PLACE, best=st.integers(0, 1))
    def submit(self, place: int, best: int) -> None:
        """Whatever was shown may be submitted, however late: it counts while a place is free, and is kept after."""
        who, task = self.one(self.shown, place)
        person, view, answer = self.people[who], self.shown[who, task], (best, 1 - best)
        if (who, task) in self.reference.judged:
            with pytest.raises(claims.Conflict, match="already judged"):
                person.submit(view, plain_verdict(view, *answer))
            return
        surplus = self.reference.counted(task) >= NEEDS[task]
        key = f"key-{who}-{task}"
        receipt = person.submit(view, plain_verdict(view, *answer), key=key)
        assert (receipt.surplus, receipt.revision) == (surplus, 0)
        self.reference.judged[who, task] = [answer]
        if surplus:
            self.reference.surplus.add((who, task))
        self.reference.leases.pop((who, task), None)
        self.keys[who, task] = (key, answer, None, receipt)

    @precondition(lambda self: self.keys)
    @rule(place=PLACE)
    def submit_again(self, place: int) -> None:
        """The network lost the answer: the same submission gives the same receipt, even much later."""
        who, task = self.one(self.keys, place)
        key, answer, revises, receipt = self.keys[who, task]
        view = self.shown[who, task]
        again = self.people[who].submit(
            view, plain_verdict(view, *answer), key=key, revises=revises
        )
        assert again == receipt

    @precondition(lambda self: self.keys)
    @rule(place=PLACE, best=st.integers(0, 1))
    def revise(self, place: int, best: int) -> None:
        who, task = self.one(self.keys, place)
        person, view, answer = self.people[who], self.shown[who, task], (best, 1 - best)
        last = self.keys[who, task][3]
        revisions = self.reference.judged[who, task]
        key = f"key-{who}-{task}-{len(revisions)}"
        receipt = person.submit(
            view, plain_verdict(view, *answer), key=key, revises=last.judgment_id
        )
        assert receipt.revision == len(revisions)
        assert receipt.surplus == ((who, task) in self.reference.surplus)
        revisions.append(answer)
        self.keys[who, task] = (key, answer, last.judgment_id, receipt)

    @precondition(lambda self: self.shown)
    @rule(place=PLACE, what=st.sampled_from(["skip", "ambiguous_prompt", *FLAGS_TO_HOLD]))
    def pass_on(self, place: int, what: str) -> None:
        who, task = self.one(self.shown, place)
        person, token = self.people[who], self.shown[who, task].presentation
        if what == "skip":
            claims.skip(self.store, person.account, token, "other")
        else:
            claims.flag(self.store, person.account, token, what)
        passed = self.reference.passed.setdefault((who, task), set())
        if what == "skip" or not passed & set(FLAGS_TO_HOLD):  # one flag per person and task
            passed.add(what)
        self.reference.leases.pop((who, task), None)
        self.claim(who)  # it must not come back

    @rule(who=PERSON)
    def go_back(self, who: str) -> None:
        """The last thing judged comes back with its latest answer."""
        found = claims.reopen(self.store, self.people[who].account, lease_seconds=LEASE)
        mine = [task for name, task in self.reference.judged if name == who]
        assert (found is None) == (not mine)
        if found is not None:
            task = mine[-1]
            answer = self.reference.judged[who, task][-1]
            assert {(c.best, c.worst) for c in found.verdict.choices} == {answer}
            assert found.judgment_id == self.keys[who, task][3].judgment_id

    @invariant()
    def the_store_says_what_the_reference_says(self) -> None:
        for task in rows(self.store, schema.task):
            assert task.num_judgments == self.reference.counted(task.id) <= task.need_n
            assert task.state == self.reference.state(task.id), task.id
        kept = sum(len(revisions) for revisions in self.reference.judged.values())
        with self.store.read() as connection:
            number = connection.execute(
                sa.select(sa.func.count()).select_from(schema.judgment)
            ).scalar_one()
        assert number == kept, "nothing is lost and nothing is stored twice"

    def task_of(self, view: claims.TaskView) -> int:
        with self.store.read() as connection:
            query = sa.select(schema.presentation.c.task_id).where(
                schema.presentation.c.token == view.presentation
            )
            return int(connection.execute(query).scalar_one())


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, clip_files: list[Path]) -> Path:
    """A project with the tasks and people of the model, to copy."""
    folder = tmp_path_factory.mktemp("model")
    with Store.open(folder) as store:
        ids = store.add_clips(records(clip_files)[:4])
        for number, need in NEEDS.items():
            store.create_tasks([ids], need=need, priority=int(number == 3), presentation=SMALL)
        for name in PEOPLE:
            store.add_user(name, PASSWORD)
    return folder


def agrees(template: Path, *, examples: int, steps: int, quick: bool) -> Counter[str]:
    return explore(Claims, examples=examples, steps=steps, quick=quick, template=template)


def test_any_order_of_actions_agrees_with_the_reference(template):
    reached = agrees(template, examples=16, steps=25, quick=True)
    assert reached.keys() == {"judged", "surplus", "revised", "passed on"}, reached


@pytest.mark.slow
def test_more_examples_agree_with_the_reference(template):
    reached = agrees(template, examples=150, steps=40, quick=False)
    assert reached.keys() == {"judged", "surplus", "revised", "passed on"}, reached

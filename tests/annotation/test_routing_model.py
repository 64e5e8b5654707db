"""Work, hidden gold tasks, contradictions and experts in any order, on both databases, against a reference in plain Python."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from annotation import claims, schema
from annotation.place import Place, write_place
from annotation.records import TaskView
from annotation.routing import RoutingConfig
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
    slots,
)
from tests.annotation.state_machines import explore

PEOPLE, EXPERTS = ["ann0", "ann1", "ann2", "ann3"], {"ann2", "ann3"}
NEED = 2
WORK = [2, 1]
"""Tasks in the order they are given out: the second is more urgent."""
GOLD = {3, 4}
ANSWERS = [(1, 2), (2, 1), (1, 3)]
"""(best, worst) clip; the first two contradict each other."""
KNOWN = {"motion_quality": {"best": 0, "worst": 1}}
PERSON, PLACE, ANSWER = st.sampled_from(PEOPLE), st.integers(0, 8), st.sampled_from(ANSWERS)
Answer = tuple[int, int]


@dataclass
class Said:
    """One person's answers to one task: the latest revision is the last."""

    purpose: str
    surplus: bool
    revisions: list[tuple[Answer, int]]
    """With the id of each judgment."""
    showing: TaskView


@dataclass
class Reference:
    """What must be true."""

    leases: dict[tuple[str, int], tuple[float, str]] = field(default_factory=dict)
    """(who, task) -> when it ends, and what for."""
    said: dict[tuple[str, int], Said] = field(default_factory=dict)

    def of(self, task: int, purpose: str) -> list[Said]:
        return [s for (_, t), s in self.said.items() if t == task and s.purpose == purpose]

    def counted(self, task: int) -> int:
        return sum(not said.surplus for said in self.of(task, "work"))

    def state(self, task: int) -> str:
        if task in GOLD or self.counted(task) < NEED:
            return "open"
        latest = [said.revisions[-1][0] for said in self.of(task, "work")]
        torn = any(a[0] == b[1] or a[1] == b[0] for a, b in combinations(latest, 2))
        return "conflict" if torn and not self.of(task, "adjudication") else "done"

    def others(self, who: str, task: int, now: float) -> int:
        """Live leases of other people."""
        return sum(
            name != who and held == task and ends > now
            for (name, held), (ends, _) in self.leases.items()
        )

    def next_for(self, who: str, now: float, gold: bool) -> set[tuple[int, str] | None]:
        """What a claim may return."""
        held = {
            (task, purpose)
            for (name, task), (ends, purpose) in self.leases.items()
            if name == who and ends > now
            if self.state(task) == ("conflict" if purpose == "adjudication" else "open")
        }
        if held:
            return set(held)
        new = [task for task in WORK if (who, task) not in self.said]
        if who in EXPERTS:
            for task in new:
                if self.state(task) == "conflict" and not self.others(who, task, now):
                    return {(task, "adjudication")}
        for task in new:
            free = self.counted(task) + self.others(who, task, now) < NEED
            if self.state(task) == "open" and free:
                return {(task, "work"), *(self.golds(who) if gold else ())}
        return {None}

    def golds(self, who: str) -> set[tuple[int, str]]:
        """Those answered least often, of what this person has not answered."""
        times = {
            task: sum(len(said.revisions) for said in self.of(task, "gold"))
            for task in GOLD
            if (who, task) not in self.said
        }
        return {(task, "gold") for task, n in times.items() if n == min(times.values())}


class Routing(RuleBasedStateMachine):
    """Four people, two of them experts, two tasks for two people each and two whose answer is known."""

    copy: Callable[[Path], None]
    reached: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="routing-"))
        type(self).copy(self.folder)
        self.clock = Clock()
        self.store = Store.open(self.folder, now=self.clock)
        self.reference = Reference()
        self.shown: list[tuple[str, int, str, TaskView]] = []
        self.keys = 0

    def teardown(self) -> None:
        for said in self.reference.said.values():
            self.reached.update([said.purpose])
            self.reached.update(["surplus"] * said.surplus)
            self.reached.update(["revised"] * (len(said.revisions) > 1))
        self.store.close()
        shutil.rmtree(self.folder)

    def person(self, who: str, *, gold: bool = False) -> Person:
        routing = RoutingConfig(adjudicate=True, gold_rate=0.5 if gold else 0.0)
        return Person(self.store, who, routing)

    @rule(who=PERSON, gold=st.booleans())
    def claim(self, who: str, gold: bool) -> None:
        expected = self.reference.next_for(who, self.clock.seconds, gold)
        view = self.person(who, gold=gold).claim()
        if view is None:
            assert expected == {None}
            return
        row = next(r for r in rows(self.store, schema.presentation) if r.token == view.presentation)
        assert (row.task_id, row.purpose) in expected
        assert view.purpose == ("adjudication" if row.purpose == "adjudication" else "work")
        assert bool(view.opinions) == (row.purpose == "adjudication")
        ends = self.clock.seconds + LEASE
        self.reference.leases[who, row.task_id] = (ends, row.purpose)
        if all(view.presentation != known.presentation for *_, known in self.shown):
            self.shown.append((who, row.task_id, row.purpose, view))

    @rule(seconds=st.sampled_from([1, LEASE + 1]))
    def time_passes(self, seconds: float) -> None:
        self.clock.seconds += seconds

    def send(self, who: str, view: TaskView, answer: Answer, **options: Any) -> claims.Receipt:
        place = slots(self.store, view)
        best, worst = (place[self.clips[clip]] for clip in answer)
        self.keys += 1
        key = f"key-number-{self.keys}"
        return self.person(who).submit(view, plain_verdict(view, best, worst), key=key, **options)

    @property
    def clips(self) -> dict[int, int]:
        """Number of a clip in `ANSWERS` -> its id."""
        ids = sorted({row.clip_id for row in rows(self.store, schema.task_clip)})
        return dict(enumerate(ids, 1))

    @precondition(lambda self: self.shown)
    @rule(place=PLACE, answer=ANSWER)
    def submit(self, place: int, answer: Answer) -> None:
        """Whatever was shown may be answered, however late."""
        who, task, purpose, view = self.shown[place % len(self.shown)]
        if (who, task) in self.reference.said:
            with pytest.raises(claims.Conflict, match="already judged"):
                self.send(who, view, answer)
            return
        surplus = (purpose == "work" and self.reference.counted(task) >= NEED) or (
            purpose == "adjudication" and self.reference.state(task) != "conflict"
        )
        receipt = self.send(who, view, answer)
        assert receipt.surplus == surplus
        said = Said(purpose, surplus, [(answer, receipt.judgment_id)], view)
        self.reference.said[who, task] = said
        self.reference.leases.pop((who, task), None)

    @rule(who=PERSON, gold=st.booleans(), answer=ANSWER)
    def judge(self, who: str, gold: bool, answer: Answer) -> None:
        """Claims and answers at once, as people mostly do."""
        self.claim(who, gold)
        mine = [place for place, (name, *_) in enumerate(self.shown) if name == who]
        if mine:
            self.submit(mine[-1], answer)

    @precondition(lambda self: self.reference.said)
    @rule(place=PLACE, answer=ANSWER)
    def revise(self, place: int, answer: Answer) -> None:
        """Who thinks again may end a conflict, or make one."""
        (who, task), said = list(self.reference.said.items())[place % len(self.reference.said)]
        receipt = self.send(who, said.showing, answer, revises=said.revisions[-1][1])
        assert (receipt.revision, receipt.surplus) == (len(said.revisions), said.surplus)
        said.revisions.append((answer, receipt.judgment_id))
        self.reference.leases.pop((who, task), None)

    @invariant()
    def the_store_says_what_the_reference_says(self) -> None:
        for task in rows(self.store, schema.task):
            assert task.state == self.reference.state(task.id), task.id
            assert task.num_judgments == self.reference.counted(task.id)
        stored = {row.id: row.purpose for row in rows(self.store, schema.judgment)}
        kept = {
            number: said.purpose
            for said in self.reference.said.values()
            for _, number in said.revisions
        }
        assert stored == kept, "nothing is lost, and nothing is stored twice or as something else"


def fill(folder: Path, clip_files: list[Path]) -> None:
    with Store.open(folder) as store:
        ids = store.add_clips(records(clip_files)[:4])
        for task in sorted(WORK):
            priority = int(task == WORK[0])
            store.create_tasks([ids], need=NEED, priority=priority, presentation=SMALL)
        store.create_tasks(
            [ids] * len(GOLD), purpose="gold", answers=[KNOWN] * len(GOLD), presentation=SMALL
        )
        for name in PEOPLE:
            store.add_user(name, PASSWORD)
        for name in EXPERTS:
            store.set_expert(name, True)


@pytest.fixture
def copy(
    database: str, clip_files: list[Path], tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[[Path], None]:
    """Makes a project with the tasks and people of the model in an empty folder."""
    if database == "sqlite":
        fill(tmp_path / "model", clip_files)
        return lambda folder: shutil.copytree(tmp_path / "model", folder, dirs_exist_ok=True)
    cluster = request.getfixturevalue("postgres")
    template = cluster.new_database(request.getfixturevalue("migrated"))
    write_place(tmp_path / "model", Place(database=template))
    fill(tmp_path / "model", clip_files)
    name = template.partition("@/")[2].partition("?")[0]
    return lambda folder: write_place(folder, Place(database=cluster.new_database(name)))


@pytest.mark.parametrize(
    ("examples", "steps"), [(20, 30), pytest.param(100, 50, marks=pytest.mark.slow)]
)
def test_experts_and_gold_tasks_in_any_order_agree_with_the_reference(copy, examples, steps):
    quick = examples < 100
    reached = explore(Routing, examples=examples, steps=steps, quick=quick, copy=staticmethod(copy))
    # answers that come too late to count are the other model's; the short run of this one meets none
    assert reached.keys() - {"surplus"} == {"work", "gold", "adjudication", "revised"}, reached

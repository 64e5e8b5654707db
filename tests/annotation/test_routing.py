"""Who gets what: priorities, hidden gold, re-tests, limits, practice, exam, adjudication."""

from __future__ import annotations

from collections import Counter

import pytest

from annotation import claims, schema
from annotation.exams import ExamConfig, gold_answers
from annotation.export import ExportQuery, export_preferences
from annotation.known import grade
from annotation.records import Choice, Verdict, read_preferences
from annotation.routing import RoutingConfig
from reelhf.errors import UserError
from tests.annotation.annotation_cases import SMALL, Person, plain_verdict, rows, slots, state_of

KNOWN = {
    "motion_quality": {"best": 0, "worst": 3, "why": "D freezes"},
    "aesthetic_quality": {"tie": True},
}


def answer_key(store, task, clip_ids, right: bool = True) -> Verdict:
    """The known answers of KNOWN in the order shown, or wrong ones."""
    place = slots(store, task)
    best, worst = place[clip_ids[0]], place[clip_ids[3]]
    if not right:
        best, worst = worst, best
    choices = []
    for name in task.dimensions:
        tie = name == "aesthetic_quality" and right
        choices.append(Choice(name, status="tie") if tie else Choice(name, best, worst))
    return Verdict(tuple(choices), seconds=3.0)


def test_the_highest_priority_comes_first(new_project):
    store = new_project(tasks=0)
    for priority in (0, 5, 1):
        store.create_tasks([[1, 2, 3, 4]], priority=priority, presentation=SMALL)
    ann = Person(store, "ann0")
    for _ in range(3):
        ann.judge()
    assert [j.task_id for j in rows(store, schema.judgment)] == [2, 3, 1]


def test_gold_hides_among_work_rotates_and_is_graded(new_project, tmp_path):
    store = new_project(tasks=12, need=2)
    golds = store.create_tasks(
        [[1, 2, 3, 4]] * 2, purpose="gold", answers=[KNOWN] * 2, presentation=SMALL
    )
    routing = RoutingConfig(gold_rate=0.5)
    right, wrong = Person(store, "ann0", routing), Person(store, "ann1", routing)
    for person in (right, wrong):
        while (task := person.claim()) is not None:
            assert task.purpose == "work", "nobody can tell"
            known = set(slots(store, task)) == {1, 2, 3, 4}
            person.submit(
                task, answer_key(store, task, [1, 2, 3, 4], person is right) if known else None
            )
    shown = Counter(j.task_id for j in rows(store, schema.judgment) if j.purpose == "gold")
    assert set(shown) <= set(golds)
    assert max(shown.values()) <= 2, "once per annotator"
    accuracy = gold_answers(store)
    if right.account.pseudonym in accuracy:
        assert set(accuracy[right.account.pseudonym]) == {True}
    if wrong.account.pseudonym in accuracy:
        assert set(accuracy[wrong.account.pseudonym]) == {False}
    assert accuracy, "24 claims at a rate of one half"
    data = read_preferences(export_preferences(store, tmp_path / "out"))
    taught = {p["task_id"] for p in data.preferences}
    assert taught.isdisjoint(f"t{task}" for task in golds)
    assert {j["purpose"] for j in data.judgments} == {"work", "gold"}, "no vote is lost"
    assert store.counts()["open_tasks"] == len(golds), "gold tasks never finish"


def test_a_retest_comes_later_in_a_new_showing_and_counts_once_in_preferences(
    new_project, clock, tmp_path
):
    store = new_project(tasks=2)
    ann = Person(store, "ann0", RoutingConfig(retest_rate=0.5, retest_after_hours=1))
    first = ann.claim()
    ann.submit(first)
    store.create_tasks([[5, 6, 7, 8]] * 40, presentation=SMALL)
    for _ in range(5):
        ann.judge()
    assert {j.purpose for j in rows(store, schema.judgment)} == {"work"}, "not yet"
    clock.seconds += 3601
    for _ in range(30):
        ann.judge()
    again = [j for j in rows(store, schema.judgment) if j.purpose == "retest"]
    assert again, "30 claims at a rate of one half"
    assert {(j.repeat, j.revision) for j in again} == {(1, 0)}
    assert len({j.task_id for j in again}) == len(again), "each at most once"
    tasks = {task.id: task for task in rows(store, schema.task)}
    assert all(tasks[j.task_id].num_judgments == 1 for j in again), "overlap is not touched"
    orders = {p.id: p for p in rows(store, schema.presentation)}
    assert all(orders[j.presentation_id].purpose == "retest" for j in again)
    data = read_preferences(export_preferences(store, tmp_path / "out"))
    work = [j for j in rows(store, schema.judgment) if j.purpose == "work"]
    assert len(data.preferences) == 4 * len(work)


def test_limits_per_day_and_in_all(new_project, clock):
    store = new_project(tasks=6)
    routing = RoutingConfig(max_per_day=2, max_total=3)
    ann = Person(store, "ann0", routing)
    ann.judge(), ann.judge()
    assert ann.claim() is None
    assert claims.reason_for_nothing(store, ann.account, routing) == "daily_limit"
    last = claims.reopen(store, ann.account, lease_seconds=60)
    ann.submit(last.task, last.verdict, revises=last.judgment_id)  # a change is no new judgment
    clock.seconds += 86_400
    ann.judge()
    assert ann.claim() is None
    assert claims.reason_for_nothing(store, ann.account, routing) == "total_limit"
    other = Person(store, "ann1", routing)
    assert other.claim() is not None


def test_practice_gives_feedback_once_then_real_work_comes(new_project):
    store = new_project(tasks=1)
    store.create_tasks([[5, 6, 7, 8]], purpose="practice", answers=[KNOWN], presentation=SMALL)
    ann = Person(store, "ann0")
    task = ann.claim()
    assert task.purpose == "practice"
    with pytest.raises(claims.Refused, match="practice cannot be skipped"):
        claims.skip(store, ann.account, task.presentation, "other")
    receipt = ann.submit(task, answer_key(store, task, [5, 6, 7, 8]))
    feedback = {one.dimension: one for one in receipt.feedback}
    assert {name: one.correct for name, one in feedback.items()} == dict.fromkeys(KNOWN, True)
    assert feedback["motion_quality"].best == slots(store, task)[5]
    assert feedback["motion_quality"].why == {"en": "D freezes"}
    with pytest.raises(claims.Conflict, match="in the practice cannot be changed"):
        ann.submit(task, revises=receipt.judgment_id)
    assert claims.reopen(store, ann.account, lease_seconds=60) is None
    work = ann.claim()
    assert work.purpose == "work"
    assert ann.submit(work).feedback == ()
    assert claims.progress(store, ann.account, wanted=None).judged == 1, "practice is not work"


def test_the_entry_exam_must_be_passed_and_can_be_tried_again(new_project):
    store = new_project(tasks=1)
    store.create_tasks([[5, 6, 7, 8]] * 2, purpose="exam", answers=[KNOWN] * 2, presentation=SMALL)
    ann = Person(store, "ann0", RoutingConfig(exam=ExamConfig(threshold=0.75, attempts=2)))

    def attempt(rights: list[bool]):
        for right in rights:
            task = ann.claim()
            assert task.purpose == "exam"
            receipt = ann.submit(task, answer_key(store, task, [5, 6, 7, 8], right))
            assert receipt.feedback == (), "an exam gives nothing away"
        return receipt.exam

    failed = attempt([True, False])
    assert (failed.passed, failed.correct, failed.asked, failed.attempts_left) == (False, 2, 4, 1)
    passed = attempt([True, True])
    assert (passed.passed, passed.correct) == (True, 4)
    assert ann.claim().purpose == "work"
    assert [(e.attempt, e.passed) for e in rows(store, schema.exam)] == [(0, False), (1, True)]

    out = Person(store, "ann1", RoutingConfig(exam=ExamConfig(threshold=0.75, attempts=1)))
    ann = out
    assert attempt([False, False]).attempts_left == 0
    assert out.claim() is None
    assert claims.reason_for_nothing(store, out.account, out.routing) == "exam_failed"


def test_a_contradiction_goes_to_an_expert_who_sees_the_opinions_and_decides(new_project, tmp_path):
    store = new_project(tasks=1, need=2, annotators=4)
    routing = RoutingConfig(adjudicate=True)
    one, two, expert = (Person(store, f"ann{i}", routing) for i in range(3))
    store.set_expert("ann2", True)
    clip = {}
    for person, (best, worst) in ((one, (1, 2)), (two, (2, 1))):
        task = person.claim()
        place = slots(store, task)
        person.submit(task, plain_verdict(task, place[best], place[worst]))
        clip[person.name] = (best, worst)
    assert state_of(store, 1) == "conflict"
    assert Person(store, "ann3", routing).claim() is None, "not an expert"
    store.set_expert("ann3", True)

    task = expert.claim()
    assert task.purpose == "adjudication"
    place = slots(store, task)
    said = {(o["best"], o["worst"]) for o in task.opinions["motion_quality"]}
    assert said == {(place[1], place[2]), (place[2], place[1])}
    assert "annotator" not in str(task.opinions)
    assert Person(store, "ann3", routing).claim() is None, "one expert at a time"
    blind = Person(store, "ann2", RoutingConfig(adjudicate=True, show_opinions=False)).claim()
    assert blind.opinions == {}

    expert.submit(task, plain_verdict(task, place[1], place[2]))
    assert state_of(store, 1) == "done"
    assert store.counts()["judgments"] == 3
    found = claims.reopen(store, two.account, lease_seconds=60)
    two.submit(found.task, found.verdict, revises=found.judgment_id)
    assert state_of(store, 1) == "done", "what was decided stays decided"

    both = read_preferences(export_preferences(store, tmp_path / "a"))
    only = read_preferences(
        export_preferences(store, tmp_path / "b", ExportQuery(adjudicated_only=True))
    )
    assert (len(both.preferences), len(only.preferences)) == (12, 4)
    assert {p["annotator"] for p in only.preferences} == {expert.account.pseudonym}
    assert len(only.judgments) == len(both.judgments) == 12, "no vote is lost"


def test_agreeing_annotators_need_no_expert_and_a_revision_can_end_a_conflict(new_project):
    store = new_project(tasks=2, need=2)
    routing = RoutingConfig(adjudicate=True)
    one, two = Person(store, "ann0", routing), Person(store, "ann1", routing)
    for person, pairs in ((one, ((1, 2), (5, 6))), (two, ((1, 2), (6, 5)))):
        for best, worst in pairs:
            task = person.claim()
            place = slots(store, task)
            person.submit(task, plain_verdict(task, place[best], place[worst]))
    assert [state_of(store, i) for i in (1, 2)] == ["done", "conflict"]
    found = claims.reopen(store, two.account, lease_seconds=60)
    place = slots(store, found.task)
    two.submit(found.task, plain_verdict(found.task, place[5], place[6]), revises=found.judgment_id)
    assert state_of(store, 2) == "done"


def test_known_answers_are_checked(new_project):
    store = new_project(tasks=0)
    for answers, words in (
        ({"motion_quality": {"best": 4}}, "task 0: motion_quality: best is 4"),
        ({"beauty": {"best": 0}}, "no dimension 'beauty' is asked"),
        ({"motion_quality": {}}, "state best, worst, tie or scores"),
        ({"motion_quality": {"scores": [1, 2]}}, "scores are 4 numbers"),
        ({}, "no answer is stated"),
    ):
        with pytest.raises(UserError, match=words):
            store.create_tasks(
                [[1, 2, 3, 4]], purpose="gold", answers=[answers], presentation=SMALL
            )
    with pytest.raises(UserError, match="a task for exam needs a known answer"):
        store.create_tasks([[1, 2]], purpose="exam", presentation=SMALL)
    with pytest.raises(UserError, match="a task for work has no known answer"):
        store.create_tasks([[1, 2]], answers=[KNOWN], presentation=SMALL)


def test_grading_uses_the_free_pick_and_tolerates_a_neighbouring_score():
    vetoed = Choice("motion_quality", 1, 2, first_best=0, first_worst=3, constrained=True)
    (graded,) = grade({"motion_quality": {"best": 10, "worst": 13}}, [vetoed], [10, 11, 12, 13])
    assert graded.correct
    known = {"motion_quality": {"scores": {"10": 5, "11": 2}}}
    near, far = Choice("motion_quality", scores=(4, 3)), Choice("motion_quality", scores=(3, 2))
    assert [grade(known, [c], [10, 11])[0].correct for c in (near, far)] == [True, False]
    assert not grade(
        {"motion_quality": {"best": 10}}, [Choice("motion_quality", status="tie")], [10]
    )[0].correct

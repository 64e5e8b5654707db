"""Pairs (good, same, bad), scores, expert tasks and the confirm question, from claim to export."""

from __future__ import annotations

from dataclasses import replace

import pytest

from annotation import claims, schema
from annotation.export import ExportQuery, export_preferences
from annotation.history import veto_rates
from annotation.records import Choice, Verdict, read_preferences
from annotation.rules import check_answers, settle
from annotation.store import Store
from reelhf.errors import UserError
from tests.annotation.annotation_cases import SMALL, Person, plain_verdict, rows, slots

DIMS = ("motion_quality", "aesthetic_quality")


def exported(store: Store, out):
    return read_preferences(export_preferences(store, out, ExportQuery(include_implied=True)))


def test_a_pair_is_good_same_or_bad_and_exports_as_one_row_per_dimension(new_project, tmp_path):
    store = new_project(tasks=0)
    store.create_tasks([[1, 2]], kind="gsb", presentation=SMALL)
    ann = Person(store, "ann0")
    task = ann.claim()
    assert (task.kind, task.num_clips) == ("gsb", 2)
    place = slots(store, task)
    good, bad = place[1], place[2]
    answers = [
        Choice(task.dimensions[0], good, bad),
        Choice(task.dimensions[1], status="tie"),
        Choice(task.dimensions[2], bad, good),
        Choice(task.dimensions[3], status="cannot_judge"),
    ]
    ann.submit(task, Verdict(tuple(answers)))
    data = exported(store, tmp_path / "out")
    assert {j["kind"] for j in data.judgments} == {"gsb"}
    wins = {p["dimension"]: p for p in data.preferences}
    assert len(data.preferences) == len(wins) == 3
    assert wins[task.dimensions[1]]["preference"] == 0
    sha = {c.id: c.sha256 for c in rows(store, schema.clip)}
    for dimension, winner in ((task.dimensions[0], sha[1]), (task.dimensions[2], sha[2])):
        row = wins[dimension]
        assert winner == (row["clip_a"] if row["preference"] == 1 else row["clip_b"])
        assert row["kind"] == "explicit"
        assert not row["admissible"], "the two dimensions contradict each other"
    assert wins[task.dimensions[1]]["admissible"]


def test_scores_give_every_pair_and_the_best_and_worst_they_imply(new_project, tmp_path):
    store = new_project(tasks=0)
    store.create_tasks([[1, 2, 3, 4]], kind="score", presentation=SMALL)
    ann = Person(store, "ann0")
    task = ann.claim()
    given = {0: (5, 3, 3, 1), 1: (4, 4, 4, 4), 2: (5, 5, 2, 1)}
    answers = [
        Choice(name, scores=given[i]) if i in given else Choice(name, status="cannot_judge")
        for i, name in enumerate(task.dimensions)
    ]
    ann.submit(task, Verdict(tuple(answers), seconds=9.0))
    data = exported(store, tmp_path / "out")
    said = {j["dimension"]: j for j in data.judgments}
    first, equal, shared, none = (said[name] for name in task.dimensions)
    assert (first["best"], first["worst"], first["scores"]) == (0, 3, [5, 3, 3, 1])
    assert first["shown_at"] is not None
    assert (equal["tie"], equal["status"]) == (True, "tie")
    assert (shared["best"], shared["worst"], shared["status"]) == (None, None, "ok")
    assert (none["status"], none["scores"]) == ("cannot_judge", None)
    count = {name: sum(p["dimension"] == name for p in data.preferences) for name in said}
    assert [count[name] for name in task.dimensions] == [6, 6, 6, 0]
    explicit = [p["dimension"] for p in data.preferences if p["kind"] == "explicit"]
    assert explicit == [task.dimensions[0]]


def test_a_single_clip_can_be_scored_but_not_compared(new_project):
    store = new_project(tasks=0)
    store.create_tasks([[1]], kind="score", presentation=SMALL)
    ann = Person(store, "ann0")
    task = ann.claim()
    ann.submit(task, Verdict(tuple(Choice(d, scores=(3,)) for d in task.dimensions)))
    assert {c.status for c in rows(store, schema.choice)} == {"ok"}
    for kind, group, words in (
        ("gsb", [1, 2, 3], "task 0 has 3 clips; a pair needs 2"),
        ("best_worst", [1], "task 0 has 1 clips; best and worst need 2 to 8"),
        ("duel", [1, 2], "kind is 'duel'; expected one of best_worst, gsb, score"),
    ):
        with pytest.raises(UserError, match=words):
            store.create_tasks([group], kind=kind, presentation=SMALL)


@pytest.mark.parametrize(
    ("kind", "choice", "words"),
    [
        ("gsb", Choice("motion_quality", 0, 1, scores=(1, 2)), "takes no scores"),
        ("gsb", Choice("motion_quality", status="no_valid_pair"), "nothing is vetoed"),
        ("gsb", Choice("motion_quality"), "best and worst are missing"),
        ("score", Choice("motion_quality", scores=(1,)), "a score for each of the 2 clips"),
        ("score", Choice("motion_quality", scores=(1, 6)), "a score is 1 to 5"),
        ("score", Choice("motion_quality", 0, 1), "takes scores, no best or worst"),
        ("score", Choice("motion_quality", status="tie"), "is not one of ok, cannot_judge"),
        ("best_worst", Choice("motion_quality", 0, 1, scores=(1, 2)), "takes no scores"),
    ],
)
def test_answers_that_do_not_fit_the_kind_are_named(kind, choice, words):
    problems = check_answers(kind, [choice], dimensions=["motion_quality"], num_clips=2)
    assert len(problems) == 1
    assert words in problems[0]


def test_eight_clips_can_be_judged(new_project):
    store = new_project(tasks=0)
    store.create_tasks([list(range(1, 9))], presentation=SMALL)
    ann = Person(store, "ann0")
    task = ann.claim()
    assert [clip.letter for clip in task.clips] == list("ABCDEFGH")
    ann.submit(task, plain_verdict(task, 7, 6))
    assert {(c.best, c.worst) for c in rows(store, schema.choice)} == {(7, 6)}


def test_only_experts_get_what_is_for_experts(new_project):
    store = new_project(tasks=0)
    store.create_tasks([[1, 2, 3]], kind="score", experts_only=True, presentation=SMALL)
    ann = Person(store, "ann0")
    assert ann.claim() is None
    assert claims.progress(store, ann.account, wanted=None).wanted == 0
    store.set_expert("ann0", True)
    assert claims.progress(store, ann.account, wanted=None).wanted == 1
    assert ann.claim().kind == "score"


def test_a_pair_that_is_worse_elsewhere_is_kept_and_not_admissible(new_project, tmp_path):
    store = new_project(tasks=1)
    ann = Person(store, "ann0")
    task = ann.claim()
    choices = list(plain_verdict(task).choices)
    choices[0] = replace(choices[0], confirmed=False)
    choices[1] = replace(choices[1], confirmed=True)
    ann.submit(task, Verdict(tuple(choices), language="zh"))
    data = exported(store, tmp_path / "out")
    said = {j["dimension"]: (j["confirmed"], j["admissible"]) for j in data.judgments}
    assert [said[d] for d in task.dimensions] == [
        (False, False),
        (True, True),
        (None, True),
        (None, True),
    ]
    assert {p["admissible"] for p in data.preferences if p["dimension"] == task.dimensions[0]} == {
        False
    }
    assert rows(store, schema.judgment)[0].language == "zh"


def test_free_picks_that_clash_are_counted_per_pair_of_dimensions(new_project):
    store = new_project(tasks=2)
    ann = Person(store, "ann0")
    for vetoed in (True, False):
        task = ann.claim()
        choices = {c.dimension: c for c in plain_verdict(task).choices}
        if vetoed:
            name = "motion_quality"
            choices[name] = Choice(name, 0, 2, first_best=1, first_worst=2, constrained=True)
        ann.submit(task, Verdict(tuple(choices.values())))
    rates = veto_rates(store)
    assert len(rates) == 6
    assert all(
        rate == ((1, 2) if "motion_quality" in pair else (0, 2)) for pair, rate in rates.items()
    )


def test_settled_scores_keep_what_was_said():
    choices = [Choice(DIMS[0], scores=(5, 1)), Choice(DIMS[1], scores=(1, 5))]
    settled = settle("score", choices)
    assert [(c.best, c.worst, admissible) for c, admissible in settled] == [
        (0, 1, False),
        (1, 0, False),
    ]
    assert [c.scores for c, _ in settled] == [(5, 1), (1, 5)]

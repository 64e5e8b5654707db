"""Taking an answer back: a new revision, the old one kept, the latest one exported."""

from __future__ import annotations

from dataclasses import replace

import pytest

from annotation import claims, schema
from annotation.export import export_preferences
from annotation.records import read_preferences
from tests.annotation.annotation_cases import LEASE, Person, plain_verdict, rows, state_of


def back(person: Person, before: int | None = None) -> claims.Reopened | None:
    return claims.reopen(person.store, person.account, before=before, lease_seconds=LEASE)


def test_the_last_answer_comes_back_as_it_was_shown_and_a_new_one_replaces_it(
    new_project, tmp_path
):
    store = new_project(tasks=2)
    ann = Person(store, "ann0")
    task = ann.claim()
    first = ann.submit(task, replace(plain_verdict(task), note="hasty", watched_seconds=(1.0,) * 4))
    held = ann.claim()

    found = back(ann)
    assert replace(found.task, lease_seconds=task.lease_seconds) == task, "same clips, same order"
    assert found.judgment_id == first.judgment_id
    assert found.verdict.note == "hasty"
    assert [(c.best, c.worst) for c in found.verdict.choices] == [(0, 1)] * 4

    second = ann.submit(task, plain_verdict(task, 2, 3), revises=first.judgment_id)
    assert (second.revision, second.surplus) == (1, False)
    kept = rows(store, schema.judgment)
    assert [(j.revision, j.supersedes) for j in kept] == [(0, None), (1, first.judgment_id)]
    assert len(rows(store, schema.choice)) == 8, "what was said first stays on record"
    counts = store.counts()
    assert (counts["judgments"], counts["revisions"], counts["open_tasks"]) == (1, 1, 1)
    assert claims.progress(store, ann.account, wanted=None).judged == 1
    assert ann.claim() == held, "the task in hand is still theirs"

    data = read_preferences(export_preferences(store, tmp_path / "out"))
    assert {(j["best"], j["worst"], j["revision"]) for j in data.judgments} == {(2, 3, 1)}
    assert len(data.preferences) == 4


def test_one_can_go_back_further_and_each_judgment_is_found_once(new_project):
    store = new_project(tasks=3)
    ann = Person(store, "ann0")
    ids = [ann.judge().judgment_id for _ in range(3)]
    latest = back(ann)
    changed = ann.submit(latest.task, latest.verdict, revises=latest.judgment_id)
    found, before = [], None
    while (one := back(ann, before)) is not None:
        found.append(one.judgment_id)
        before = one.root
    assert found == [changed.judgment_id, ids[1], ids[0]]
    assert back(Person(store, "ann1")) is None, "only one's own"


def test_a_revision_is_stored_once_and_only_of_the_latest_answer(new_project):
    store = new_project(tasks=1)
    ann = Person(store, "ann0")
    task = ann.claim()
    first = ann.submit(task)
    revised = ann.submit(
        task, plain_verdict(task, 1, 0), key="revision-1", revises=first.judgment_id
    )
    again = ann.submit(task, plain_verdict(task, 1, 0), key="revision-1", revises=first.judgment_id)
    assert again == revised
    with pytest.raises(claims.Conflict, match="changed meanwhile, perhaps in another tab"):
        ann.submit(task, plain_verdict(task, 2, 0), revises=first.judgment_id)
    with pytest.raises(claims.Conflict, match="already judged"):
        ann.submit(task, plain_verdict(task, 2, 0))
    with pytest.raises(claims.NotFound):
        Person(store, "ann1").submit(task, revises=revised.judgment_id)
    third = ann.submit(task, plain_verdict(task, 2, 0), revises=revised.judgment_id)
    assert third.revision == 2
    assert store.counts()["judgments"] == 1


def test_a_revision_of_a_surplus_answer_stays_surplus_and_overlap_holds(new_project, clock):
    store = new_project(tasks=1)
    late, quick = Person(store, "ann0"), Person(store, "ann1")
    task = late.claim()
    clock.seconds += LEASE + 1
    quick.judge()
    kept = late.submit(task)
    assert kept.surplus
    assert late.submit(task, plain_verdict(task, 2, 1), revises=kept.judgment_id).surplus
    assert state_of(store, 1) == "done"
    assert rows(store, schema.task)[0].num_judgments == 1

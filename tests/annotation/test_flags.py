"""Flags hold a task; someone decides; the decision stays on record."""

from __future__ import annotations

import pytest

from annotation import claims, flags, schema
from tests.annotation.annotation_cases import PASSWORD, Person, rows, state_of


def report(person: Person, kind: str, note: str = "") -> None:
    task = person.claim()
    claims.flag(person.store, person.account, task.presentation, kind, note)


@pytest.mark.parametrize(
    ("kind", "people"), [("unsafe", 1), ("broken", 1), ("ambiguous_prompt", 2)]
)
def test_enough_flags_hold_a_task(new_project, kind, people):
    store = new_project(tasks=1, annotators=3)
    for index in range(people):
        assert state_of(store, 1) == "open"
        report(Person(store, f"ann{index}"), kind)
        assert Person(store, f"ann{index}").claim() is None, "whoever flagged it is done with it"
    assert state_of(store, 1) == "flagged"
    assert Person(store, "ann2").claim() is None


def test_the_queue_says_who_reported_what_and_a_ruling_puts_the_task_back_or_away(
    new_project, clock
):
    store = new_project(tasks=2, annotators=4)
    boss = store.add_user("boss", PASSWORD, role="admin")
    ann = Person(store, "ann0")
    report(ann, "unsafe", "<b>look</b>")
    (held,) = flags.held_tasks(store)
    assert (held.task_id, held.num_judgments) == (1, 0)
    (said,) = held.reports
    assert (said["what"], said["note"]) == ("unsafe", "<b>look</b>")
    assert said["pseudonym"] == ann.account.pseudonym
    order = rows(store, schema.presentation)[0].clip_order
    assert [order["ABCD".index(letter)] for letter in said["letters"]] == [1, 2, 3, 4]
    assert flags.held_media(store, 1, 3) == rows(store, schema.task_clip)[3].shown_key
    for task_id, position in ((1, 4), (1, -1), (2, 0), (3, 0)):  # no first frame, not flagged
        with pytest.raises(claims.NotFound):
            flags.held_media(store, task_id, position)
    with pytest.raises(claims.NotFound):
        flags.decide(store, ann.account, 1, "reopen")
    with pytest.raises(claims.Refused, match="decision 'burn' is not one of reopen, remove"):
        flags.decide(store, boss, 1, "burn")

    clock.seconds += 10
    flags.decide(store, boss, 1, "reopen", "it is a fish")
    assert state_of(store, 1) == "open"
    assert Person(store, "ann1").claim() is not None
    clock.seconds += 10
    report(Person(store, "ann1"), "ambiguous_prompt")
    assert state_of(store, 1) == "open", "the flag before the ruling is settled"
    report(Person(store, "ann2"), "broken")
    (held,) = flags.held_tasks(store)
    assert [said["what"] for said in held.reports] == [
        "unsafe",
        "reopen",
        "ambiguous_prompt",
        "broken",
    ]
    flags.decide(store, boss, 1, "remove")
    assert state_of(store, 1) == "removed"
    assert [r.decision for r in rows(store, schema.ruling)] == ["reopen", "remove"]
    decided = [e for e in rows(store, schema.event) if e.action == "flag decide"]
    assert [(e.actor, e.subject, e.detail) for e in decided] == [
        (boss.pseudonym, "task 1", '{"decision": "reopen"}'),
        (boss.pseudonym, "task 1", '{"decision": "remove"}'),
    ]
    with pytest.raises(claims.NotFound, match="no such flagged task"):
        flags.decide(store, boss, 1, "reopen")


def test_an_expert_may_decide_too(new_project):
    store = new_project(tasks=1)
    report(Person(store, "ann0"), "unsafe")
    store.set_expert("ann1", True)
    flags.decide(store, Person(store, "ann1").account, 1, "remove")
    assert state_of(store, 1) == "removed"


def test_an_unknown_flag_is_refused(new_project):
    store = new_project(tasks=1)
    ann = Person(store, "ann0")
    task = ann.claim()
    with pytest.raises(claims.Refused, match="flag 'ugly' is not one of unsafe, broken"):
        claims.flag(store, ann.account, task.presentation, "ugly")
    assert rows(store, schema.flag) == []

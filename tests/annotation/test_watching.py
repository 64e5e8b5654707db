"""An answer counts only if the clips were before someone's eyes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fastapi.testclient import TestClient

from annotation import schema
from annotation.api.app import create_app
from annotation.refusals import Refused
from annotation.watching import unwatched
from tests.annotation.annotation_cases import PASSWORD, Person, plain_verdict, rows

FOUR_SECONDS = {"num_clips": 2, "clip_seconds": 4.0, "fraction": 0.9}


@pytest.mark.parametrize(
    ("watched", "elapsed", "problem"),
    [
        ((3.6, 4.0), 4.0, None),
        ((3.5, 8.0), 2.0, None),  # a frame less, at twice the speed
        ((3.4, 4.0), 4.0, "clip A was watched for 3.4 of 4.0 s; 90% are asked for"),
        ((4.0, None), 4.0, None),  # one does not play
        ((None, None), 4.0, "no clip played: flag the task as broken"),
        ((4.0,), 4.0, r"one number per clip \(2\), got 1"),
        ((), 4.0, r"one number per clip \(2\), got 0"),
        ((4.0, 4.0), 1.7, "1.7 s after the task was shown, before its clips could play"),
    ],
)
def test_what_was_watched_is_held_against_length_and_clock(watched, elapsed, problem):
    found = unwatched(watched, elapsed_seconds=elapsed, **FOUR_SECONDS)
    if problem is None:
        assert found == []
    else:
        with pytest.raises(Refused, match=problem):
            raise Refused(found)


def test_clips_shorter_than_the_slack_ask_for_nothing():
    asked = {"num_clips": 2, "clip_seconds": 0.1, "fraction": 1.0}
    assert unwatched((0.0, 0.0), elapsed_seconds=0.0, **asked) == []


def test_a_person_is_refused_until_the_clips_were_watched_and_a_program_is_not(new_project, clock):
    store = new_project(tasks=1, need=2)  # clips of 0.6 s
    ann = Person(store, "ann0")
    task = ann.claim()
    seen = replace(plain_verdict(task), watched_seconds=(0.6,) * 4)
    with pytest.raises(Refused, match="before its clips could play"):
        ann.submit(task, seen, must_watch=0.9)
    clock.seconds += 1
    with pytest.raises(Refused, match=r"clip C was watched for 0\.1 of 0\.6 s"):
        ann.submit(task, replace(seen, watched_seconds=(0.6, 0.6, 0.1, 0.6)), must_watch=0.9)
    assert rows(store, schema.judgment) == []
    first = ann.submit(task, seen, key="the first key", must_watch=0.9)
    again = ann.submit(task, seen, key="the first key", must_watch=1.0)
    assert again == first, "what is stored stays stored, whatever is asked for later"
    changed = plain_verdict(task, 1, 2)
    assert ann.submit(task, changed, revises=first.judgment_id, must_watch=0.9).revision == 1
    store.add_user("program", PASSWORD, simulated=True)
    program = Person(store, "program")
    program.submit(program.claim(), must_watch=0.9)


def test_the_api_asks_what_the_page_asks(new_project):
    store = new_project(tasks=1)
    with TestClient(create_app(store, page=False)) as client:
        client.post("/api/login", json={"name": "ann0", "password": PASSWORD})
        client.headers["X-CSRF-Token"] = client.get("/api/me").json()["csrf"]
        task = client.post("/api/claim", json={}).json()["task"]
        choices = [{"dimension": name, "best": 0, "worst": 1} for name in task["dimensions"]]
        body = {"presentation": task["presentation"], "idempotency_key": "key-0123"}
        refused = client.post("/api/submit", json={**body, "verdict": {"choices": choices}})
        assert refused.status_code == 422
        assert refused.json()["problems"] == [
            "watched_seconds needs one number per clip (4), got 0"
        ]

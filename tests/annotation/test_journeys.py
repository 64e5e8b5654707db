"""How often the hot path asks the database, and what becomes of statements that are sent together."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from annotation import claims, drafts
from annotation import schema as t
from tests.annotation.annotation_cases import counted, plain_verdict


def test_claims_submissions_drafts_and_heartbeats_take_few_statements(new_project):
    store = new_project(tasks=2)
    account = store.find_user("ann0")
    with counted(store) as claim:
        task = claims.claim(store, account, lease_seconds=60)
    with counted(store) as again:
        assert claims.claim(store, account, lease_seconds=60) == task
    with counted(store) as draft:
        drafts.save_draft(store, account, task.presentation, "half")
    with counted(store) as heartbeat:
        assert claims.heartbeat(store, account, task.presentation, lease_seconds=60)
    with counted(store) as submit:
        claims.submit(store, account, task.presentation, "key-journeys", plain_verdict(task))
    # claim: who I am, what I hold, the next task, what is shown of it; showing, links, lease
    assert claim == {"statements": 7, "transactions": 1}
    assert again == {"statements": 5, "transactions": 1}
    # submit: the showing, what was said before, the judgment; choices, the task's count, the draft, the lease
    assert submit == {"statements": 7, "transactions": 1}
    assert draft == heartbeat == {"statements": 1, "transactions": 1}


def test_a_draft_takes_the_place_of_the_one_before(new_project):
    store = new_project(tasks=1)
    account = store.find_user("ann0")
    task = claims.claim(store, account, lease_seconds=60)
    for body in ("one", "two"):
        drafts.save_draft(store, account, task.presentation, body)
        assert claims.claim(store, account, lease_seconds=60).draft == body


def test_what_fails_among_statements_sent_together_is_raised_and_nothing_is_stored(new_project):
    store = new_project(tasks=1)

    def add(*names: str) -> None:
        with store.write() as connection, store.database.together(connection):
            for name in names:
                project = {"name": name, "created_ms": 1}
                connection.execute(sa.insert(t.project).inline(), project)

    with pytest.raises(sa.exc.IntegrityError):
        add("other", "default")  # the second is there already
    with store.read() as connection:
        assert connection.execute(sa.select(t.project.c.name)).scalars().all() == ["default"]
    add("other")  # the connection is fit for use
    with store.glance() as connection:
        names = connection.execute(sa.select(t.project.c.name).order_by(t.project.c.name))
        assert names.scalars().all() == ["default", "other"]

"""Question texts: every version that was shown is kept, and none changes unseen."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from annotation import schema
from annotation.store import Store
from reelhf.errors import UserError
from tests.annotation.annotation_cases import Person, rows


def test_question_texts_cannot_change_under_one_version(tmp_path):
    with Store.open(tmp_path) as store:
        assert store.guideline_of(store.guideline.version) is store.guideline
        with store.write() as connection:
            connection.exec_driver_sql("UPDATE guideline SET questions = '{}'")
        with pytest.raises(UserError, match=r"give questions\.yaml a new version"):
            store.remember_guideline()


def test_a_task_is_shown_in_the_wording_it_was_claimed_with(new_project):
    store = new_project(tasks=1)
    texts = rows(store, schema.guideline)[0].questions
    texts["questions"]["motion_quality"]["label"] = "Movement"
    older = {"version": "older", "questions": texts, "created_ms": 0}
    ann = Person(store, "ann0")
    ann.claim()
    with store.write() as connection:
        connection.execute(sa.insert(schema.guideline).values(older))
        connection.execute(sa.update(schema.presentation).values(guideline_version="older"))
    task = ann.claim()
    assert task.guideline_version == "older"
    assert task.questions["motion_quality"].label == "Movement"
    assert task.questions["motion_quality"].translations["zh"]["label"] == "运动"
    ann.submit(task)
    assert rows(store, schema.judgment)[0].guideline_version == "older"

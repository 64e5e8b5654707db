"""Question texts: every version that was shown is kept, and none changes unseen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from annotation import projects, schema
from annotation.api.app import create_app
from annotation.api.server import running_server
from annotation.export import export_preferences
from annotation.records import load_guideline, read_preferences
from annotation.store import Store
from reelhf.cli import main
from reelhf.errors import UserError
from tests.annotation.annotation_cases import SMALL, UNWATCHED, Person, rows
from tests.annotation.browser_cases import press, sign_in, wait_for_text


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


OWN = """
version: ours-1
guide: {en: "Look at **motion** alone.", zh: "只看**运动**。"}
dimensions:
  motion_quality:
    label: Swing
    question: Which swings best?
    applies_to: [t2v, i2v]
"""


def own_questions(store: Store, tmp_path: Path, *, priority: int = 0) -> None:
    """Clips 1 to 4 once more, in a project of its own that asks one thing only."""
    (tmp_path / "ours.yaml").write_text(OWN, encoding="utf-8")
    store.remember_guideline(load_guideline(tmp_path / "ours.yaml"))
    projects.configure(
        store, "ours", retention_days=None, guideline_version="ours-1", actor="admin-1"
    )
    store.create_tasks([[1, 2, 3, 4]], project="ours", priority=priority, presentation=SMALL)


def test_each_project_is_asked_and_exported_by_its_own_version(new_project, tmp_path):
    store = new_project(tasks=1)
    own_questions(store, tmp_path)
    ann = Person(store, "ann0")
    here = ann.claim()
    assert (here.guideline_version, len(here.dimensions)) == (store.guideline.version, 4)
    ann.submit(here)
    theirs = ann.claim()
    assert (theirs.guideline_version, theirs.dimensions) == ("ours-1", ("motion_quality",))
    assert theirs.questions["motion_quality"].label == "Swing"
    assert ann.claim() == theirs, "held, and shown as it was"
    ann.submit(theirs)
    shown = [(p.task_id, p.guideline_version) for p in rows(store, schema.presentation)]
    assert shown == [(1, store.guideline.version), (2, "ours-1")]
    judged = [j.guideline_version for j in rows(store, schema.judgment)]
    assert judged == [store.guideline.version, "ours-1"]
    data = read_preferences(export_preferences(store, tmp_path / "out"))
    assert {(j["guideline_version"], j["dimension"]) for j in data.judgments} >= {
        ("ours-1", "motion_quality"),
        (store.guideline.version, "aesthetic_quality"),
    }
    assert data.manifest["guideline_version"] == f"{store.guideline.version}, ours-1"
    answers = [{"aesthetic_quality": {"best": 0}}]  # known answers are checked by it too
    with pytest.raises(UserError, match="aesthetic_quality"):
        store.create_tasks([[1, 2]], purpose="gold", answers=answers, project="ours")


def test_a_project_takes_only_questions_that_are_kept(new_project, tmp_path):
    store = new_project(tasks=1)
    with pytest.raises(
        UserError, match=r"no questions of version 'ours-1' are kept here; there are"
    ):
        projects.configure(
            store, "ours", retention_days=None, guideline_version="ours-1", actor="admin-1"
        )
    assert [p.name for p in rows(store, schema.project)] == ["default"], "nothing half done"
    own_questions(store, tmp_path)
    changed = replace(load_guideline(tmp_path / "ours.yaml"), guide={"en": "Something else."})
    with pytest.raises(UserError, match="their version is still 'ours-1'"):
        store.remember_guideline(changed)


def test_the_command_line_takes_a_file_of_questions(tmp_path, capsys):
    (tmp_path / "ours.yaml").write_text(OWN, encoding="utf-8")
    command = ["annotate", "project", "set", "ours", "--project", str(tmp_path / "store")]
    main([*command, "--guideline", str(tmp_path / "ours.yaml")])
    main(["annotate", "project", "list", str(tmp_path / "store")])
    assert "guideline ours-1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--guideline", "ours-2"])
    assert stopped.value.code == 2
    assert "Did you mean 'ours-1'?" in capsys.readouterr().err


@pytest.mark.browser
def test_the_page_shows_the_guideline_of_the_tasks_project(browser, moving_project, tmp_path):
    with Store.open(moving_project) as store:
        own_questions(store, tmp_path, priority=5)
        with running_server(create_app(store, UNWATCHED)) as url:
            page, errors, _ = sign_in(browser, url)
            press(page, "g")
            wait_for_text(page, "#guidelines", "Look at motion alone.")
            wait_for_text(page, "#row-0", "Which swings best?")
            assert page.is_hidden("#row-1")
            page.click("#language")
            wait_for_text(page, "#guidelines", "只看运动。")
            press(page, "t", "Enter")
            page.wait_for_selector("#row-3", state="visible")
            wait_for_text(page, "#guidelines", "怎样评判")
            assert errors == []

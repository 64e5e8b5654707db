"""Half-finished answers outlive the browser they were begun in."""

from __future__ import annotations

import json
import time

import pytest

from annotation import claims, schema
from annotation.api.app import create_app
from annotation.api.server import running_server
from annotation.drafts import MAX_DRAFT, save_draft
from annotation.refusals import NotFound, Refused
from annotation.store import Store
from tests.annotation.annotation_cases import LEASE, UNWATCHED, Person, rows
from tests.annotation.browser_cases import PATIENCE_MS, press, sign_in, wait_for_text


def test_a_draft_comes_back_with_its_task_to_its_author_alone(new_project):
    store = new_project(tasks=1, need=2)
    ann, other = Person(store, "ann0"), Person(store, "ann1")
    task = ann.claim()
    assert task.draft is None
    for text in ("first", "second"):
        save_draft(store, ann.account, task.presentation, text)
    assert ann.claim().draft == "second"
    assert other.claim().draft is None
    with pytest.raises(NotFound):
        save_draft(store, other.account, task.presentation, "theirs")
    with pytest.raises(Refused, match="20001 characters; at most 20000"):
        save_draft(store, ann.account, task.presentation, "d" * (MAX_DRAFT + 1))
    assert [row.body for row in rows(store, schema.draft)] == ["second"]


@pytest.mark.parametrize("end", ["submit", "skip", "flag"])
def test_a_draft_goes_when_its_task_is_answered_skipped_or_flagged(new_project, end):
    store = new_project(tasks=1)
    ann = Person(store, "ann0")
    task = ann.claim()
    save_draft(store, ann.account, task.presentation, "half")
    if end == "submit":
        receipt = ann.submit(task)
    elif end == "skip":
        claims.skip(store, ann.account, task.presentation, "other")
    else:
        claims.flag(store, ann.account, task.presentation, "unsafe")
    assert rows(store, schema.draft) == []
    if end == "submit":  # a change of mind has its own
        save_draft(store, ann.account, task.presentation, "anew")
        again = claims.reopen(store, ann.account, lease_seconds=LEASE)
        assert again.task.draft == "anew"
        ann.submit(task, again.verdict, revises=receipt.judgment_id)
        assert rows(store, schema.draft) == []


def saved(store: Store, note: str) -> dict:
    """The draft on the server, once it holds that note."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while time.monotonic() < deadline:
        for row in rows(store, schema.draft):
            if (draft := json.loads(row.body))["note"] == note:
                return draft
        time.sleep(0.1)
    raise AssertionError(f"no draft with the note {note!r} reached the server")


@pytest.mark.browser
def test_another_computer_goes_on_with_what_was_begun(browser, moving_project):
    with Store.open(moving_project) as store, running_server(create_app(store, UNWATCHED)) as url:
        desk, errors, _ = sign_in(browser, url)
        press(desk, "2", "e", "m")
        desk.keyboard.type("at my desk")
        assert saved(store, "at my desk")["rows"][0]["best"] == 1

        lap, more_errors, _ = sign_in(browser, url)
        lap.wait_for_selector("#row-0[data-state='ok']")
        assert lap.is_checked("#row-0 .best input[value='B']")
        assert lap.is_checked("#row-0 .worst input[value='C']")
        assert lap.input_value("#note input") == "at my desk"
        lap.fill("#note input", "on my lap")
        press(lap, "Escape", "t")
        assert saved(store, "on my lap")["rows"][1]["status"] == "tie"

        desk.reload()  # what it has itself is older by now
        desk.wait_for_selector("#row-1[data-state='ok']")
        assert desk.input_value("#note input") == "on my lap"
        press(desk, "Escape", "n", "1", "r", "2", "e")
        desk.wait_for_selector("#row-3[data-state='ok']")
        press(desk, "Enter", "y")
        wait_for_text(desk, "#status", "Saved as #1")
        assert [row.note for row in rows(store, schema.judgment)] == ["on my lap"]
        assert rows(store, schema.draft) == []
        assert errors + more_errors == []

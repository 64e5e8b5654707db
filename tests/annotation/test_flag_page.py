"""The page where a reviewer decides about what annotators reported."""

from __future__ import annotations

import httpx
import pytest

from annotation import audit, claims, flags, schema
from annotation.api.app import create_app
from annotation.api.server import running_server
from annotation.store import Store
from tests.annotation.annotation_cases import PASSWORD, UNWATCHED, Person, rows, state_of
from tests.annotation.browser_cases import NAMELESS, PALE, PATIENCE_MS, XSS, press, wait_for_text

NOTE = f"{XSS} | **clip B** [look](http://evil.example) $x$"


@pytest.fixture
def database() -> str:
    return "sqlite"  # test_flags asks both databases for the queue


def test_the_page_and_its_queue_are_for_those_who_decide(new_project):
    store = new_project(tasks=2, annotators=3)
    store.set_expert("ann2", True)
    store.add_user("boss", PASSWORD, role="reviewer")
    ann = Person(store, "ann0")
    task = ann.claim()
    claims.flag(store, ann.account, task.presentation, "unsafe")
    with running_server(create_app(store)) as url:

        def may(name: str) -> tuple[int, int, int]:
            signed_in = {"name": name, "password": PASSWORD}
            with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
                http.post("/api/login", json=signed_in)
                page = http.get("/flags", follow_redirects=True)
                listed = http.get("/api/flagged")
                return page.status_code, listed.status_code, http.get(clips[0]).status_code

        with httpx.Client(base_url=url, trust_env=False, timeout=60) as boss:
            assert boss.get("/flags/").status_code == 401
            boss.post("/api/login", json={"name": "boss", "password": PASSWORD})
            found = boss.get("/api/flagged").json()
            clips = found["tasks"][0]["clips"]
            assert (found["waiting"], found["conflicts"], len(clips)) == (1, 0, 4)
            assert len({boss.get(clip).content for clip in clips}) == 4
            assert boss.get(clips[0].split("?")[0]).status_code == 404, "only by a signed link"
            assert "secretmodel" not in boss.get("/api/flagged").text
            assert may("ann1") == (403, 404, 404)
            assert may("ann2") == (403, 200, 200), "an expert decides by the API"
            assert may("boss") == (200, 200, 200)
            flags.decide(store, store.find_user("boss"), 1, "remove")
            assert boss.get(clips[0]).status_code == 404, "what is decided is no longer shown"


@pytest.mark.browser
def test_what_an_annotator_flags_a_reviewer_watches_and_decides(browser, moving_project):
    with Store.open(moving_project) as store:
        boss = store.add_user("boss", PASSWORD, role="reviewer")
        ann = Person(store, "ann")
        for kind in ("unsafe", "broken"):
            task = ann.claim()
            claims.flag(store, ann.account, task.presentation, kind, NOTE)
        with running_server(create_app(store, UNWATCHED)) as url:
            page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
            page.set_default_timeout(PATIENCE_MS)
            errors: list[str] = []
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.request.post(f"{url}/api/login", data={"name": "boss", "password": PASSWORD})
            page.goto(url)
            page.click("#to-flagged")  # reviewers are led there

            # Both wait; the first is shown, its clips play, what was said of it is text.
            wait_for_text(page, "#progress", "2 flagged tasks wait")
            page.wait_for_function("document.querySelectorAll('#queue label').length === 2")
            assert page.input_value("#prompt textarea") == XSS
            page.wait_for_function(
                "[...document.querySelectorAll('#player video')].filter((v) => v.currentTime > 0.2).length === 4"
            )
            said = page.inner_text("#reports")
            assert ann.account.pseudonym in said
            assert "Unsafe content" in said
            assert NOTE.replace("  ", " ") in said
            assert page.locator("#reports :is(a, img, b)").count() == 0
            assert page.evaluate("window.hacked") is None
            shown = rows(store, schema.presentation)[0]
            assert f"{'ABCD'[shown.clip_order.index(1)]}\u202f=\u202f1" in said

            assert page.evaluate(NAMELESS) == []
            assert page.evaluate(PALE) == []

            # The second is put back, with a reason.
            press(page, "ArrowDown")
            page.wait_for_function(
                "document.querySelector('#prompt textarea').value === 'A second prompt.'"
            )
            press(page, "m")
            page.keyboard.type("rx it plays")
            press(page, "Escape", "r")
            wait_for_text(page, "#status", "Task #2 is put back")
            assert (state_of(store, 1), state_of(store, 2)) == ("flagged", "open")

            # The first goes for good, once that was confirmed; in Chinese, in the dark.
            page.click("#language")
            page.click("#theme")
            wait_for_text(page, "#reopen", "放回")
            page.wait_for_timeout(500)
            assert page.evaluate(PALE) == []
            press(page, "y", "x")
            page.wait_for_selector("#removal", state="visible")
            press(page, "Escape")
            page.wait_for_selector("#removal", state="hidden")
            assert state_of(store, 1) == "flagged"
            press(page, "x", "y")
            page.wait_for_selector("#done", state="visible")
            assert "没有等待处理的举报" in page.inner_text("#done")
            assert page.evaluate("document.body.classList.contains('dark')")
            assert errors == []
        assert state_of(store, 1) == "removed"
        assert [(r.task_id, r.decision, r.note) for r in rows(store, schema.ruling)] == [
            (2, "reopen", "rx it plays"),
            (1, "remove", ""),
        ]
        with store.read() as connection:
            decided = [e for e in audit.entries(connection) if e.action == "flag decide"]
        assert {entry.actor for entry in decided} == {boss.pseudonym}


@pytest.mark.browser
@pytest.mark.parametrize(("path", "script"), [("/", "annotate.js"), ("/flags/", "flags.js")])
def test_a_script_that_comes_late_still_starts_its_page(browser, moving_project, path, script):
    with Store.open(moving_project) as store:
        store.add_user("boss", PASSWORD, role="reviewer")
        with running_server(create_app(store, UNWATCHED)) as url:
            page = browser.new_page()
            page.set_default_timeout(PATIENCE_MS)
            late = []

            def hold_back(route):
                late.append(route)
                page.wait_for_timeout(3000)  # Gradio has mounted its components by now
                route.continue_()

            page.route(f"**/{script}", hold_back)
            page.request.post(f"{url}/api/login", data={"name": "boss", "password": PASSWORD})
            with page.expect_response("**/api/me"):
                page.goto(url + path, wait_until="commit")
            assert late
            page.close()

"""One person, one browser, a keyboard. Set REELHF_SCREENSHOTS to a folder to look at the page."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa
import torch

from annotation import schema
from annotation.api.app import create_app
from annotation.api.server import running_server
from annotation.api.sessions import COOKIE
from annotation.config import AnnotateConfig
from annotation.records import ClipRecord
from annotation.store import Store
from reelhf.video import write_video
from tests.annotation.annotation_cases import PASSWORD, SMALL

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api")

MAX_DRIFT_SECONDS = 0.05
PATIENCE_MS = 90_000  # the other tests may keep every core busy
SECONDS, FPS = 2.0, 8.0
XSS = '<img src=x onerror="window.hacked=1"> A red ball & <b>nothing</b> else'


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"], headless=True
        )
        yield running
        running.close()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two tasks of four clips that move, and one annotator. The prompt of the first tries to run a script."""
    clips = []
    for index in range(8):
        frames = torch.full((3, int(SECONDS * FPS), 64, 64), 0.1 + 0.08 * index)
        for frame in range(frames.shape[1]):
            frames[0, frame, 24:40, 2 * frame : 2 * frame + 16] = 0.9
        path = tmp_path / f"secretmodel{index}.mp4"
        write_video(path, frames, FPS)
        clips.append(
            ClipRecord(path, XSS if index < 4 else "A second prompt.", "secretmodel", "secretstage")
        )
    with Store.open(tmp_path / "project") as store:
        ids = store.add_clips(clips)
        store.create_tasks([ids[:4], ids[4:]], presentation=SMALL)
        store.add_user("ann", PASSWORD)
    return tmp_path / "project"


def picture(page: playwright.Page, name: str) -> None:
    folder = os.environ.get("REELHF_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png")


def sign_in(browser: playwright.Browser, url: str) -> tuple[playwright.Page, list[str], list[str]]:
    """A fresh browser context on the annotation page, with the errors and the addresses it asked for."""
    page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    page.set_default_timeout(PATIENCE_MS)
    errors: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    assert urlsplit(page.url).path == "/login"
    page.wait_for_function("document.activeElement.name === 'name'")  # ready to type
    page.keyboard.type("ann")
    page.keyboard.press("Tab")
    page.keyboard.type(PASSWORD)
    page.keyboard.press("Enter")
    page.wait_for_selector("#player video")
    page.wait_for_function("document.querySelector('#prompt textarea').value !== ''")
    return page, errors, asked


def press(page: playwright.Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)
        page.wait_for_timeout(30)


def label(page: playwright.Page, row: int) -> str:
    return page.inner_text(f"#row-{row} .question strong").strip()


def test_a_task_is_judged_with_the_keyboard_alone_and_lies_in_the_database_after_a_restart(
    browser, project
):
    with (
        Store.open(project) as store,
        running_server(create_app(store, AnnotateConfig(wanted_tasks=12))) as url,
    ):
        page, errors, asked = sign_in(browser, url)

        # Untrusted text is shown, not run; nothing names a model; nothing is asked of other hosts.
        assert page.input_value("#prompt textarea") == XSS
        assert page.evaluate("window.hacked") is None
        assert "secretmodel" not in page.content()
        assert "secretstage" not in page.content()
        assert "0 of 12 judged" in page.inner_text("#progress")
        picture(page, "1_signed_in")

        # The clips play, together.
        page.wait_for_function("window.reelhf.times().every((t) => t > 0.3)")
        before = page.evaluate("window.reelhf.times()")
        drifts = []
        for _ in range(10):
            page.wait_for_timeout(100)
            times = page.evaluate("window.reelhf.times()")
            if all(0.1 < time < SECONDS - 0.2 for time in times):
                drifts.append(max(times) - min(times))
        assert page.evaluate("window.reelhf.times()") != before
        assert drifts
        assert sorted(drifts)[len(drifts) // 2] < MAX_DRIFT_SECONDS
        durations = page.evaluate(
            "[...document.querySelectorAll('#player video')].map((v) => v.duration)"
        )
        assert len(set(durations)) == 1, "a clip's length would tell who made it"

        # Space pauses, a full stop steps by one frame.
        press(page, "Space", "0", ".")
        first = page.evaluate("window.reelhf.times()")
        press(page, ".")
        page.wait_for_timeout(100)
        second = page.evaluate("window.reelhf.times()")
        assert [b - a for a, b in zip(first, second, strict=True)] == pytest.approx(
            [1 / FPS] * 4, abs=1e-3
        )

        # A best, D worst; then the other way round in the next row: refused, with the reason.
        press(page, "1", "Shift+Digit4", "4", "q")
        page.wait_for_selector("#veto", state="visible")
        reason = page.inner_text("#veto-text")
        assert f"D is your best for {label(page, 1)} but your worst for {label(page, 0)}" in reason
        assert page.get_attribute("#row-1", "data-state") == "veto"
        press(page, "Enter")
        page.wait_for_function(
            "document.querySelector('#status').innerText.includes('clashes with')"
        )
        assert store.counts()["judgments"] == 0
        picture(page, "2_vetoed")

        # Another pair instead; then no valid pair for the same first pick in the third row; a tie in the fourth.
        press(page, "c", "2", "e")
        page.wait_for_selector("#veto", state="hidden")
        press(page, "4", "q")
        page.wait_for_selector("#veto", state="visible")
        press(page, "x")
        page.wait_for_selector("#veto", state="hidden")
        press(page, "t")
        page.wait_for_selector("#submit[data-ready='1']")
        picture(page, "3_ready")
        press(page, "m")
        page.keyboard.type("12t looked odd")  # typing is not a shortcut
        press(page, "Escape", "Enter")
        page.wait_for_function("document.querySelector('#progress').innerText.includes('1 of 12')")
        assert "Saved as #1" in page.inner_text("#status")
        assert "left" in page.inner_text("#progress")
        page.wait_for_function(
            "document.querySelector('#prompt textarea').value === 'A second prompt.'"
        )
        picture(page, "4_saved")

        assert errors == []
        assert [address for address in asked if not address.startswith(url)] == []

    with Store.open(project) as store, store.read() as connection:
        judgment = connection.execute(sa.select(schema.judgment)).one()
        choices = connection.execute(
            sa.select(schema.choice).order_by(schema.choice.c.position)
        ).all()
    assert judgment.note == "12t looked odd"
    assert judgment.seconds > 0
    assert not judgment.simulated
    found = [
        (c.status, c.best, c.worst, c.first_best, c.first_worst, c.constrained) for c in choices
    ]
    assert found == [
        ("ok", 0, 3, 0, 3, False),
        ("ok", 1, 2, 3, 0, True),
        ("no_valid_pair", None, None, 3, 0, False),
        ("tie", None, None, None, None, False),
    ]


def test_the_native_controls_do_the_same_with_a_mouse_and_a_draft_survives_a_reload(
    browser, project
):
    with Store.open(project) as store, running_server(create_app(store)) as url:
        page, errors, _ = sign_in(browser, url)
        page.click("#row-0 .best label:nth-of-type(2)")
        page.click("#row-0 .worst label:nth-of-type(3)")
        page.wait_for_selector("#row-0[data-state='ok']")
        shown = page.evaluate("[...document.querySelectorAll('#player video')].map((v) => v.src)")
        page.reload()
        page.wait_for_selector("#row-0[data-state='ok']")
        assert page.is_checked("#row-0 .best input[value='B']")
        assert page.is_checked("#row-0 .worst input[value='C']")
        again = page.evaluate("[...document.querySelectorAll('#player video')].map((v) => v.src)")
        assert again == shown, "the same clips in the same order"

        for row in (1, 2, 3):
            page.click(f"#row-{row} .other label:nth-of-type(2)")
        page.wait_for_selector("#submit[data-ready='1']")
        page.click("#submit")
        page.wait_for_function("document.querySelector('#status').innerText.includes('Saved')")

        press(page, "s")
        page.wait_for_selector("#skip-panel", state="visible")
        press(page, "2")
        page.wait_for_selector("#done", state="visible")
        assert "Nothing is left to judge" in page.inner_text("#done")
        assert errors == []
        counts = store.counts()
        assert (counts["judgments"], counts["skips"]) == (1, 1)


def test_answers_are_kept_when_the_server_is_away_and_saved_once_it_is_back(browser, project):
    with Store.open(project) as store:
        app = create_app(store)
        with running_server(app) as url:
            page, _, _ = sign_in(browser, url)
            press(page, "t", "t", "t", "t")
            page.wait_for_selector("#submit[data-ready='1']")
            page.context.set_offline(True)
            press(page, "Enter")
            page.wait_for_function(
                "document.querySelector('#status').innerText.includes('Not saved')"
            )
            assert store.counts()["judgments"] == 0
            page.context.set_offline(False)
            press(page, "Enter")
            page.wait_for_function("document.querySelector('#status').innerText.includes('Saved')")
        assert store.counts()["judgments"] == 1


def test_a_script_in_the_page_cannot_read_the_session_cookie(browser, project):
    with Store.open(project) as store, running_server(create_app(store)) as url:
        page, _, _ = sign_in(browser, url)
        assert COOKIE not in page.evaluate("document.cookie")
        echoed = page.evaluate(
            """async () => {
              const source = document.querySelector('#player video').src;
              const answers = await Promise.all([source, '/gradio_api/file=x.mp4', '/theme.css'].map(
                (path) => fetch(path, { headers: { Range: 'bytes=0-5' } })));
              return answers.map((answer) => answer.headers.get('cookie'));
            }"""
        )
        assert echoed == [None, None, None]
        assert (
            page.evaluate("Object.keys(localStorage).filter((k) => k.includes('run-history'))")
            == []
        )

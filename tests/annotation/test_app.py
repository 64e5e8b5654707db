"""The Gradio page as served: native components, nothing that leaks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import httpx
import pytest

from annotation import flag_page
from annotation.api.app import create_app
from annotation.api.server import running_server
from annotation.api.sessions import COOKIE
from annotation.app import SCRIPTS, build
from annotation.claims import FLAG_KINDS, SKIP_REASONS
from annotation.flags import DECISIONS
from annotation.pages import STATIC, strings
from annotation.records import DIMENSIONS, LANGUAGES, LETTERS, ClipRecord, load_guideline
from annotation.store import Store
from tests.annotation.annotation_cases import PASSWORD, SMALL

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def page(
    tmp_path_factory: pytest.TempPathFactory, clip_files: list[Path]
) -> Iterator[httpx.Client]:
    """Someone signed in to a project whose only task has a prompt that tries to run a script."""
    with Store.open(tmp_path_factory.mktemp("page")) as store:
        ids = store.add_clips(
            [
                ClipRecord(p, EVIL, f"secretmodel{i}", "secretstage")
                for i, p in enumerate(clip_files[:4])
            ]
        )
        store.create_tasks([ids], presentation=SMALL)
        store.add_user("ann0", PASSWORD)
        with (
            running_server(create_app(store)) as url,
            httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
        ):
            http.post("/api/login", json={"name": "ann0", "password": PASSWORD})
            yield http


def test_the_page_is_made_of_native_components_and_no_event_reaches_python():
    blocks = build()
    config = blocks.get_config_file()
    kinds = Counter(component["type"] for component in config["components"])
    assert kinds["radio"] == 4 * len(DIMENSIONS) + 2, "best, worst, score, other; skip and flag"
    assert kinds["checkboxgroup"] == 1
    assert kinds["textbox"] == 2
    assert kinds["button"] >= 15
    assert kinds["html"] == 1, "only the synchronised player is custom HTML"
    allowed = {"radio", "checkboxgroup", "textbox", "button", "html", "markdown", "row", "column"}
    assert set(kinds) <= allowed | {"form"}, "nothing that keeps state, serves files or uploads"
    assert config["dependencies"]
    assert not any(dependency["backend_fn"] for dependency in config["dependencies"])
    assert all(dependency["js"] for dependency in config["dependencies"])
    assert not any(dependency["queue"] for dependency in config["dependencies"])
    letters = [c["props"]["choices"] for c in config["components"] if c["type"] == "radio"][:2]
    assert [value for _, value in letters[0]] == list(LETTERS)
    assert isinstance(blocks, gr.Blocks)


def test_the_page_of_flags_is_native_too_and_no_event_reaches_python():
    config = flag_page.build().get_config_file()
    kinds = {component["type"] for component in config["components"]}
    assert kinds <= {"radio", "textbox", "button", "html", "markdown", "row", "column", "form"}
    assert config["dependencies"]
    assert not any(d["backend_fn"] or d["queue"] for d in config["dependencies"])


@pytest.mark.parametrize("page", ["annotate", "flags"])
def test_every_event_returns_one_value_per_output_and_names_a_function_of_the_script(page):
    script = (STATIC / f"{page}.js").read_text()
    exported = re.search(r"window\.reelhf = \{([^}]*)\}", script).group(1)
    config = (build if page == "annotate" else flag_page.build)().get_config_file()
    outputs = {tuple(dependency["outputs"]) for dependency in config["dependencies"]}
    view, everything = sorted(outputs, key=len)
    assert everything[: len(view)] == view, "all events render the view, a few the words too"
    for dependency in config["dependencies"]:
        name = re.search(r"window\.reelhf\.(\w+)\(", dependency["js"]).group(1)
        assert re.search(rf"\b{name}\b", exported), name
        assert (len(dependency["outputs"]) > len(view)) == (
            name in ("start", "switchLanguage", "switchTheme")
        ), name


def test_every_language_says_the_same_with_the_same_blanks():
    english, chinese = (strings()[language] for language in LANGUAGES)
    assert english.keys() == chinese.keys()
    for name, text in english.items():
        blanks = [sorted(re.findall(r"\{(\w+)\}", said)) for said in (text, chinese[name])]
        assert blanks[0] == blanks[1], name
        assert chinese[name].strip()
    guideline = load_guideline()
    assert set(guideline.guide) == set(LANGUAGES)
    for question in guideline.questions.values():
        assert set(question.translations) == {"zh"}
        assert all(question.translations["zh"].values())


def test_the_script_says_nothing_that_the_strings_file_does_not_know():
    known = strings()["en"]
    for name in {*SCRIPTS, *flag_page.SCRIPTS}:
        script = (STATIC / name).read_text()
        for said in re.findall(r"\bsay\(\"(\w+)\"", script):
            assert said in known, (name, said)
    for prefix, names in (("skip", SKIP_REASONS), ("flag", FLAG_KINDS), ("ruling", DECISIONS)):
        assert all(f"{prefix}_{each}" in known for each in names)


def test_the_page_holds_no_prompt_no_file_name_and_no_outside_address(page):
    html = page.get("/", headers={"Accept": "text/html"}).text
    assert EVIL not in html
    assert "onerror=alert" not in html
    assert "secretmodel" not in html
    assert "secretstage" not in html
    loaded = re.findall(r'(?:src|href)="(https?://[^"]+)"', html)
    assert [url for url in loaded if str(page.base_url) not in url] == []


def test_what_is_served_of_a_task_names_no_model(page):
    csrf = page.get("/api/me").json()["csrf"]
    answer = page.post("/api/claim", json={}, headers={"X-CSRF-Token": csrf})
    assert "secretmodel" not in answer.text
    assert "secretstage" not in answer.text
    task = answer.json()["task"]
    sizes = set()
    for clip in task["clips"]:
        media = page.get(clip["url"])
        assert "secretmodel" not in str(media.headers) + clip["url"]
        assert b"secretmodel" not in media.content
        assert "last-modified" not in media.headers, "the time a file was made could tell its model"
        sizes.add(media.headers["content-type"])
    assert sizes == {"video/mp4"}


CLOSED = (
    "/gradio_api/file=/etc/passwd",
    "/gradio_api/file=annotation.db",
    "/gradio_api/proxy=http://127.0.0.1/",
    "/gradio_api/upload",
    "/gradio_api/queue/join",
    "/gradio_api/queue/data",
    "/gradio_api/monitoring",
    "/monitoring",
    "/gradio_api/stream/x/y/z/playlist.m3u8",
    "/file=/etc/passwd",
    "/run/predict",
)


def test_gradio_routes_the_page_does_not_need_are_closed(page):
    for path in CLOSED:
        for method in ("GET", "POST"):
            answer = page.request(method, path, headers={"Range": "bytes=0-5"})
            assert answer.status_code in (403, 404), (method, path)
            assert page.cookies[COOKIE] not in str(answer.headers)


def test_no_gradio_file_answer_can_echo_the_cookie(page):
    """Gradio copies request headers into ranged file answers; ours must not."""
    html = page.get("/", headers={"Accept": "text/html"}).text
    paths = re.findall(r'(?:src|href)="(?:\.?/)?((?:assets|static|theme)[^"]+)"', html)[:3]
    assert paths
    for path in paths:
        answer = page.get("/" + path, headers={"Range": "bytes=0-5"})
        assert page.cookies[COOKIE] not in str(answer.headers), path


def test_run_history_and_analytics_are_off(page):
    config = page.get("/config").json()
    assert config["analytics_enabled"] is False
    assert not config.get("run_history")
    assert not config.get("enable_monitoring")

"""The Gradio page as served: native components, nothing that leaks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import httpx
import pytest

from annotation.api.app import create_app
from annotation.api.media import STATIC
from annotation.api.server import running_server
from annotation.api.sessions import COOKIE
from annotation.app import build
from annotation.records import DIMENSIONS, ClipRecord
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
    blocks = build(num_clips=4)
    config = blocks.get_config_file()
    kinds = Counter(component["type"] for component in config["components"])
    assert kinds["radio"] == 3 * len(DIMENSIONS) + 1
    assert kinds["textbox"] == 2
    assert kinds["button"] >= 6
    assert kinds["html"] == 1, "only the synchronised player is custom HTML"
    assert not {"state", "video", "file", "fileexplorer", "image", "timer"} & set(kinds)
    assert config["dependencies"]
    assert not any(dependency["backend_fn"] for dependency in config["dependencies"])
    assert all(dependency["js"] for dependency in config["dependencies"])
    letters = [c["props"]["choices"] for c in config["components"] if c["type"] == "radio"][:2]
    assert [value for _, value in letters[0]] == ["A", "B", "C", "D"]
    assert isinstance(blocks, gr.Blocks)


def test_every_event_returns_one_value_per_output_and_names_a_function_of_the_script():
    script = (STATIC / "annotate.js").read_text()
    exported = re.search(r"window\.reelhf = \{([^}]*)\}", script).group(1)
    config = build().get_config_file()
    outputs = {tuple(dependency["outputs"]) for dependency in config["dependencies"]}
    assert len(outputs) == 1, "all events render the same view"
    for dependency in config["dependencies"]:
        name = re.search(r"window\.reelhf\.(\w+)\(", dependency["js"]).group(1)
        assert re.search(rf"\b{name}\b", exported), name


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
        assert "last-modified" in media.headers
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

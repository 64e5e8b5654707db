"""What an attacker tries. Each test states what must not happen, and looks in the database or the answer that it did not."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import socket
import threading
from collections.abc import Iterator

import av
import httpx
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from annotation import schema
from annotation.api.app import create_app
from annotation.api.gate import CONTENT_SECURITY_POLICY
from annotation.api.server import running_server
from annotation.config import AnnotateConfig
from annotation.store import Store
from tests.annotation.annotation_cases import PASSWORD, UNWATCHED
from tests.annotation.test_access import sign_in

EVIL = '<img src=x onerror="alert(1)"><script>alert(2)</script>{{7*7}}${7*7}'


@pytest.fixture
def site(new_project) -> Iterator[tuple[Store, TestClient]]:
    store = new_project(tasks=4, annotators=2)
    with TestClient(create_app(store, UNWATCHED, page=False), follow_redirects=False) as client:
        yield store, client


def claim(client: TestClient, headers: dict[str, str]) -> dict:
    return client.post("/api/claim", json={}, headers=headers).json()["task"]


def answer_to(task: dict, key: str = "key-0123", **verdict: object) -> dict:
    choices = [{"dimension": name, "best": 0, "worst": 1} for name in task["dimensions"]]
    return {
        "presentation": task["presentation"],
        "idempotency_key": key,
        "verdict": {"choices": choices, "seconds": 3.0, **verdict},
    }


# --- what belongs to someone else ---


def test_another_annotators_task_cannot_be_answered_skipped_kept_drafted_or_watched(site):
    store, client = site
    mine, theirs = sign_in(client, "ann0"), sign_in(client, "ann1")
    task = claim(client, mine)
    body = answer_to(task)
    draft = {"presentation": task["presentation"], "draft": "mine"}
    assert client.post("/api/draft", json=draft, headers=mine).status_code == 200
    for path, sent in (
        ("/api/submit", body),
        ("/api/skip", {"presentation": task["presentation"], "reason": "other"}),
        ("/api/heartbeat", {"presentation": task["presentation"]}),
        ("/api/draft", {**draft, "draft": "theirs"}),
    ):
        answer = client.post(path, json=sent, headers=theirs)
        assert (answer.status_code, answer.json()["detail"]) == (404, "no such presentation"), path
    for clip in task["clips"]:
        assert client.get(clip["url"], headers=theirs).status_code == 404
    again = client.post("/api/claim", json={}, headers=mine).json()["task"]
    assert (again["presentation"], again["draft"]) == (task["presentation"], "mine")
    assert (store.counts()["judgments"], store.counts()["skips"]) == (0, 0)


def test_an_idempotency_key_of_someone_else_neither_answers_nor_blocks(site):
    store, client = site
    mine, theirs = sign_in(client, "ann0"), sign_in(client, "ann1")
    first, second = claim(client, mine), claim(client, theirs)
    assert client.post("/api/submit", json=answer_to(first), headers=mine).status_code == 200
    stolen = client.post("/api/submit", json=answer_to(second), headers=theirs)
    assert stolen.status_code == 409
    assert "judgment_id" not in stolen.json()
    own = client.post("/api/submit", json=answer_to(second, "another-key"), headers=theirs)
    assert own.status_code == 200
    assert store.counts()["judgments"] == 2


# --- forged requests ---


def test_forged_csrf_tokens_change_nothing(site):
    store, client = site
    mine, other = sign_in(client, "ann0"), sign_in(client, "ann1")
    task = claim(client, mine)
    for token in (
        "",
        "guess",
        other["X-CSRF-Token"],
        mine["X-CSRF-Token"][:-1],
        "\u00e9".encode("latin-1"),
    ):
        headers = {"Cookie": mine["Cookie"], "X-CSRF-Token": token}
        assert client.post("/api/submit", json=answer_to(task), headers=headers).status_code == 403
    form = client.post("/api/submit", data=answer_to(task), headers={"Cookie": mine["Cookie"]})
    assert form.status_code == 403, "a plain form of another site"
    assert client.get("/api/submit", headers=mine).status_code == 405
    assert store.counts()["judgments"] == 0


def test_a_cookie_that_was_signed_out_or_made_up_opens_nothing(site):
    _, client = site
    mine = sign_in(client, "ann0")
    assert client.post("/api/logout", json={}, headers=mine).status_code == 200
    for cookie in (
        mine["Cookie"],
        "reelhf_session=",
        "reelhf_session=" + "A" * 43,
        "reelhf_session=%00",
    ):
        assert client.get("/api/me", headers={"Cookie": cookie}).status_code == 401, cookie


def test_password_guessing_is_held_up_for_the_name_whatever_its_spelling(new_project):
    store = new_project(tasks=1, annotators=1)
    with TestClient(
        create_app(store, AnnotateConfig(login_failures=3, must_watch=0), page=False)
    ) as client:

        def guess(name: str, password: str) -> int:
            body = {"name": name, "password": password}
            return client.post("/api/login", json=body).status_code

        assert [guess(name, "12345678") for name in ("ann0", "ANN0", "Ann0")] == [401] * 3
        assert guess("ann0", PASSWORD) == 429
        form = client.post("/login", data={"name": "ann0", "password": PASSWORD})
        assert form.status_code == 429
        assert "set-cookie" not in form.headers


def test_names_and_passwords_of_any_shape_are_only_ever_wrong(site):
    _, client = site
    for name, password in (
        ("ann0\0", PASSWORD),
        ("x" * 5000, PASSWORD),
        ("ann0", "p" * 50_000),
        ("' OR 1=1 --", "' OR 1=1 --"),
        ("ann0", ""),
        (EVIL, EVIL),
    ):
        form = client.post("/login", data={"name": name, "password": password})
        assert form.status_code in (401, 429), name[:20]
        assert "<script>" not in form.text
    for body in ({"name": ["ann0"], "password": {"a": 1}}, {"name": None}, {"name": "\ud800"}):
        raw = json.dumps(body)
        assert client.post("/api/login", content=raw).status_code in (400, 401, 429)


# --- paths ---


TRAVERSALS = (
    "..%2f..%2fannotation.db",
    "%2e%2e%2fannotation.db",
    "..%5c..%5cannotation.db",
    "%252e%252e%252fannotation.db",
    "%2fetc%2fpasswd",
    "/etc/passwd",
    "....//....//etc/passwd",
    "annotate.css%00.mp4",
    "%00",
    "..%c0%af..%c0%afetc%c0%afpasswd",
    "file:///etc/passwd",
    "clips",
    ".",
)


def test_no_path_leads_out(site):
    _, client = site
    headers = sign_in(client, "ann0")
    task = claim(client, headers)
    query = task["clips"][0]["url"].partition("?")[2]
    for path in TRAVERSALS:
        for address in (f"/media/{path}", f"/media/{path}?{query}", f"/annotate/{path}"):
            answer = client.get(address, headers=headers)
            assert answer.status_code in (404, 401), (address, answer.status_code)
            assert b"SQLite" not in answer.content
            assert b"root:" not in answer.content


def test_raw_paths_that_a_client_library_would_tidy_up_lead_nowhere(new_project):
    store = new_project(tasks=1)
    with running_server(create_app(store, UNWATCHED, page=False)) as url:
        port = int(url.rpartition(":")[2])
        for path in (
            "/../../etc/passwd",
            "/media/../annotation.db",
            "//etc/passwd",
            "/annotate/../store.py",
        ):
            with socket.create_connection(("127.0.0.1", port), 10) as raw:
                raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                answer = b"".join(iter(lambda: raw.recv(65536), b""))
            assert answer.split(b" ", 2)[1] in (b"401", b"404"), path


@pytest.mark.parametrize(
    "key", ["../annotation.db", "/etc/passwd", "shown/link.mp4", "shown/../../x"]
)
def test_even_a_key_in_the_database_cannot_lead_out_of_the_media_folder(site, key, tmp_path):
    store, client = site
    (tmp_path / "x").write_text("outside")
    (store.media / "shown" / "link.mp4").symlink_to("/etc/passwd")
    headers = sign_in(client, "ann0")
    url = claim(client, headers)["clips"][0]["url"]
    with store.write() as connection:
        connection.execute(sa.update(schema.media).values(storage_key=key))
    answer = client.get(url, headers=headers)
    assert answer.status_code == 404
    assert "tell whoever runs the server" in answer.json()["detail"]


# --- what people write ---


def test_scripts_in_prompts_and_notes_come_back_as_data_and_never_as_markup(
    new_project, clip_files
):
    from annotation.records import ClipRecord
    from tests.annotation.annotation_cases import SMALL

    store = new_project(tasks=1, annotators=1)
    with store.write() as connection:
        connection.execute(sa.update(schema.task).values(state="done"))
    clips = [ClipRecord(path, EVIL, "m", "s") for path in clip_files[:1]]
    ids = [*store.add_clips(clips), 2, 3]
    with store.write() as connection:
        connection.execute(
            sa.insert(schema.prompt).values(
                prompt_id="evil", text=EVIL, language="en", cluster="evil", created_ms=1
            )
        )
    store.create_tasks([ids], prompt_ids=["evil"], presentation=SMALL)
    with TestClient(create_app(store, UNWATCHED, page=False)) as client:
        headers = sign_in(client, "ann0")
        answer = client.post("/api/claim", json={}, headers=headers)
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
        task = answer.json()["task"]
        assert task["prompt"] == EVIL
        sent = client.post("/api/submit", json=answer_to(task, note=EVIL), headers=headers)
        assert sent.status_code == 200
    with store.read() as connection:
        assert connection.execute(sa.select(schema.judgment.c.note)).scalar_one() == EVIL
    assert "script-src 'self'" in CONTENT_SECURITY_POLICY


MALFORMED = (
    b"\xff\xfe",
    b"[" * 30_000,
    b'{"verdict":' + b'{"a":' * 5000,
    b'{"presentation": "\\u0000"}',
    b'{"presentation": "\\ud800"}',
    b'{"presentation": 1e999, "idempotency_key": [], "verdict": {}}',
    b'{"verdict": {"choices": [{"dimension": {}, "best": 0, "worst": 1}]}}',
    b'{"verdict": {"choices": [{"dimension": "motion_quality", "best": 99999999999999999999999, "worst": 1}]}}',
    b'{"verdict": {"choices": null}}',
    b'{"verdict": {"choices": [], "watched_seconds": [1e400]}}',
    b"x" * 70_000,
    b"",
)


def test_oversized_and_malformed_bodies_are_refused_and_store_nothing(site):
    store, client = site
    headers = sign_in(client, "ann0")
    task = claim(client, headers)
    for path in ("/api/submit", "/api/skip", "/api/draft", "/api/heartbeat", "/api/tokens"):
        for body in MALFORMED:
            answer = client.post(path, content=body, headers=headers)
            assert 400 <= answer.status_code < 500, (path, body[:40], answer.text)
    huge = answer_to(task, note="n" * 3000)
    assert client.post("/api/submit", json=huge, headers=headers).status_code == 422
    nul = json.dumps(answer_to(task, note="a\0b"))
    assert client.post("/api/submit", content=nul, headers=headers).status_code == 400
    long = {"presentation": task["presentation"], "draft": "d" * 30_000}
    assert client.post("/api/draft", json=long, headers=headers).status_code == 422
    assert (store.counts()["judgments"], store.counts()["skips"]) == (0, 0)


@pytest.mark.parametrize(
    "number",
    ["1" + "0" * 400, "-1" + "0" * 30, str(2**63), str(2**31), "-1", "NaN", "1e400", "1e300"],
)
def test_numbers_of_any_size_are_refused_and_break_nothing(site, number):
    """Python and JSON know numbers that no database does."""
    store, client = site
    headers = sign_in(client, "ann0")
    body = json.dumps(answer_to(claim(client, headers), watched_seconds=[7.5]))
    places = [
        ("/api/submit", body.replace("3.0", number)),
        ("/api/submit", body.replace("7.5", number)),
        ("/api/submit", body.replace('"best": 0', f'"best": {number}', 1)),
        ("/api/submit", body[:-1] + f', "revises": {number}}}'),
        ("/api/back", f'{{"before": {number}}}'),
        ("/api/decide", f'{{"task_id": {number}, "decision": "reopen"}}'),
        ("/api/tokens", f'{{"label": "x", "scopes": ["read"], "days": {number}}}'),
    ]
    no_number = number in ("NaN", "1e400") or len(number) > 300
    for path, content in places:
        answer = client.post(path, content=content, headers=headers)
        assert answer.status_code < 500, (path, content, answer.text)
        assert answer.status_code >= 400 or not no_number, "infinity is no time, nor is a number"
    assert client.delete(f"/api/tokens/{number}", headers=headers).status_code in (404, 422)
    assert client.get(f"/media/task/x/{number}").status_code in (401, 404, 422)
    assert store.counts()["judgments"] <= (not no_number)


def test_no_depth_of_nesting_is_one_that_can_be_read_but_not_looked_through(site):
    _, client = site
    headers = sign_in(client, "ann0")
    for depth in range(900, 1000):  # around Python's limit, wherever this request meets it
        body = '{"reason": "\\u0041", "note": ' + "[" * depth + "]" * depth + "}"
        assert client.post("/api/skip", content=body, headers=headers).status_code in (
            400,
            404,
            422,
        )


def test_a_body_that_never_ends_is_cut_off_not_kept(new_project):
    store = new_project(tasks=1)
    with (
        running_server(create_app(store, UNWATCHED, page=False)) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
    ):
        answer = http.post("/api/login", json={"name": "ann0", "password": PASSWORD})
        headers = {"X-CSRF-Token": answer.headers["X-CSRF-Token"]}
        sent = []

        def endless() -> Iterator[bytes]:
            for _ in range(2000):
                sent.append(1)
                yield b"x" * 1024

        # The server may close the connection while we are still talking.
        with contextlib.suppress(httpx.TransportError):
            assert http.post("/api/submit", content=endless(), headers=headers).status_code == 413
        assert store.counts()["judgments"] == 0


def test_nothing_can_be_uploaded(site):
    _, client = site
    headers = sign_in(client, "ann0")
    for path in ("/upload", "/gradio_api/upload", "/media/x", "/annotate/x.js"):
        files = {"files": ("../../evil.js", b"alert(1)")}
        assert client.post(path, files=files, headers=headers).status_code in (404, 405), path
        assert client.put(path, content=b"x", headers=headers).status_code in (404, 405), path


# --- what leaks ---


def test_no_answer_repeats_the_cookie_or_the_token_that_was_sent(site):
    """Gradio's file route copied every request header into a 206 answer, the session cookie among them."""
    _, client = site
    headers = sign_in(client, "ann0")
    secret = headers["Cookie"].partition("=")[2]
    url = claim(client, headers)["clips"][0]["url"]
    for path in (
        url,
        "/gradio_api/file=/etc/passwd",
        "/file=x",
        "/api/me",
        "/annotate/annotate.js",
        "/nothing",
    ):
        for extra in ({}, {"Range": "bytes=0-3"}):
            answer = client.get(
                path, headers={**headers, **extra, "Authorization": "Basic c2VjcmV0"}
            )
            names = {name.lower() for name in answer.headers}
            assert not names & {"cookie", "authorization", "x-csrf-token"}, path
            assert secret not in str(answer.headers)
            assert "c2VjcmV0" not in str(answer.headers) + answer.text


def test_no_log_line_holds_a_secret(new_project, caplog, capfd):
    store = new_project(tasks=1, annotators=1)
    app = create_app(store, UNWATCHED, page=False)

    @app.get("/broken")
    def broken() -> None:
        with store.read() as connection:
            connection.execute(
                sa.text("SELECT :secret FROM absent"), {"secret": "hidden-parameter"}
            )

    caplog.set_level(logging.DEBUG)
    with (
        running_server(app) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
    ):
        answer = http.post("/api/login", json={"name": "ann0", "password": PASSWORD})
        csrf = answer.headers["X-CSRF-Token"]
        cookie = http.cookies["reelhf_session"]
        http.post("/api/login", json={"name": "ann0", "password": "a wrong secret"})
        link = app.state.sign_in_link(store.find_user("ann0"))
        httpx.get(url + link, trust_env=False, timeout=60)
        answer = http.get("/broken")
        assert (answer.status_code, answer.text) == (500, "Internal Server Error")
    said = capfd.readouterr()
    server_lines = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]
    text = said.out + said.err + "".join(logging.Formatter().format(r) for r in server_lines)
    assert "no such table" in text or "does not exist" in text, "the failure itself is in the log"
    for secret in (
        PASSWORD,
        "a wrong secret",
        csrf,
        cookie,
        link.rpartition("/")[2],
        "hidden-parameter",
    ):
        assert secret not in text


def test_nothing_an_annotator_can_see_names_the_model(new_project):
    """Texts, addresses, headers, sizes, rates and lengths: two models' clips differ in nothing but the picture."""
    store = new_project(tasks=3, annotators=1)
    seen, shapes = [], set()
    with TestClient(create_app(store, UNWATCHED, page=False)) as client:
        headers = sign_in(client, "ann0")
        for number in range(3):
            answer = client.post("/api/claim", json={}, headers=headers)
            task = answer.json()["task"]
            seen.append(answer.text)
            for clip in task["clips"]:
                media = client.get(clip["url"], headers=headers)
                names = {k.lower(): v for k, v in media.headers.items()}
                seen.append(str(names) + clip["url"])
                assert "filename" not in names["content-disposition"]
                assert b"secret" not in media.content
                shapes.add((number, *_shape(media.content), names["content-type"]))
            body = answer_to(task, f"key-{number}-0123")
            seen.append(client.post("/api/submit", json=body, headers=headers).text)
        for path in ("/api/me", "/api/progress", "/annotate/annotate.js"):
            seen.append(client.get(path, headers=headers).text)
    assert "secret" not in "".join(seen), (
        "secretmodel and secretstage are the names in this project"
    )
    assert len(shapes) == 3, "all clips of a task have one size, rate, length, codec and tags"


def _shape(content: bytes) -> tuple:
    with av.open(io.BytesIO(content)) as video:
        stream = video.streams.video[0]
        tags = tuple(sorted({**video.metadata, **stream.metadata}.items()))
        frames = sum(1 for _ in video.decode(stream))
        return (
            stream.width,
            stream.height,
            stream.average_rate,
            frames,
            video.duration,
            stream.codec.name,
            tags,
        )


def test_the_files_dates_and_entity_tags_do_not_tell_who_made_a_clip(new_project):
    """The same clip in two tasks has one file, whose date is when it was first shown."""
    store = new_project(tasks=1, annotators=1)
    with TestClient(create_app(store, UNWATCHED, page=False)) as client:
        headers = sign_in(client, "ann0")
        for clip in claim(client, headers)["clips"]:
            names = {k.lower() for k in client.get(clip["url"], headers=headers).headers}
            assert not names & {"last-modified", "etag", "server", "x-powered-by"}


def test_two_answers_at_once_from_one_account_are_one_judgment(site):
    """A double click, or a stolen cookie racing its owner: one of two different answers is stored, the other refused."""
    store, client = site
    headers = sign_in(client, "ann0")
    task = claim(client, headers)
    codes = []

    def send(key: str, best: int) -> None:
        body = answer_to(task, key)
        for choice in body["verdict"]["choices"]:
            choice["best"], choice["worst"] = best, 3
        codes.append(client.post("/api/submit", json=body, headers=headers).status_code)

    threads = [threading.Thread(target=send, args=(f"race-key-{n}", n % 3)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200, 409, 409, 409, 409, 409]
    assert store.counts()["judgments"] == 1

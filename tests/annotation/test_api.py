from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import httpx
import pytest
from anyio.to_thread import current_default_thread_limiter
from starlette.applications import Starlette
from starlette.responses import FileResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from annotation.api import media
from annotation.api.app import POSTGRES_THREADS, create_app
from annotation.api.server import bind, running_server
from annotation.api.sessions import COOKIE
from annotation.api.throttle import LoginThrottle
from annotation.client import AnnotationClient, SubmissionRefused
from annotation.config import AnnotateConfig
from annotation.routing import RoutingConfig
from annotation.store import Store
from reelhf.errors import UserError
from tests.annotation.annotation_cases import PASSWORD, UNWATCHED, plain_verdict


@pytest.fixture
def served(new_project) -> Iterator[tuple[Store, str]]:
    """A project with its HTTP API (no page) on a free port."""
    store = new_project(tasks=6, need=1, annotators=2)
    with running_server(
        create_app(store, AnnotateConfig(wanted_tasks=4, must_watch=0), page=False)
    ) as url:
        yield store, url


@contextmanager
def signed_in(url: str, name: str = "ann0") -> Iterator[httpx.Client]:
    """A bare HTTP client with session cookie and CSRF header, for requests AnnotationClient would not make."""
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        answer = http.post("/api/login", json={"name": name, "password": PASSWORD})
        http.headers["X-CSRF-Token"] = answer.headers["X-CSRF-Token"]
        yield http


# --- the client, as simulated annotators use it ---


def test_a_client_judges_until_nothing_is_open(served):
    store, url = served
    with AnnotationClient(url, "ann0", PASSWORD) as client:
        ids = []
        while task := client.claim():
            assert task.num_clips == 4
            assert task.prompt.startswith("Prompt number")
            assert set(task.questions) == set(task.dimensions)
            assert len({client.media(clip.url) for clip in task.clips}) == 4
            ids.append(client.submit(task, plain_verdict(task)))
        assert len(ids) == len(set(ids)) == 6
        assert client.progress()["judged"] == 6
    assert store.counts()["judgments"] == 6


def test_the_reason_of_a_refusal_reaches_the_client(served):
    _, url = served
    with AnnotationClient(url, "ann0", PASSWORD) as client:
        task = client.claim()
        with pytest.raises(SubmissionRefused) as refused:
            client.submit(task, plain_verdict(task, best=2, worst=2))
        assert refused.value.status == 422
        assert all(
            "C cannot be both best and worst" in problem for problem in refused.value.problems
        )
        assert client.submit(task, plain_verdict(task))


def test_progress_names_the_wanted_number_and_the_time_left(served):
    _, url = served
    with AnnotationClient(url, "ann0", PASSWORD) as client:
        assert client.progress() == {
            "judged": 0,
            "wanted": 4,
            "seconds_per_task": None,
            "eta_seconds": None,
        }
        client.submit(task := client.claim(), plain_verdict(task))
        assert client.progress() == {
            "judged": 1,
            "wanted": 4,
            "seconds_per_task": 4.0,
            "eta_seconds": 12.0,
        }


def test_a_client_can_skip(served):
    store, url = served
    with AnnotationClient(url, "ann0", PASSWORD) as client:
        first = client.claim()
        client.skip(first, "unclear_prompt", "what is a snark?")
        assert client.claim().presentation != first.presentation
    assert store.counts()["skips"] == 1


def test_four_clients_in_threads_judge_every_task_once(new_project):
    store = new_project(tasks=40, annotators=4)
    with running_server(create_app(store, UNWATCHED, page=False)) as url:

        def work(name: str) -> None:
            with AnnotationClient(url, name, PASSWORD) as client:
                while task := client.claim():
                    client.submit(task, plain_verdict(task))

        threads = [threading.Thread(target=work, args=(f"ann{i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    counts = store.counts()
    assert (counts["judgments"], counts["open_tasks"]) == (40, 0)


# --- who may ask ---


def test_nothing_but_the_sign_in_page_answers_without_a_session(served):
    _, url = served
    for path in (
        "/api/me",
        "/api/progress",
        "/media/x",
        "/config",
        "/annotate/annotate.js",
        "/info",
    ):
        assert httpx.get(url + path, trust_env=False, timeout=60).status_code == 401, path
    assert httpx.post(url + "/api/claim", json={}, trust_env=False, timeout=60).status_code == 401
    page = httpx.get(url + "/", headers={"Accept": "text/html"}, trust_env=False, timeout=60)
    assert (page.status_code, page.headers["location"]) == (303, "/login")
    for path in ("/login", "/healthz", "/annotate/login.css"):
        assert httpx.get(url + path, trust_env=False, timeout=60).status_code == 200


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(served):
    _, url = served
    answer = httpx.post(
        url + "/api/login", json={"name": "ann0", "password": PASSWORD}, trust_env=False, timeout=60
    )
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert PASSWORD not in answer.text


def test_a_change_needs_the_csrf_token(served):
    _, url = served
    with signed_in(url) as http:
        del http.headers["X-CSRF-Token"]
        for token in ({}, {"X-CSRF-Token": "guess"}):
            answer = http.post("/api/claim", json={}, headers=token)
            assert answer.status_code == 403
            assert "X-CSRF-Token" in answer.json()["detail"]


def test_another_site_cannot_sign_a_browser_in(served):
    _, url = served
    body = {"name": "ann0", "password": PASSWORD}
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        for path in ("/api/login", "/login"):
            answer = httpx.post(url + path, json=body, headers=headers, trust_env=False, timeout=60)
            assert answer.status_code == 403


def test_wrong_passwords_are_throttled_also_for_the_right_one_after_them(new_project):
    store = new_project(tasks=1)
    with running_server(
        create_app(store, AnnotateConfig(login_failures=3, must_watch=0), page=False)
    ) as url:

        def sign_in(password: str, name: str = "ann0") -> httpx.Response:
            return httpx.post(
                url + "/api/login",
                json={"name": name, "password": password},
                trust_env=False,
                timeout=60,
            )

        assert [sign_in("wrong").status_code for _ in range(3)] == [401] * 3
        held = sign_in(PASSWORD)
        assert held.status_code == 429
        assert int(held.headers["retry-after"]) > 0
        assert sign_in(PASSWORD, "ann1").status_code == 200, "others are not held up"


def test_the_throttle_forgets_after_its_pause_and_all_processes_share_it(new_project, clock):
    store = new_project(tasks=1)
    throttle, other = LoginThrottle(store, 2, 60.0), LoginThrottle(store, 2, 60.0)
    throttle.failed("name a", "address b")
    assert other.wait("name a") == 0.0
    other.failed("name a", "address b")
    for each in (throttle, other):
        assert each.wait("name a", "address b") == pytest.approx(60.0)
        assert each.wait("name c", "address b") == 0.0, "an address may fail ten times as often"
    clock.seconds -= 3600
    assert throttle.wait("name a") == 0.0, "a clock that was set back locks nobody out"
    clock.seconds += 3661
    assert throttle.wait("name a") == 0.0
    for _ in range(20):
        throttle.failed("name d", "address e")
    assert throttle.wait("name c", "address e") == pytest.approx(60.0)


def test_a_session_ends_by_signing_out_and_by_time(new_project, clock):
    store = new_project(tasks=1)
    with running_server(
        create_app(store, AnnotateConfig(session_hours=1, must_watch=0), page=False)
    ) as url:
        with signed_in(url) as http:
            assert http.post("/api/logout", json={}).status_code == 200
        with signed_in(url) as http:
            cookie = http.cookies[COOKIE]
            assert http.get("/api/me").json()["name"] == "ann0"
            clock.seconds += 3601
            assert (
                httpx.get(
                    url + "/api/me", cookies={COOKIE: cookie}, trust_env=False, timeout=60
                ).status_code
                == 401
            )


def test_a_sign_in_link_works_once(new_project):
    store = new_project(tasks=1)
    app = create_app(store, UNWATCHED, page=False)
    link = app.state.sign_in_link(store.find_user("ann0"))
    with (
        running_server(app) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
    ):
        assert http.get(link).headers["location"] == "/"
        assert http.get("/api/me").json()["name"] == "ann0"
        again = httpx.get(url + link, trust_env=False, timeout=60)
        assert again.headers["location"] == "/login"
        assert "set-cookie" not in again.headers


def test_one_annotator_reaches_nothing_of_another(served):
    store, url = served
    with AnnotationClient(url, "ann0", PASSWORD) as mine, signed_in(url, "ann1") as other:
        task = mine.claim()
        assert other.get(task.clips[0].url).status_code == 404
        verdict = plain_verdict(task).to_json()
        body = {
            "presentation": task.presentation,
            "idempotency_key": "key-0123",
            "verdict": verdict,
        }
        assert other.post("/api/submit", json=body).status_code == 404
        for path in ("/api/skip", "/api/heartbeat"):
            body = {"presentation": task.presentation, "reason": "other"}
            assert other.post(path, json=body).status_code == 404
        assert mine.submit(task, plain_verdict(task))
    assert store.counts()["judgments"] == 1


@pytest.mark.parametrize("page", [False, True])
def test_on_postgresql_no_more_requests_are_worked_on_than_it_has_connections_for(
    new_project, page
):
    store = new_project(tasks=1)
    app = create_app(store, page=page)

    async def limit() -> float:
        async with app.router.lifespan_context(app):
            return current_default_thread_limiter().total_tokens

    assert anyio.run(limit) == (40 if store.database.is_sqlite else POSTGRES_THREADS)


@pytest.mark.postgres
@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_clips_that_come_from_object_storage_leave_threads_for_the_rest(new_project):
    store = new_project(tasks=1)
    store.files.remote = "memory://clips"
    app = create_app(store, page=False)

    async def limit() -> float:
        async with app.router.lifespan_context(app):
            return current_default_thread_limiter().total_tokens

    assert anyio.run(limit) > POSTGRES_THREADS


# --- media ---


def test_media_answers_ranges_and_repeats_no_request_header(served):
    _, url = served
    with signed_in(url) as http:
        task = http.post("/api/claim", json={}).json()["task"]
        link = task["clips"][0]["url"]
        whole = http.get(link)
        assert whole.headers["content-type"] == "video/mp4"
        part = http.get(link, headers={"Range": "bytes=10-19"})
        assert part.status_code == 206
        assert part.content == whole.content[10:20]
        assert part.headers["content-range"] == f"bytes 10-19/{len(whole.content)}"
        for answer in (whole, part):
            assert "cookie" not in {name.lower() for name in answer.headers}
            assert http.cookies[COOKIE] not in str(answer.headers)


RANGES = ("bytes=0-", "bytes=7-7", "bytes=5-99999999", "bytes=-9", "bytes=-99999999", "bytes=-0", "bytes=-",
          "bytes=9-3", "bytes=99999999-", "bytes=1-2,4-5", "bytes=0-1,", "bytes=2 - 4", "items=0-1", "bytes=a-b", "")  # fmt: skip


def test_every_range_is_answered_as_starlette_answers_it(served, tmp_path, monkeypatch):
    """The clips that are read at once, against the library's way of sending files, which sends those that are larger."""
    _, url = served
    with signed_in(url) as http:
        link = http.post("/api/claim", json={}).json()["task"]["clips"][0]["url"]
        (tmp_path / "clip").write_bytes(http.get(link).content)
        library = Starlette(routes=[Route("/", lambda _: FileResponse(tmp_path / "clip"))])
        for at_once in (1 << 20, 0):
            monkeypatch.setattr(media, "READ_AT_ONCE", at_once)
            for asked in RANGES:
                ours = http.get(link, headers={"Range": asked})
                theirs = TestClient(library).get("/", headers={"Range": asked})
                assert ours.status_code == theirs.status_code, asked
                told = ours.headers.get("content-range"), theirs.headers.get("content-range")
                assert told[0] == told[1], asked
                if "multipart" not in theirs.headers["content-type"]:
                    assert ours.content == theirs.content, asked
                if ours.status_code < 400:
                    assert ours.headers["accept-ranges"] == "bytes"
                    assert not {"etag", "last-modified"} & {name.lower() for name in ours.headers}
            unless = {"Range": "bytes=2-3", "If-Range": '"a mark that we never gave"'}
            whole = http.get(link, headers=unless)
            assert (whole.status_code, whole.content) == (200, (tmp_path / "clip").read_bytes())


def test_paths_lead_nowhere(served):
    _, url = served
    paths = (
        "/media/..%2f..%2fannotation.db",
        "/media/%2e%2e/annotation.db",
        "/media/clips",
        "/annotate/..%2fstore.py",
        "/annotate/%2e%2e%2fstore.py",
        "/annotate/store.py",
        "/media/%00",
    )
    with signed_in(url) as http:
        assert {path: http.get(path).status_code for path in paths} == dict.fromkeys(paths, 404)


# --- shape of requests ---


MALFORMED = {
    b"not json": 400,
    b"[1, 2]": 400,
    b"{}": 422,
    b'{"verdict": {"choices": [{"dimension": "x", "colour": 1}]}}': 422,
    b'{"verdict": {"choices": [{"dimension": "motion_quality", "best": "0", "worst": 1}]}}': 422,
    b'{"verdict": {"choices": [{"dimension": "motion_quality", "best": true, "worst": 1}]}}': 422,
    b'{"verdict": {"choices": 5}}': 422,
    b'{"verdict": [1]}': 422,
    b'{"verdict": {"choices": [], "seconds": "soon"}}': 422,
    b'{"verdict": {"choices": [], "seconds": NaN}}': 422,
    b" " * 70_000: 413,
}


def test_malformed_submissions_are_refused_not_crashed_on(served):
    store, url = served
    with signed_in(url) as http:
        for body, status in MALFORMED.items():
            answer = http.post("/api/submit", content=body)
            assert (answer.status_code, body[:80]) == (status, body[:80]), answer.text
            assert answer.json()["detail"]
    assert store.counts()["judgments"] == 0


def test_what_a_person_types_is_escaped_on_the_sign_in_page(served):
    _, url = served
    evil = '"><script>alert(1)</script>'
    page = httpx.post(
        url + "/login", data={"name": evil, "password": "x"}, trust_env=False, timeout=60
    )
    assert page.status_code == 401
    assert "<script>" not in page.text
    assert "wrong name or password" in page.text


def test_every_answer_carries_the_security_headers(served):
    _, url = served
    for path in ("/login", "/api/me"):
        headers = httpx.get(url + path, trust_env=False, timeout=60).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_a_taken_port_is_one_clear_line():
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    with pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*--port"):
        bind("127.0.0.1", port)
    listener.close()


# --- revisions, flags and decisions over HTTP ---


def test_a_judgment_is_changed_over_http_and_only_by_its_author(served):
    store, url = served
    with AnnotationClient(url, "ann0", PASSWORD) as client:
        client.submit(task := client.claim(), plain_verdict(task))
    with signed_in(url) as http, signed_in(url, "ann1") as other:
        found = http.post("/api/back", json={}).json()["reopened"]
        assert found["task"]["presentation"] == task.presentation
        assert http.get(found["task"]["clips"][0]["url"]).status_code == 200
        body = {
            "presentation": task.presentation,
            "idempotency_key": "revision-key",
            "revises": found["judgment_id"],
            "verdict": plain_verdict(task, 1, 0).to_json(),
        }
        assert other.post("/api/submit", json=body).status_code == 404
        assert http.post("/api/submit", json={**body, "revises": "1"}).status_code == 422
        assert http.post("/api/submit", json=body).json()["revision"] == 1
        assert http.post("/api/back", json={"before": found["root"]}).json()["reopened"] is None
        assert other.post("/api/back", json={}).json()["reopened"] is None
    assert store.counts()["revisions"] == 1


def test_flags_are_listed_and_decided_by_experts_and_not_by_others(served):
    store, url = served
    store.set_expert("ann1", True)
    with signed_in(url) as http, signed_in(url, "ann1") as expert:
        task = http.post("/api/claim", json={}).json()["task"]
        body = {"presentation": task["presentation"], "flag": "unsafe", "note": "<script>"}
        assert http.post("/api/flag", json=body).json() == {"flagged": True}
        assert http.post("/api/flag", json={**body, "flag": "dull"}).status_code == 422
        assert http.get("/api/flagged").status_code == 404
        (held,) = expert.get("/api/flagged").json()["tasks"]
        assert held["reports"][0]["note"] == "<script>"
        decision = {"task_id": held["task_id"], "decision": "reopen"}
        assert http.post("/api/decide", json=decision).status_code == 404
        assert expert.post("/api/decide", json=decision).json() == {"decided": True}
    assert store.counts()["flagged_tasks"] == 0


def test_a_claim_without_a_task_says_why(new_project):
    store = new_project(tasks=1)
    config = AnnotateConfig(must_watch=0, routing=RoutingConfig(max_per_day=1))
    with running_server(create_app(store, config, page=False)) as url:
        with AnnotationClient(url, "ann0", PASSWORD) as client:
            client.submit(task := client.claim(), plain_verdict(task))
        for name, reason in (("ann0", "daily_limit"), ("ann1", "empty")):
            with signed_in(url, name) as http:
                answer = http.post("/api/claim", json={}).json()
                assert answer == {"task": None, "reason": reason}

"""Push, pull and webhook against what a real Label Studio said.

By default the conversation with a real server (1.23) is replayed from `label_studio_recording.json`. To hold it anew, with a server in
an environment of its own:

    python -m venv ls && ls/bin/pip install label-studio
    LABEL_STUDIO_BASE_DATA_DIR=$PWD/ls-data COLLECT_ANALYTICS=False LATEST_VERSION_CHECK=False SSRF_PROTECTION_ENABLED=false \\
        ls/bin/label-studio start --no-browser --internal-host 127.0.0.1 --port 8099 --username admin@example.com \\
        --password 'Test-pass-123' --user-token 0123456789abcdef0123456789abcdef01234567 --enable-legacy-api-token
    REELHF_LABEL_STUDIO=http://127.0.0.1:8099 python -m pytest tests/annotation/test_label_studio.py

With REELHF_RECORD=1 beside it, the recording is written again.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from annotation import schema
from annotation.api.app import create_app
from annotation.api.server import running_server
from annotation.export import judgment_table
from annotation.label_studio import push as push_module
from annotation.label_studio.pull import Pulled, new_hints, pull
from annotation.label_studio.push import connect, push
from annotation.label_studio.template import label_config, read_verdict
from annotation.label_studio.webhook import SECRET_HEADER, register, webhook_secret
from annotation.records import load_guideline
from annotation.refusals import Refused
from annotation.store import Store
from reelhf.errors import UserError

RECORDING = Path(__file__).with_name("label_studio_recording.json")
KEY = "0123456789abcdef0123456789abcdef01234567"
SERVER = os.environ.get("REELHF_LABEL_STUDIO", "http://127.0.0.1:8099")
DIMENSIONS = load_guideline().dimensions("t2v")


class Recorder(httpx.HTTPTransport):
    """Talks to the real server and writes down what was said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[dict[str, Any]] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = super().handle_request(request)
        body = answer.read()
        self.said.append(
            {
                "method": request.method,
                "path": request.url.raw_path.decode(),
                "status": answer.status_code,
                "body": json.loads(body) if body else None,
            }
        )
        return httpx.Response(
            answer.status_code, headers={"Content-Type": "application/json"}, content=body
        )


def replayer(left: list[dict[str, Any]]) -> httpx.MockTransport:
    """Answers as the real server did, and insists on being asked the same in the same order; what is answered leaves the list."""

    def answer(request: httpx.Request) -> httpx.Response:
        expected = left.pop(0)
        asked = (request.method, request.url.raw_path.decode())
        assert asked == (expected["method"], expected["path"])
        if expected["body"] is None:
            return httpx.Response(expected["status"])
        return httpx.Response(expected["status"], json=expected["body"])

    return httpx.MockTransport(answer)


def result(picks: dict[str, tuple[str, str]], note: str = "") -> list[dict[str, Any]]:
    """A Label Studio result: per dimension the letters of best and worst."""

    def item(name: str, value: dict[str, Any], kind: str = "choices") -> dict[str, Any]:
        return {"from_name": name, "to_name": "prompt", "type": kind, "value": value}

    items = []
    for dimension, (best, worst) in picks.items():
        items.append(item(f"best__{dimension}", {"choices": [best]}))
        items.append(item(f"worst__{dimension}", {"choices": [worst]}))
    return items + ([item("note", {"text": [note]}, "textarea")] if note else [])


def everywhere(best: str, worst: str) -> dict[str, tuple[str, str]]:
    return dict.fromkeys(DIMENSIONS, (best, worst))


def judgments(store: Store) -> list[Any]:
    with store.read() as connection:
        return connection.execute(sa.select(schema.judgment).order_by(schema.judgment.c.id)).all()


def converse(store: Store, client: Any) -> None:
    """The whole conversation, the same with the real server and with the recording."""
    sent = push(client, store, server=SERVER, media_url="http://labels.test", seed=5)
    assert (sent.new, sent.known) == (3, 0)
    project = sent.project
    again = push(
        client, store, server=SERVER, media_url="http://labels.test", project=project, seed=5
    )
    assert (again.new, again.known) == (0, 3)
    theirs = list(client.tasks.list(project=project, fields="all", page_size=200))
    assert len(theirs) == 3, "nothing was imported twice"
    with store.read() as connection:
        links = {row.uid: row for row in connection.execute(sa.select(schema.label_studio_task))}
    for task in theirs:
        link = links[task.data["uid"]]
        assert (task.id, task.data["order"]) == (link.their_id, link.clip_order)
        assert "secret" not in json.dumps(task.data), "no model is named"
    first, second, third = (task.id for task in theirs)

    def say(task: int, picks: dict[str, tuple[str, str]], note: str = "") -> int:
        made = client.annotations.create(id=task, result=result(picks, note), lead_time=7.5)
        return int(made.id)

    good = say(first, everywhere("B", "C"), "clear")
    same = say(second, everywhere("A", "A"))
    unknown = say(third, everywhere("A", "Z"))
    clash = say(third, everywhere("A", "B") | {DIMENSIONS[1]: ("B", "C")})
    twice = say(first, everywhere("A", "D"))
    one = pull(client, store, server=SERVER, project=project)
    assert (one.stored, one.refused, one.known) == (1, 4, 0)
    assert "both best and worst" in one.reasons[same]
    assert "'Z' is no clip" in one.reasons[unknown]
    assert "is your best for" in one.reasons[clash]
    assert "already judged" in one.reasons[twice]
    (stored,) = judgments(store)
    assert (stored.note, stored.seconds) == ("clear", 7.5)
    link = links[theirs[0].data["uid"]]
    with store.read() as connection:
        shown = connection.execute(sa.select(schema.presentation)).first()
        choice = connection.execute(sa.select(schema.choice)).first()
        names = connection.execute(sa.select(schema.account.c.name)).scalars().all()
    assert (shown.clip_order, choice.best, choice.worst) == (link.clip_order, 1, 2)
    assert not any("@" in name for name in names), "no e-mail address comes along"

    two = pull(client, store, server=SERVER, project=project)
    assert (two.stored, two.refused, two.known) == (0, 0, 5)

    client.annotations.delete(id=good)
    client.annotations.update(id=same, result=result(everywhere("A", "B")))
    three = pull(client, store, server=SERVER, project=project)
    assert (three.stored, three.deleted, three.known) == (1, 1, 3)
    assert len(judgments(store)) == 2, "what was said stays on record"
    with store.read() as connection:
        marked = connection.execute(
            sa.select(
                schema.label_studio_annotation.c.their_id,
                schema.label_studio_annotation.c.judgment_id,
            ).where(schema.label_studio_annotation.c.state == "deleted")
        ).all()
    assert [tuple(row) for row in marked] == [(good, stored.id)]
    exported = {row["task_id"] for row in judgment_table(store)[0]}
    assert exported == {f"t{links[theirs[1].data['uid']].task_id}"}, (
        "a vote taken back is not exported"
    )
    assert pull(client, store, server=SERVER, project=project).deleted == 0

    register(client, store, project, "http://127.0.0.1:7999/webhooks/label-studio")
    register(client, store, project, "http://127.0.0.1:7999/webhooks/label-studio")
    hooks = [hook for hook in client.webhooks.list(project=str(project)) if hook.project == project]
    assert len(hooks) == 1
    assert hooks[0].headers[SECRET_HEADER] == webhook_secret(store)


@pytest.fixture
def known_draws(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Makes the random names of a push and the webhook's secret those of the recording."""

    def use(uids: list[str]) -> None:
        left, real = iter(uids), secrets.token_hex
        fixed = {12: lambda: next(left), 32: lambda: "ab" * 32}
        monkeypatch.setattr(
            push_module.secrets, "token_hex", lambda n: fixed[n]() if n in fixed else real(n)
        )

    return use


def test_the_whole_conversation_as_a_real_server_held_it(new_project, known_draws):
    said = json.loads(RECORDING.read_text())
    known_draws(said["uids"])
    http = httpx.Client(transport=replayer(said["exchanges"]))
    converse(new_project(tasks=3), connect(SERVER, KEY, http))
    assert said["exchanges"] == [], "the server was asked for more when this was recorded"


@pytest.mark.labelstudio
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_the_whole_conversation_with_a_real_server(new_project, known_draws):
    uids = [secrets.token_hex(12) for _ in range(3)]
    known_draws(uids)
    recorder = Recorder()
    converse(
        new_project(tasks=3), connect(SERVER, KEY, httpx.Client(transport=recorder, timeout=60))
    )
    assert recorder.said
    assert all(exchange["status"] < 500 for exchange in recorder.said)
    if os.environ.get("REELHF_RECORD"):
        text = json.dumps({"uids": uids, "exchanges": recorder.said}, indent=1)
        RECORDING.write_text(text.replace("admin@example.com", "someone@example.com") + "\n")


@pytest.mark.labelstudio
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_real_servers_webhook_arrives(new_project):
    store = new_project(tasks=1)
    client = connect(SERVER, KEY)
    with running_server(create_app(store, page=False)) as url:
        sent = push(client, store, server=SERVER, media_url=url)
        register(client, store, sent.project, url + "/webhooks/label-studio")
        (task,) = client.tasks.list(project=sent.project, fields="all")
        assert (
            httpx.get(task.data["video_A"], trust_env=False).headers["content-type"] == "video/mp4"
        )
        client.annotations.create(id=task.id, result=result(everywhere("B", "C")))
        deadline = time.monotonic() + 20
        while not new_hints(store) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert new_hints(store) == 1
        assert pull(client, store, server=SERVER, project=sent.project).stored == 1
        assert new_hints(store) == 0


def test_a_changed_annotation_becomes_a_revision(new_project, known_draws):
    """Only what the conversation has no example of: an annotation that was stored and is changed later."""
    said = json.loads(RECORDING.read_text())
    known_draws(said["uids"])
    store = new_project(tasks=3)
    client = connect(SERVER, KEY, httpx.Client(transport=replayer(said["exchanges"])))
    project = push(client, store, server=SERVER, media_url="http://labels.test", seed=5).project
    theirs = SimpleNamespace(id=1, data={"uid": said["uids"][0]}, annotations=[])
    client.tasks.list = lambda **_: [theirs]

    def say(picks: dict[str, tuple[str, str]], at: str) -> Pulled:
        theirs.annotations = [
            {"id": 9, "completed_by": 4, "updated_at": at, "result": result(picks)}
        ]
        return pull(client, store, server=SERVER, project=project)

    assert say(everywhere("A", "B"), "monday").stored == 1
    assert say(everywhere("C", "D"), "tuesday").stored == 1
    first, second = judgments(store)
    assert (second.revision, second.supersedes) == (1, first.id)
    assert say(everywhere("C", "D"), "tuesday").known == 1
    assert store.counts()["open_tasks"] == 2, "a revision is not a second opinion"


# --- the form and its answers ---


def test_the_form_asks_every_dimension_about_every_clip_in_escaped_words():
    guideline = load_guideline()
    tree = ElementTree.fromstring(label_config(guideline, DIMENSIONS, 3))
    assert [video.get("name") for video in tree.iter("Video")] == ["video_A", "video_B", "video_C"]
    choices = {node.get("name"): [c.get("value") for c in node] for node in tree.iter("Choices")}
    for name in DIMENSIONS:
        assert choices[f"best__{name}"] == choices[f"worst__{name}"] == ["A", "B", "C"]
        assert choices[f"other__{name}"] == ["tie", "cannot_judge"]


def test_answers_that_do_not_say_what_they_mean_are_refused():
    for items, words in (
        (result({"motion_quality": ("A", "b")}), "'b' is no clip"),
        (result({"motion_quality": ("A", "AB")}), "'AB' is no clip"),
        ([], "best and worst are missing"),
        (result({"motion_quality": ("A", "B")}) * 2, "answered more than once"),
        (
            [
                *result({"motion_quality": ("A", "B")}),
                {"from_name": "other__motion_quality", "value": {"choices": ["tie"]}},
            ],
            "tie and a best or worst clip at once",
        ),
        (
            [{"from_name": "other__motion_quality", "value": {"choices": ["x"]}}],
            "'x' is not one of",
        ),
    ):
        with pytest.raises(Refused, match=words):
            read_verdict({"result": items}, ["motion_quality"])
    tie = [{"from_name": "other__motion_quality", "value": {"choices": ["tie"]}}]
    assert read_verdict({"result": tie}, ["motion_quality"]).choices[0].status == "tie"


# --- the webhook ---


EVENT = {"action": "ANNOTATION_UPDATED", "annotation": {"id": 7, "updated_at": "2026-01-01"}}


def test_a_webhook_is_noted_once_and_a_forged_one_never(new_project):
    store = new_project(tasks=1)
    with TestClient(create_app(store, page=False)) as client:
        secret = webhook_secret(store)

        def call(event: object, sent: str | None = secret) -> httpx.Response:
            headers = {} if sent is None else {SECRET_HEADER: sent}
            return client.post("/webhooks/label-studio", json=event, headers=headers)

        for forged in (None, "", secret[:-1], secret.upper(), "\u00e9"):
            sent = forged if forged is None else forged.encode("latin-1").decode("latin-1")
            if sent is None or sent.isascii():
                assert call(EVENT, sent).status_code == 403
        assert new_hints(store) == 0
        assert call(EVENT).json() == {"noted": True}
        assert call(EVENT).json() == {"noted": False}, "a replay changes nothing"
        later = {**EVENT, "annotation": {"id": 7, "updated_at": "2026-01-02"}}
        assert call(later).json() == {"noted": True}
        assert call({"action": "PROJECT_DELETED"}).json() == {"noted": False}
        assert call([1]).json() == {"noted": False}
        assert new_hints(store) == 2
        headers = {SECRET_HEADER: secret}
        assert (
            client.post("/webhooks/label-studio", content=b"{", headers=headers).status_code == 400
        )
        big = json.dumps({**EVENT, "project": "x" * 1_100_000})
        assert (
            client.post("/webhooks/label-studio", content=big, headers=headers).status_code == 413
        )


def test_a_pushed_clip_is_seen_by_its_signed_link_alone_until_it_expires(
    new_project, known_draws, clock
):
    said = json.loads(RECORDING.read_text())
    known_draws(said["uids"])
    store = new_project(tasks=3)
    client = connect(SERVER, KEY, httpx.Client(transport=replayer(said["exchanges"])))
    sent: list[dict[str, Any]] = []
    original = client.projects.import_tasks

    def keep(**options: Any) -> Any:
        sent.extend(options["request"])
        return original(**options)

    client.projects.import_tasks = keep
    push(client, store, server=SERVER, media_url="http://testserver", seed=5, link_days=2)
    link = sent[0]["data"]["video_A"].removeprefix("http://testserver")
    with TestClient(create_app(store, page=False)) as browser:
        answer = browser.get(link, headers={"Range": "bytes=0-9"})
        assert (answer.status_code, len(answer.content)) == (206, 10)
        assert answer.headers["access-control-allow-origin"] == "*"
        path, _, query = link.partition("?")
        for forged in (path, f"{path[:-1]}1?{query}", f"{path}?{query}0", f"{path[:-1]}9?{query}"):
            assert browser.get(forged).status_code == 404
        clock.seconds += 2 * 86_400 + 2
        assert browser.get(link).status_code == 410


def test_a_key_that_is_refused_and_a_server_that_is_away_are_one_line():
    refused = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(401, json={})))
    with pytest.raises(UserError, match="refuses the key"):
        connect("http://ls.test", "bad", refused)

    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(UserError, match="does not answer"):
        connect("http://ls.test", "bad", httpx.Client(transport=httpx.MockTransport(away)))

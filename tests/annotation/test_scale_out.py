"""Several server processes, clips in object storage, copies on Ray, alerts to a webhook and a mailbox."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from annotation.alerts import AlertsConfig, look, quality_alarms
from annotation.api.app import create_app
from annotation.api.server import bind, bind_several
from annotation.client import AnnotationClient
from annotation.place import Place, write_place
from annotation.storage import Files
from annotation.store import Store
from annotation.transcoding import copy_pool
from reelhf.cli import main
from reelhf.errors import UserError
from tests.annotation.annotation_cases import PASSWORD, SMALL, plain_verdict, records
from tests.annotation.test_access import sign_in

ROOT = Path(__file__).resolve().parents[2]


# --- several processes ---


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    found = [int(child) for child in text.split()]
    return [c for c in found if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


@pytest.mark.postgres
@pytest.mark.slow
@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_several_processes_are_one_site_and_one_that_dies_is_replaced(new_project):
    store = new_project(tasks=12, annotators=4)
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    (store.media.parent / "serve.yaml").write_text("serve: {must_watch: 0}")
    line = [sys.executable, "-m", "reelhf", "annotate", "serve", str(store.media.parent)]
    line += ["--config", str(store.media.parent / "serve.yaml")]
    server = subprocess.Popen(
        [*line, "--port", str(port), "--workers", "2"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return httpx.get(f"{url}/healthz", trust_env=False, timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def wait_until(true, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert server.poll() is None, "the server ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.2)

    try:
        wait_until(answers)
        wait_until(lambda: len(children(server.pid)) == 2)
        first = children(server.pid)

        def work(name: str) -> None:
            with AnnotationClient(url, name, PASSWORD) as client:
                while task := client.claim():
                    assert client.media(task.clips[0].url)
                    client.submit(task, plain_verdict(task))

        threads = [threading.Thread(target=work, args=(f"ann{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (store.counts()["judgments"], store.counts()["open_tasks"]) == (12, 0)
        os.kill(first[0], signal.SIGKILL)
        wait_until(lambda: len(set(children(server.pid)) - {first[0]}) == 2)
        wait_until(answers)
    finally:
        server.send_signal(signal.SIGINT)
        said, _ = server.communicate(timeout=60)
    assert "next: reelhf annotate export" in said


# --- object storage ---


def write_and_read_elsewhere(tmp_path: Path, clip_files: list[Path], remote: str) -> None:
    """One machine makes the project, another, with an empty folder, serves its clips."""
    one, other = tmp_path / "one", tmp_path / "other"
    write_place(one, Place(media=remote))
    with Store.open(one) as store:
        ids = store.add_clips(records(clip_files)[:4])
        store.create_tasks([ids], presentation=SMALL)
        store.add_user("ann0", PASSWORD)
        shown = {path.name for path in (one / "media" / "shown").iterdir()}
    write_place(other, Place(media=remote))
    (other / "annotation.db").write_bytes((one / "annotation.db").read_bytes())
    with Store.open(other) as store, TestClient(create_app(store, page=False)) as client:
        assert not list((other / "media").rglob("*.mp4"))
        headers = sign_in(client, "ann0")
        task = client.post("/api/claim", json={}, headers=headers).json()["task"]
        for clip in task["clips"]:
            answer = client.get(clip["url"], headers={**headers, "Range": "bytes=4-7"})
            assert (answer.status_code, answer.content) == (206, b"ftyp")
        assert {path.name for path in (other / "media" / "shown").iterdir()} == shown
        store.create_tasks([[1, 2]], presentation=SMALL)
        assert store.counts()["tasks"] == 2, "originals come from the storage too"


def test_a_second_machine_serves_clips_from_shared_storage(tmp_path, clip_files):
    write_and_read_elsewhere(tmp_path, clip_files, f"file://{tmp_path / 'bucket'}")
    assert list((tmp_path / "bucket" / "clips").iterdir())


def test_clips_live_in_a_bucket_that_speaks_s3(tmp_path, clip_files, monkeypatch):
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        httpx.put(f"http://{host}:{port}/labels", trust_env=False)
        write_and_read_elsewhere(tmp_path, clip_files, "s3://labels/team")
        listed = httpx.get(f"http://{host}:{port}/labels", trust_env=False).text
        assert listed.count("<Key>team/clips/") == 4
    finally:
        server.stop()


def test_storage_that_is_missing_or_unknown_is_one_line(tmp_path):
    files = Files(tmp_path, "nonsense://bucket")
    with pytest.raises(UserError, match="no address of object storage"):
        files.local("shown/x.mp4")
    with pytest.raises(FileNotFoundError):
        Files(tmp_path, f"file://{tmp_path / 'empty'}").local("shown/x.mp4")
    for key in ("../x", "/etc/passwd"):
        with pytest.raises(ValueError, match="leads out of"):
            Files(tmp_path).local(key)


# --- where copies are made ---


def test_an_unknown_engine_is_named(new_project):
    store = new_project(tasks=1)
    with pytest.raises(UserError, match="engine is 'cloud'; expected one of local, ray"):
        store.create_tasks([[1, 2]], engine="cloud")


@pytest.mark.slow
def test_ray_makes_the_same_copies_as_threads(tmp_path, clip_files):
    pytest.importorskip("ray")
    names = {}
    for engine in ("local", "ray"):
        with Store.open(tmp_path / engine) as store:
            ids = store.add_clips(records(clip_files)[:8])
            store.create_tasks([ids[:4], ids[4:]], presentation=SMALL, engine=engine)
            shown = store.media / "shown"
            names[engine] = {path.name: path.read_bytes() for path in shown.iterdir()}
    assert len(names["ray"]) == 8
    assert names["ray"] == names["local"]


def test_without_ray_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=re.escape("pip install 'reelhf[ray]'")), copy_pool("ray"):
        pass


# --- alerts ---


@contextmanager
def web_sink() -> Iterator[tuple[str, list[dict], list[int]]]:
    """An address, what it was sent, and the status it answers (its first element)."""
    got: list[dict] = []
    status = [200]

    class Sink(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status[0])
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hooks/secret-path", got, status
    server.shutdown()
    server.server_close()


@contextmanager
def mail_sink() -> Iterator[tuple[int, list[str]]]:
    """A mail server's port and the messages it took."""
    got: list[str] = []

    class Sink(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 sink\r\n")
            for line in self.rfile:
                word = line[:4].upper()
                if word == b"DATA":
                    self.wfile.write(b"354 go on\r\n")
                    lines = iter(self.rfile.readline, b".\r\n")
                    got.append(b"".join(lines).decode())
                elif word == b"QUIT":
                    self.wfile.write(b"221 bye\r\n")
                    return
                self.wfile.write(b"250 ok\r\n")

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Sink)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1], got
    server.shutdown()
    server.server_close()


def test_an_empty_queue_is_told_once_until_it_has_been_filled(new_project):
    store = new_project(tasks=3)
    with web_sink() as (url, posted, status), mail_sink() as (port, mailed):
        config = AlertsConfig(
            min_open_tasks=3,
            webhook_url=url,
            smtp_host="127.0.0.1",
            smtp_port=port,
            smtp_starttls=False,
            mail_to=("lead@example.org",),
        )
        status[0] = 500
        failed = look(store, config)
        assert failed.new == ("queue empty",)
        assert failed.failures == ("the webhook at 127.0.0.1 failed: HTTPStatusError",)
        assert "secret-path" not in str(failed)
        status[0] = 200
        assert look(store, config).new == ("queue empty",), "what was not sent is told again"
        assert look(store, config).new == ()
        assert posted[-1]["alert"] == "queue empty"
        assert posted[-1]["text"].startswith("3 of 3 tasks are open")
        assert "Subject: [project] queue empty" in mailed[-1]
        store.create_tasks([[1, 2]], presentation=SMALL)
        assert look(store, config).raised == {}
        assert look(store, config.model_copy(update={"min_open_tasks": 4})).new == ("queue empty",)


def test_quality_alarms_rise_only_on_enough_evidence():
    def person(**changes: object) -> dict:
        fine = {"share": 0.1, "low": 0.0, "high": 0.9}
        base = {"annotator": "a1", "tasks": 50, "simulated": False, "too_fast": fine, "gold": fine}
        return {**base, **changes}

    def raised(*people: dict, p_value: float = 0.5) -> list[str]:
        bias = {4: {"best": [40, 3, 2, 1], "p_value": p_value}}
        report = {"annotators": people, "position_bias": bias}
        return sorted(quality_alarms(report, AlertsConfig()))

    hasty = {"share": 0.8, "low": 0.6, "high": 0.9}
    assert raised(person()) == []
    assert raised(person(too_fast=hasty)) == ["too fast: a1"]
    assert raised(person(too_fast=hasty, tasks=5)) == []
    assert raised(person(too_fast=hasty, simulated=True)) == []
    assert raised(person(gold={"share": 0.2, "low": 0.1, "high": 0.4})) == ["gold: a1"]
    assert raised(person(gold={"share": 0.2, "low": 0.1, "high": 0.7})) == []
    assert raised(person(too_fast=None, gold=None), p_value=1e-9) == ["position bias: 4 clips"]


def test_watch_looks_once_and_says_what_it_saw(new_project, capsys):
    store = new_project(tasks=1)
    main(["annotate", "watch", str(store.media.parent), "--once"])
    assert "nothing is wrong" in capsys.readouterr().out
    account = store.find_user("ann0")
    from annotation import claims

    task = claims.claim(store, account, lease_seconds=60)
    claims.submit(store, account, task.presentation, "key-0123", plain_verdict(task))
    main(["annotate", "watch", str(store.media.parent), "--once"])
    assert "queue empty: 0 of 1 tasks are open" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["annotate", "watch", str(store.media.parent)])
    assert "alerts.webhook_url" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux deals out connections")
def test_server_processes_get_about_equal_shares_of_the_connections():
    with bind("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    listeners = bind_several("127.0.0.1", port, 2)
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    shares = []
    for listener in listeners:
        listener.setblocking(False)
        shares.append(0)
        with suppress(BlockingIOError):
            while True:
                listener.accept()[0].close()
                shares[-1] += 1
    for open_socket in (*clients, *listeners):
        open_socket.close()
    assert sum(shares) == len(clients)
    assert min(shares) > 20  # of 100 thrown by chance fewer come once in 10^10


def test_a_port_that_server_processes_share_is_still_taken_for_another_server():
    with bind("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    listeners = bind_several("127.0.0.1", port, 2)
    with pytest.raises(UserError, match="Choose another port"):
        bind("127.0.0.1", port)
    for listener in listeners:
        listener.close()

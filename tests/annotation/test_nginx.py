"""The nginx recipe of deploy/README.md, word for word, before the real `serve`: TLS, sign-in, clips by range, limits, the webhook."""

from __future__ import annotations

import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from annotation import schema
from annotation.api.server import bind
from annotation.api.sessions import COOKIE
from annotation.label_studio.webhook import SECRET_HEADER, webhook_secret
from annotation.store import Store
from tests.annotation.annotation_cases import PASSWORD, SMALL, records, rows
from tests.annotation.test_hostile import answer_to

ROOT = Path(__file__).resolve().parents[2]
WAYS = ["kept", "stripped"]
NGINX = """
daemon off; master_process off; worker_processes 1; pid nginx.pid; error_log stderr warn;
events {{}}
http {{
    access_log off; client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    {servers}
}}
"""

pytestmark = pytest.mark.skipif(
    shutil.which("nginx") is None or shutil.which("openssl") is None,
    reason="needs nginx and openssl: apt-get install nginx openssl",
)


@dataclass
class Front:
    """nginx before the app, and what is behind it."""

    urls: dict[str, str]
    """Way -> address of the site: the prefix `kept`, `stripped`, or before a server that repeats the headers it got (`echo`)."""
    context: ssl.SSLContext
    store: Store

    @contextmanager
    def client(self, way: str = "kept", **options: object) -> Iterator[httpx.Client]:
        with httpx.Client(
            base_url=self.urls[way], verify=self.context, trust_env=False, timeout=60, **options
        ) as http:
            yield http

    @contextmanager
    def signed_in(self, way: str) -> Iterator[httpx.Client]:
        with self.client(way) as http:
            answer = http.post("/api/login", json={"name": "ann", "password": PASSWORD})
            http.headers["X-CSRF-Token"] = answer.headers["X-CSRF-Token"]
            yield http


def free_port() -> int:
    with bind("127.0.0.1", 0) as listener:
        return int(listener.getsockname()[1])


def recipe(port: int, app: str, folder: Path) -> str:
    """The server block of deploy/README.md with this machine's addresses."""
    text = (ROOT / "deploy" / "README.md").read_text()
    (block,) = re.findall(r"```nginx\n(.*?)```", text, flags=re.DOTALL)
    for ours, here in (
        ("listen 443 ", f"listen 127.0.0.1:{port} "),
        ("labels.example.org", "localhost"),
        ("/etc/ssl/labels", str(folder / "labels")),
        ("http://127.0.0.1:7860;", f"{app};"),
    ):
        assert block.count(ours) >= 1, ours
        block = block.replace(ours, here)
    return block


@contextmanager
def echo() -> Iterator[int]:
    """A server whose answer is the headers it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = "\n".join(f"{name}: {value}" for name, value in self.headers.items()).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@contextmanager
def running(line: list[str], ready: Callable[[], bool]) -> Iterator[None]:
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not ready():
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


def answers(url: str, verify: ssl.SSLContext | bool = True) -> bool:
    try:
        return httpx.get(url, trust_env=False, verify=verify, timeout=5).status_code < 500
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def front(clip_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("nginx")
    store = Store.open(folder / "project")
    ids = store.add_clips(records(clip_files)[:4])
    store.create_tasks([ids] * 4, presentation=SMALL)
    store.add_user("ann", PASSWORD)
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=DNS:localhost -keyout {folder}/labels.key -out {folder}/labels.pem",
        shell=True,
        check=True,
        capture_output=True,
    )
    context = ssl.create_default_context(cafile=folder / "labels.pem")
    app = free_port()
    with echo() as echoing:
        ports = {way: free_port() for way in (*WAYS, "echo")}
        behind = {
            "kept": f"http://127.0.0.1:{app}",
            "stripped": f"http://127.0.0.1:{app}/",
            "echo": f"http://127.0.0.1:{echoing}",
        }
        servers = "\n".join(recipe(ports[way], behind[way], folder) for way in ports)
        (folder / "nginx.conf").write_text(NGINX.format(servers=servers))
        urls = {way: f"https://localhost:{port}/labels" for way, port in ports.items()}
        serve = [sys.executable, "-m", "reelhf", "annotate", "serve", str(store.media.parent)]
        serve += ["--port", str(app), "--root-path", "/labels", "--secure-cookie"]
        (folder / "team.yaml").write_text("serve: {must_watch: 0}\n")
        serve += ["--config", str(folder / "team.yaml")]
        with (
            running(
                [*serve, "--trust-proxy", "127.0.0.1"],
                lambda: answers(f"http://127.0.0.1:{app}/labels/healthz"),
            ),
            running(
                ["nginx", "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")],
                lambda: answers(urls["kept"] + "/healthz", context),
            ),
        ):
            yield Front(urls, context, store)
    store.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_visitor_is_sent_to_a_sign_in_page_that_works_and_gets_a_cookie_for_tls_alone(front, way):
    with front.client(way) as http:
        home = http.get("/", headers={"Accept": "text/html"})
        assert (home.status_code, home.headers["location"]) == (303, "/labels/login")
        page = http.get("/login")
        assert 'action="/labels/login"' in page.text
        assert "max-age" in page.headers["strict-transport-security"]
        assert http.get("/annotate/login.css").status_code == 200
        origin = front.urls[way].removesuffix("/labels")  # as a browser says it: with the port
        fields = {"name": "ann", "password": PASSWORD}
        for said, status in ((origin, 303), ("https://evil.example", 403)):
            answer = http.post("/login", data=fields, headers={"Origin": said})
            assert answer.status_code == status
            cookie = answer.headers.get("set-cookie", "")
            assert all(word in cookie for word in ("Secure", "HttpOnly", "Path=/labels/")) == (
                status == 303
            )
        assert http.get("/api/me").json()["name"] == "ann"


@pytest.mark.parametrize("way", WAYS)
def test_a_clip_comes_whole_and_by_range_and_the_answer_is_stored(front, way):
    with front.signed_in(way) as http:
        task = http.post("/api/claim", json={}).json()["task"]
        url = front.urls[way].removesuffix("/labels") + task["clips"][0]["url"]
        whole = http.get(url)
        assert whole.headers["accept-ranges"] == "bytes"
        assert int(whole.headers["content-length"]) == len(whole.content)
        for asked, expected in (
            ("bytes=4-11", whole.content[4:12]),
            ("bytes=-5", whole.content[-5:]),
            (f"bytes={len(whole.content) - 1}-", whole.content[-1:]),
        ):
            part = http.get(url, headers={"Range": asked})
            assert (part.status_code, part.content) == (206, expected)
            assert part.headers["content-range"].endswith(f"/{len(whole.content)}")
            assert http.cookies[COOKIE] not in str(part.headers)
        past = http.get(url, headers={"Range": f"bytes={len(whole.content)}-"})
        assert past.status_code == 416
        answer = http.post("/api/submit", json=answer_to(task, f"key-by-nginx-{way}"))
        assert answer.status_code == 200
        assert answer.json()["judgment_id"] in {
            row.id for row in rows(front.store, schema.judgment)
        }


@pytest.mark.parametrize(("size", "by"), [(100_000, "app"), (1_100_000, "nginx")])
def test_an_upload_that_is_too_large_is_refused_by_the_app_or_before_it(front, size, by):
    with front.signed_in("kept") as http:
        answer = http.post("/api/draft", json={"draft": "x" * size})
        assert answer.status_code == 413
        assert ("nginx" in answer.text) == (by == "nginx")


def test_the_webhook_of_label_studio_passes_with_its_secret_alone(front):
    event = {"action": "ANNOTATION_UPDATED", "annotation": {"id": 7, "updated_at": "2026-01-01"}}
    with front.client() as http:
        for secret, said in (("forged", None), (webhook_secret(front.store), {"noted": True})):
            answer = http.post(
                "/webhooks/label-studio", json=event, headers={SECRET_HEADER: secret}
            )
            assert answer.status_code == (200 if said else 403)
            assert said is None or answer.json() == said


def test_what_a_visitor_says_of_where_they_come_from_is_overwritten(front):
    forged = {"X-Forwarded-For": "10.6.6.6", "X-Forwarded-Proto": "http"}
    with front.client("echo", headers=forged) as http:
        seen = dict(line.split(": ", 1) for line in http.get("/").text.splitlines())
    assert seen["X-Forwarded-For"] == "127.0.0.1"
    assert seen["X-Forwarded-Proto"] == "https"
    assert "https://" + seen["Host"] + "/labels" == front.urls["echo"]


def test_browsers_are_offered_http_2(front):
    host, port = re.fullmatch(r"https://(\w+):(\d+)/labels", front.urls["kept"]).groups()
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    connection = socket.create_connection((host, int(port)))
    with connection, context.wrap_socket(connection) as tls:
        assert tls.selected_alpn_protocol() == "h2"


@pytest.mark.browser
@pytest.mark.parametrize("way", WAYS)
def test_the_page_is_judged_on_through_the_proxy(front, browser, way):
    from tests.annotation.test_browser import PATIENCE_MS, press, wait_for_text

    page = browser.new_context(ignore_https_errors=True).new_page()
    page.set_default_timeout(PATIENCE_MS)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(front.urls[way] + "/")
    page.fill("[name=name]", "ann")
    page.fill("[name=password]", PASSWORD)
    page.keyboard.press("Enter")
    page.wait_for_selector("#player video")
    page.wait_for_function("window.reelhf.times().length === 4")
    before = len(rows(front.store, schema.judgment))
    page.wait_for_function(
        "[...document.querySelectorAll('#player video')].every((v) => v.readyState >= 2 && v.played.length)"
    )
    press(page, "t", "t", "t", "t")
    page.wait_for_timeout(1500)  # the clips last 0.6 s, and must have been seen
    press(page, "Enter")
    wait_for_text(page, "#status", "Saved as #")
    assert len(rows(front.store, schema.judgment)) == before + 1
    assert errors == []

"""Who may do what: every route against every kind of visitor, tokens, expiring links, the proxy, the identity provider."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
import sqlalchemy as sa
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from annotation import schema
from annotation.api.app import ROUTERS, create_app
from annotation.api.oidc import link_identity
from annotation.api.policy import ANYTHING_ELSE, rule_for
from annotation.api.server import running_server
from annotation.api.sessions import COOKIE
from annotation.api.tokens import Tokens
from annotation.api.workers import check_exposure, usual_workers
from annotation.config import AnnotateConfig, OidcConfig
from annotation.store import Store
from reelhf.cli import main
from reelhf.errors import UserError
from tests.annotation.annotation_cases import PASSWORD, rows

ROLES = ("annotator", "reviewer", "admin")
OWN_ROUTES = [
    (method, route.path)
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute)
    for method in sorted(route.methods)
]
WHO_MAY = {  # what passes the gate: roles by cookie, then token scopes
    "public": (
        "/login",
        "/api/login",
        "/healthz",
        "/link/{token}",
        "/oidc/start",
        "/oidc/callback",
        "/media/task/{uid}/{position}",
        "/webhooks/label-studio",
    ),
    "annotator": (
        "/api/logout",
        "/api/tokens",
        "/api/tokens/{token_id}",
        "/api/flagged",  # experts may be annotators; test_flags says who sees the list and decides
        "/api/decide",
        "/media/held/{task_id}/{position}",
        "/annotate/{name}",
    ),
    "annotator, token judge": (
        "/api/claim",
        "/api/submit",
        "/api/back",
        "/api/skip",
        "/api/flag",
        "/api/heartbeat",
        "/api/draft",
        "/media/{token}",
    ),
    "annotator, token read": ("/api/me", "/api/progress", "/api/guide"),
    "reviewer, token read": ("/api/counts", "/api/quality"),
    "reviewer": ("/quality", "/flags"),
    "admin": ("/api/users",),
}


@pytest.fixture
def site(new_project) -> Iterator[tuple[Store, TestClient]]:
    """A project with one account of each role, and its HTTP API without a network."""
    store = new_project(tasks=2, annotators=0)
    for role in ROLES:
        store.add_user(role, PASSWORD, role=role)
    with TestClient(create_app(store, page=False), follow_redirects=False) as client:
        yield store, client


def sign_in(client: TestClient, name: str) -> dict[str, str]:
    """The headers of a signed-in browser."""
    answer = client.post("/api/login", json={"name": name, "password": PASSWORD})
    client.cookies.clear()
    cookie = answer.headers["set-cookie"].partition(";")[0]
    return {"Cookie": cookie, "X-CSRF-Token": answer.headers["X-CSRF-Token"]}


def filled(path: str) -> str:
    return (
        path.replace("{uid}/{position}", "none/0")
        .replace("{task_id}/{position}", "99999/0")
        .replace("{token_id}", "99999")
        .replace("{token}", "none")
        .replace("{name}", "a.css")
    )


# --- roles ---


def test_every_route_of_ours_is_in_the_matrix_and_has_a_rule():
    named = {path for paths in WHO_MAY.values() for path in paths}
    assert {path for _, path in OWN_ROUTES} <= named
    for _, path in OWN_ROUTES:
        assert rule_for(filled(path)) is not ANYTHING_ELSE, path


def test_each_route_lets_in_exactly_those_it_is_for(site):
    store, client = site
    browsers = {role: sign_in(client, role) for role in ROLES}
    admin = store.find_user("admin")
    bearers = {
        scope: {"Authorization": f"Bearer {Tokens(store).create(admin, scope, [scope])[0]}"}
        for scope in ("judge", "read")
    }
    wrong = []
    for method, path in OWN_ROUTES:
        if path == "/api/logout":
            continue  # it would end the session that the others need
        group = next(group for group, paths in WHO_MAY.items() if path in paths)
        rank = ROLES.index(group.partition(",")[0]) if group != "public" else -1
        scope = group.partition("token ")[2]
        expected = {"nobody": group == "public"}
        expected |= {role: ROLES.index(role) >= rank for role in ROLES}
        expected |= {f"token {s}": group == "public" or s == scope for s in bearers}
        senders = {"nobody": {}, **browsers, **{f"token {s}": b for s, b in bearers.items()}}
        for who, headers in senders.items():
            answer = client.request(method, filled(path), headers=headers)
            detail = (
                answer.json().get("detail", "")
                if "json" in answer.headers.get("content-type", "")
                else ""
            )
            refused = answer.status_code in (401, 403) and detail.startswith(
                (
                    "sign in first",
                    "API tokens are not",
                    "the API token lacks",
                    "this is for",
                    "the X-CSRF",
                )
            )
            if refused == expected[who]:
                wrong.append((method, path, who, answer.status_code, detail))
    assert wrong == []


def test_a_role_taken_away_stops_working_within_seconds(site, monkeypatch):
    store, client = site
    headers = sign_in(client, "admin")
    assert client.get("/api/users", headers=headers).status_code == 200
    store.set_role("admin", "annotator")
    later = time.monotonic() + 6
    monkeypatch.setattr("annotation.api.sessions.time.monotonic", lambda: later)
    answer = client.get("/api/users", headers=headers)
    assert (answer.status_code, answer.json()["detail"]) == (403, "this is for admins")


# --- tokens ---


def test_a_token_works_until_it_is_revoked_or_expires_and_only_its_hash_is_kept(site, clock):
    store, client = site
    headers = sign_in(client, "annotator")
    made = client.post(
        "/api/tokens", json={"label": "robot", "scopes": ["judge"], "days": 2}, headers=headers
    ).json()
    bearer = {"Authorization": f"Bearer {made['token']}"}
    claimed = client.post("/api/claim", json={}, headers=bearer)
    assert claimed.json()["task"]["clips"], (
        "a script needs no CSRF token: no browser sends its header"
    )
    assert client.get(claimed.json()["task"]["clips"][0]["url"], headers=bearer).status_code == 200
    with store.read() as connection:
        row = connection.execute(sa.select(schema.api_token)).one()
    assert made["token"] not in str(row)
    listed = client.get("/api/tokens", headers=headers).json()["tokens"]
    assert [token["label"] for token in listed] == ["robot"]
    assert "token" not in listed[0]
    clock.seconds += 2 * 86_400 + 1
    assert client.post("/api/claim", json={}, headers=bearer).status_code == 401
    clock.seconds -= 86_400
    assert client.post("/api/claim", json={}, headers=bearer).status_code == 200
    headers, stranger = sign_in(client, "annotator"), sign_in(client, "reviewer")
    path = f"/api/tokens/{made['id']}"
    assert client.delete(path, headers=stranger).status_code == 404
    assert client.delete(path, headers=headers).json() == {"revoked": True}
    assert client.post("/api/claim", json={}, headers=bearer).status_code == 401
    me = store.find_user("annotator").pseudonym
    done = [e for e in rows(store, schema.event) if e.action.startswith("token")]
    assert [(e.actor, e.action, e.subject) for e in done] == [
        (me, "token create", me),
        (me, "token revoke", me),
    ]
    assert "robot" not in str(done), "a label may name someone"


def test_tokens_that_make_no_sense_are_refused(site):
    store, client = site
    headers = sign_in(client, "annotator")
    for body in (
        {"label": "x", "scopes": ["everything"]},
        {"label": "x", "scopes": []},
        {"label": " ", "scopes": ["read"]},
        {"label": "x", "scopes": "read"},
        {"label": "x", "scopes": ["read"], "days": -1},
        {"label": "x", "scopes": ["read"], "days": True},
    ):
        assert client.post("/api/tokens", json=body, headers=headers).status_code == 422, body
    assert Tokens(store).of(store.find_user("annotator")) == []


def test_the_command_line_makes_lists_and_ends_tokens_and_changes_roles(site, capsys):
    store, client = site
    project = ["--project", str(store.media.parent)]
    main(["annotate", "token", "create", "annotator", "nightly", "--scope", "read", *project])
    text = capsys.readouterr().out.rpartition(": ")[2].strip()
    assert client.get("/api/me", headers={"Authorization": f"Bearer {text}"}).status_code == 200
    main(["annotate", "token", "list", "annotator", *project])
    assert "live     read         nightly" in capsys.readouterr().out
    main(["annotate", "token", "revoke", "annotator", "1", *project])
    assert client.get("/api/me", headers={"Authorization": f"Bearer {text}"}).status_code == 401
    main(["annotate", "user", "role", "annotator", "reviewer", *project])
    main(["annotate", "user", "password", "annotator", "--password", "another one", *project])
    main(["annotate", "user", "list", str(store.media.parent)])
    assert capsys.readouterr().out.count("reviewer  ") == 2
    assert store.check_password("annotator", "another one").role == "reviewer"


# --- media links ---


def test_a_link_to_a_clip_expires_and_cannot_be_stretched(site, clock):
    _, client = site
    headers = sign_in(client, "annotator")
    url = client.post("/api/claim", json={}, headers=headers).json()["task"]["clips"][0]["url"]
    assert client.get(url, headers=headers).status_code == 200
    part = client.get(url, headers={**headers, "Range": "bytes=5-9"})
    assert (part.status_code, len(part.content)) == (206, 5)
    path, _, query = url.partition("?")
    fields = {name: value[0] for name, value in parse_qs(query).items()}
    later = str(int(fields["until"]) + 9999)
    for forged in (
        path,
        f"{path}?until={later}&signature={fields['signature']}",
        f"{path}?until={fields['until']}&signature={'0' * 40}",
        f"{path}x?{query}",
    ):
        assert client.get(forged, headers=headers).status_code == 404, forged
    assert client.get(url).status_code == 401, "the link alone lets nobody in"
    clock.seconds += 4 * 3600 + 2
    assert client.get(url, headers=headers).status_code == 410


# --- where it listens, and behind what ---


def test_beyond_this_machine_real_credentials_are_demanded():
    assert check_exposure("127.0.0.1", demo=True, encrypted=False, plain_http=False) is None
    assert "--demo" in check_exposure("0.0.0.0", demo=True, encrypted=True, plain_http=True)
    assert "in the clear" in check_exposure(
        "10.0.0.5", demo=False, encrypted=False, plain_http=False
    )
    assert check_exposure("10.0.0.5", demo=False, encrypted=True, plain_http=False) is None
    assert check_exposure("10.0.0.5", demo=False, encrypted=False, plain_http=True) is None


@pytest.mark.parametrize("strips", [True, False])
def test_under_a_root_path_every_address_carries_it_whether_or_not_the_proxy_strips_it(
    new_project, strips
):
    store = new_project(tasks=1)
    app = create_app(store, AnnotateConfig(root_path="/labels"), page=False)
    with TestClient(app, follow_redirects=False) as client:
        asked = "" if strips else "/labels"
        home = client.get(f"{asked}/", headers={"Accept": "text/html"})
        assert home.headers["location"] == "/labels/login"
        page = client.get(f"{asked}/login").text
        assert 'action="/labels/login"' in page
        assert 'href="/labels/annotate/login.css"' in page
        answer = client.post(f"{asked}/api/login", json={"name": "ann0", "password": PASSWORD})
        assert "Path=/labels/" in answer.headers["set-cookie"]
        headers = {
            "Cookie": answer.headers["set-cookie"].partition(";")[0],
            "X-CSRF-Token": answer.headers["X-CSRF-Token"],
        }
        task = client.post(f"{asked}/api/claim", json={}, headers=headers).json()["task"]
        url = task["clips"][0]["url"]
        assert url.startswith("/labels/media/")
        assert client.get(asked + url.removeprefix("/labels"), headers=headers).status_code == 200


@pytest.mark.parametrize("trusted", [(), ("127.0.0.1",), ("127.0.0.0/8",)])
def test_a_forwarded_address_is_believed_only_from_a_trusted_proxy(
    new_project, trusted, monkeypatch
):
    monkeypatch.setattr("annotation.api.throttle.ADDRESS_FACTOR", 2)
    store = new_project(tasks=1)
    app = create_app(store, AnnotateConfig(login_failures=1), page=False)
    with running_server(app, trusted_proxies=trusted) as url:

        def guess(number: int) -> int:
            headers = {"X-Forwarded-For": f"10.0.0.{number}"}
            body = {"name": f"nobody{number}", "password": "wrong password"}
            return httpx.post(
                url + "/api/login", json=body, headers=headers, trust_env=False, timeout=60
            ).status_code

        codes = [guess(number) for number in range(3)]
    assert codes == [401] * 2 + ([401] if trusted else [429])


def test_over_https_the_cookie_is_secure_and_browsers_remember_it(new_project):
    store = new_project(tasks=1)
    with TestClient(create_app(store, AnnotateConfig(secure_cookie=True), page=False)) as client:
        answer = client.post("/api/login", json={"name": "ann0", "password": PASSWORD})
        assert "Secure" in answer.headers["set-cookie"]
        assert "max-age" in answer.headers["strict-transport-security"]


def test_two_processes_serve_postgres_unless_there_is_one_core(new_project):
    database = new_project(tasks=1).database
    assert usual_workers(database, cores=8) == (1 if database.is_sqlite else 2)
    assert usual_workers(database, cores=1) == 1


def test_several_workers_are_refused_on_sqlite_and_an_open_address_without_tls(tmp_path, capsys):
    Store.open(tmp_path / "p").close()
    for words, message in (
        (["--workers", "2", "--port", "0"], "needs PostgreSQL"),
        (["--host", "0.0.0.0", "--port", "0"], "in the clear"),
        (["--host", "0.0.0.0", "--port", "0", "--demo"], "--demo signs in without a password"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["annotate", "serve", str(tmp_path / "p"), *words])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


# --- OpenID Connect ---


class Provider(BaseHTTPRequestHandler):
    """A tiny identity provider: it vouches for whoever `claims` says."""

    key = None
    claims: ClassVar[dict] = {}
    nonce = ""
    seen: ClassVar[dict] = {}

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        issuer = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/keys":
            self._answer({"keys": [type(self).key.as_dict(private=False)]})
        else:
            self._answer(
                {
                    "issuer": issuer,
                    "authorization_endpoint": f"{issuer}/authorize",
                    "token_endpoint": f"{issuer}/token",
                    "jwks_uri": f"{issuer}/keys",
                }
            )

    def do_POST(self) -> None:
        from joserfc import jwt

        cls = type(self)
        cls.seen = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        claims = {
            "iss": f"http://127.0.0.1:{self.server.server_port}",
            "aud": "reelhf",
            "sub": "person-7",
            "preferred_username": "kim",
            "exp": int(time.time()) + 60,
            "nonce": cls.nonce,
            **cls.claims,
        }
        token = jwt.encode({"alg": "ES256", "kid": "k"}, claims, cls.key)
        self._answer({"access_token": "a", "token_type": "Bearer", "id_token": token})


@pytest.fixture
def provider() -> Iterator[str]:
    pytest.importorskip("authlib")
    from joserfc.jwk import ECKey

    Provider.key = ECKey.generate_key("P-256", {"kid": "k"})
    Provider.claims, Provider.seen = {}, {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def through_the_provider(client: TestClient, claims: dict | None = None, state: str | None = None):
    """Goes the whole way round; returns the answer to the callback."""
    client.cookies.clear()
    away = client.get("/oidc/start")
    asked = {k: v[0] for k, v in parse_qs(urlsplit(away.headers["location"]).query).items()}
    assert asked["code_challenge_method"] == "S256"
    assert asked["redirect_uri"] == "http://testserver/oidc/callback"
    Provider.nonce, Provider.claims = asked["nonce"], claims or {}
    back = {"code": "the-code", "state": state or asked["state"]}
    return client.get("/oidc/callback", params=back)


def oidc_client(store: Store, provider: str, **options: object) -> TestClient:
    oidc = OidcConfig(
        issuer=provider, client_id="reelhf", public_url="http://testserver", **options
    )
    app = create_app(store, AnnotateConfig(oidc=oidc), page=False)
    return TestClient(app, follow_redirects=False)


def test_an_identity_signs_in_as_the_account_it_is_linked_to(new_project, provider):
    store = new_project(tasks=1)
    with oidc_client(store, provider) as client:
        assert "/oidc/start" in client.get("/login").text
        refused = through_the_provider(client)
        assert refused.status_code == 403
        assert "annotate user link" in refused.json()["detail"]
        link_identity(store, store.find_user("ann0"), provider, "person-7")
        answer = through_the_provider(client)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert COOKIE in answer.headers["set-cookie"]
        assert client.get("/api/me").json()["name"] == "ann0"
        assert Provider.seen["code_verifier"][0]
    with pytest.raises(UserError, match="already linked"):
        link_identity(store, store.find_user("ann1"), provider, "person-7")


def test_an_identity_may_get_an_account_but_never_one_that_has_its_name(new_project, provider):
    store = new_project(tasks=1, annotators=1)
    with oidc_client(store, provider, create_accounts=True) as client:
        assert through_the_provider(client).status_code == 303
        assert client.get("/api/me").json() | {"csrf": ""} == client.get("/api/me").json() | {
            "csrf": ""
        }
        assert (client.get("/api/me").json()["name"], client.get("/api/me").json()["role"]) == (
            "kim",
            "annotator",
        )
        claims = {"sub": "other", "preferred_username": "ann0"}
        assert through_the_provider(client, claims).status_code == 303
        assert client.get("/api/me").json()["name"].startswith("ann0 ")
    made = [e for e in rows(store, schema.event) if e.action in ("user add", "user link")]
    kim = store.find_user("kim").pseudonym
    assert [(e.actor, e.action) for e in made if e.subject == kim] == [
        (kim, "user add"),
        (kim, "user link"),
    ]
    typed = store.find_user("ann0").pseudonym
    assert [(e.actor, e.action) for e in made if e.subject == typed] == [
        ("command line", "user add")
    ]


@pytest.mark.parametrize(
    "claims",
    [
        {"nonce": "replayed"},
        {"aud": "another site"},
        {"exp": 1},
        {"iss": "http://evil.example"},
        {"sub": None},
    ],
)
def test_a_token_that_proves_nothing_signs_nobody_in(new_project, provider, claims):
    store = new_project(tasks=1)
    with oidc_client(store, provider, create_accounts=True) as client:
        assert through_the_provider(client, claims).status_code == 403
        assert COOKIE not in client.cookies
        assert len(store.users()) == 2


def test_a_sign_in_that_began_elsewhere_is_refused(new_project, provider):
    store = new_project(tasks=1)
    with oidc_client(store, provider, create_accounts=True) as client:
        assert through_the_provider(client, state="guess").status_code == 400
        client.cookies.clear()
        answer = client.get("/oidc/callback", params={"code": "c", "state": "s"})
        assert answer.status_code == 400
        assert len(store.users()) == 2

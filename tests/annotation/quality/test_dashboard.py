"""The dashboard: native components, filled by one endpoint that only reviewers and admins may ask."""

from __future__ import annotations

import ast
import re
from collections import Counter

import httpx
import pytest

from annotation import claims
from annotation.api.app import create_app
from annotation.api.server import running_server
from annotation.quality.dashboard import dashboard
from annotation.quality.page import build
from reelhf.errors import UserError
from tests.annotation.annotation_cases import PASSWORD, plain_verdict


@pytest.fixture
def database() -> str:
    return "sqlite"  # the queries run on PostgreSQL in the tests of exports and projects


@pytest.fixture
def judged(new_project):
    store = new_project(tasks=2, need=2)
    for name in ("ann0", "ann1"):
        account = store.find_user(name)
        while task := claims.claim(store, account, lease_seconds=60):
            key = f"key-{task.presentation}"
            claims.submit(store, account, task.presentation, key, plain_verdict(task))
    store.add_user("rev", PASSWORD, role="reviewer")
    return store


def test_the_page_is_native_keeps_no_state_and_calls_no_python():
    config = build(["default", "other"]).get_config_file()
    kinds = Counter(component["type"] for component in config["components"])
    assert kinds["nativeplot"] == 7
    assert kinds["dataframe"] >= 5
    assert not {"state", "html", "image", "file", "timer"} & set(kinds)
    assert config["dependencies"]
    assert all(d["js"] and not d["backend_fn"] for d in config["dependencies"])


def test_every_component_has_a_value_whose_columns_are_those_it_draws(judged):
    values = dashboard(judged, None)
    config = build(["default"]).get_config_file()
    parts = {part["id"]: part for part in config["components"]}
    outputs = config["dependencies"][0]["outputs"]
    names = ast.literal_eval(
        re.search(r"const names = (\[.*?\])", config["dependencies"][0]["js"]).group(1)
    )
    assert set(names) == set(values)
    for part, name in zip(map(parts.__getitem__, outputs), names, strict=True):
        value = values[name]
        if part["type"] == "nativeplot":
            assert value["columns"] == [part["props"]["x"], part["props"]["y"]], name
            assert all(len(row) == 2 for row in value["data"])
        elif part["type"] == "dataframe":
            assert all(len(row) == len(value["headers"]) for row in value["data"]), name
    assert values["progress"]["data"] == [["done", 2]]
    assert sum(number for _, number in values["throughput"]["data"]) == 4
    assert {row[0] for row in values["annotators"]["data"]} == {
        judged.find_user(name).pseudonym for name in ("ann0", "ann1")
    }
    assert len(values["clips"]["data"]) == 12


def test_figures_are_of_one_project_and_an_unknown_one_is_named(judged):
    judged.create_tasks([[1, 2]], project="second round")
    assert dashboard(judged, "second round")["progress"]["data"] == [["open", 1]]
    with pytest.raises(UserError, match=r"no project 'secnd round'.*second round"):
        dashboard(judged, "secnd round")


def test_annotators_may_not_look_and_gradios_file_routes_are_closed_here_too(judged):
    with running_server(create_app(judged)) as url:

        def signed_in(name):
            answer = httpx.post(
                f"{url}/api/login", json={"name": name, "password": PASSWORD}, trust_env=False
            )
            return httpx.Client(
                base_url=url, trust_env=False, timeout=60, cookies=dict(answer.cookies)
            )

        with signed_in("ann0") as annotator, signed_in("rev") as reviewer:
            for path in ("/quality", "/quality/", "/quality/config", "/api/quality"):
                assert annotator.get(path).status_code == 403, path
                assert httpx.get(url + path, trust_env=False).status_code in (303, 401), path
            page = reviewer.get("/quality", follow_redirects=True)
            assert page.status_code == 200
            assert "window.gradio_config" in page.text
            found = reviewer.get("/api/quality")
            assert "annotator-" in found.text
            assert "ann0" not in found.text
            assert reviewer.get("/api/quality?project=none").status_code == 422
            for path in ("file=/etc/passwd", "gradio_api/file=/etc/passwd", "gradio_api/upload"):
                assert reviewer.get(f"/quality/{path}").status_code == 404, path

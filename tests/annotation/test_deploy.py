"""The deployment files say nothing that the program, or the files beside them, would not understand. No container is started."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import tomllib
import typer
import yaml

from annotation.api.workers import check_exposure
from annotation.config import AnnotationConfig
from reelhf.cli import VERBS, load

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
COMPOSE_TEXT = (DEPLOY / "compose.yaml").read_text()
README = (DEPLOY / "README.md").read_text()
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
SERVICE_KEYS = {
    "build",
    "command",
    "depends_on",
    "environment",
    "healthcheck",
    "image",
    "ports",
    "restart",
    "volumes",
}
"""What our services use of the Compose specification."""
POSTGRES_OF_DEBIAN = {"bookworm": 15, "trixie": 17}
"""The major version of `postgresql-client`: a `pg_dump` refuses servers newer than itself."""


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load(COMPOSE_TEXT))


def parse(line: str) -> dict[str, Any]:
    """What the real command line makes of a command, without running it. Raises click's UsageError."""
    words = shlex.split(line)
    while "=" in words[0]:  # environment variables
        words.pop(0)
    assert words[:2] == ["reelhf", "annotate"], line
    command = typer.main.get_command(load(VERBS["annotate"].app))
    words = words[2:]
    while (below := getattr(command, "commands", None)) is not None:
        assert words[0] in below, line
        command = below[words.pop(0)]
    return dict(command.make_context(line, words).params)


def commands_of_compose(compose: dict[str, Any]) -> list[str]:
    shell, flag, script = shlex.split(compose["services"]["app"]["command"])
    assert (shell, flag) == ("sh", "-c")
    run = [part.strip().removeprefix("exec ") for part in script.split("&&")]
    return run + re.findall(r"^#.*?(reelhf annotate .*)$", COMPOSE_TEXT, flags=re.MULTILINE)


def commands_of_readme() -> list[str]:
    quoted = re.findall(r"`([^`]*)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
    lines = [" ".join(words.split()) for words in quoted if "reelhf annotate" in words]
    more = [
        words.replace("...", "reelhf annotate", 1) for words in quoted if words.startswith("... ")
    ]
    return [re.sub(r"\bN\b", "1", line) for line in lines + more]


def test_the_command_line_understands_every_command_of_the_deployment_files(compose):
    lines = commands_of_compose(compose) + commands_of_readme()
    assert len(lines) >= 10
    for line in lines:
        assert parse(line)
    with pytest.raises(Exception, match="No such option"):
        parse("reelhf annotate serve runs/team --workres 2")


def test_what_the_readme_puts_into_a_yaml_is_a_configuration():
    blocks = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        said = yaml.safe_load(block)
        assert AnnotationConfig.model_validate(said).model_fields_set == said.keys() != set()


def test_the_services_name_only_what_is_there(compose):
    services = compose["services"]
    for name, service in services.items():
        assert service.keys() <= SERVICE_KEYS, name
        assert ("image" in service) != ("build" in service), name
        needed = service.get("depends_on", {})
        assert set(needed) <= services.keys()
        for other in needed if isinstance(needed, dict) else ():
            assert needed[other] == {"condition": "service_healthy"}
            assert services[other]["healthcheck"]["test"][0] == "CMD"
        for volume in service.get("volumes", ()):
            source, _, inside = volume.partition(":")
            assert inside.startswith("/")
            known = (
                (DEPLOY / source).is_file() if source[0] == "." else source in compose["volumes"]
            )
            assert known, volume
    build = services["app"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    named = set(re.findall(r"\$\{(\w+)", COMPOSE_TEXT))
    (written,) = re.findall(r"printf '(.*?)'", COMPOSE_TEXT)
    assert named == set(re.findall(r"([A-Z_]+)=", written)), "what .env holds"


def test_the_app_reaches_its_database_and_the_proxy_the_app(compose):
    app, database = compose["services"]["app"], compose["services"]["database"]
    init, serve = (parse(line) for line in commands_of_compose(compose)[:2])
    url = sa.make_url(init["database"])
    settings = database["environment"]
    assert (url.host, url.username) == ("database", settings["POSTGRES_USER"])
    assert url.database == settings["POSTGRES_DB"]
    assert app["environment"]["PGPASSWORD"][:19] == settings["POSTGRES_PASSWORD"][:19]
    assert init["project"] == serve["project"] == Path(app["volumes"][0].partition(":")[2])
    assert f"reverse_proxy app:{serve['port']}" in (DEPLOY / "Caddyfile").read_text()
    assert "{$SITE}" in (DEPLOY / "Caddyfile").read_text()
    assert "SITE" in compose["services"]["proxy"]["environment"]
    assert serve["trust_proxy"]
    exposed = {"demo": serve["demo"], "plain_http": serve["plain_http"]}
    assert serve["host"] == "0.0.0.0"
    assert check_exposure(serve["host"], encrypted=serve["secure_cookie"], **exposed) is None


def test_the_image_holds_the_extras_and_a_postgres_client_as_new_as_the_server(compose):
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"'\.\[(.*?)\]'", DOCKERFILE)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    (debian,) = re.findall(r"^FROM python:[\d.]+-slim-(\w+)", DOCKERFILE, flags=re.MULTILINE)
    assert "postgresql-client" in DOCKERFILE
    server = int(compose["services"]["database"]["image"].removeprefix("postgres:"))
    assert POSTGRES_OF_DEBIAN[debian] >= server, "or no backup could be made"

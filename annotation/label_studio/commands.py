"""`reelhf annotate label-studio ...`"""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reelhf.errors import UserError

if TYPE_CHECKING:
    from annotation.store import Store

app = typer.Typer(no_args_is_help=True, help="The same tasks on a Label Studio server.")

DEFAULT_PROJECT = Path("runs/annotation")
Folder = Annotated[Path, typer.Argument(help="Project folder", show_default=True)]
Server = Annotated[str, typer.Option(help="Address of Label Studio", envvar="LABEL_STUDIO_URL")]
Key = Annotated[
    str, typer.Option(help="API key; better in the environment", envvar="LABEL_STUDIO_API_KEY")
]


@app.command("push")
def push_command(
    folder: Folder = DEFAULT_PROJECT,
    server: Server = "http://127.0.0.1:8080",
    key: Key = "",
    media_url: Annotated[
        str,
        typer.Option(help="How browsers reach this project's own server, which sends the clips"),
    ] = "http://127.0.0.1:7860",
    number: Annotated[
        int | None,
        typer.Option("--ls-project", help="Existing Label Studio project [default: new]"),
    ] = None,
    title: Annotated[str, typer.Option(help="Title of a new one")] = "ReelHF best and worst",
    link_days: Annotated[float, typer.Option(help="Links to clips work this long")] = 90.0,
    webhook: Annotated[
        bool, typer.Option("--webhook", help="Have Label Studio tell our server of changes")
    ] = False,
) -> None:
    """Send every open task that the Label Studio project does not have yet."""
    from annotation.label_studio.push import connect, push
    from annotation.label_studio.webhook import register
    from annotation.store import Store

    with Store.open(folder, create=False) as store:
        client = connect(server, _needed(key))
        done = push(
            client,
            store,
            server=server,
            media_url=media_url,
            project=number,
            title=title,
            link_days=link_days,
        )
        if webhook:
            register(client, store, done.project, media_url.rstrip("/") + "/webhooks/label-studio")
    typer.echo(f"{done.new} tasks sent, {done.known} were there: {server}/projects/{done.project}")
    typer.echo(f"next: reelhf annotate label-studio pull {folder} --ls-project {done.project}")


@app.command("pull")
def pull_command(
    number: Annotated[int, typer.Option("--ls-project", help="Label Studio project")],
    folder: Folder = DEFAULT_PROJECT,
    server: Server = "http://127.0.0.1:8080",
    key: Key = "",
    people: Annotated[
        Path | None,
        typer.Option(help="CSV with the columns email and name: whose account is whose"),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on: pull when the webhook called, and every hour")
    ] = False,
) -> None:
    """Bring in what was said there, checked by our rules; deleted annotations are marked."""
    from annotation.label_studio.pull import pull
    from annotation.label_studio.push import connect
    from annotation.store import Store

    names = {} if people is None else _read_people(people)
    with Store.open(folder, create=False) as store:
        client = connect(server, _needed(key))
        while True:
            done = pull(client, store, server=server, project=number, names=names)
            typer.echo(
                f"{done.stored} stored, {done.surplus} more than wanted, {done.refused} refused, "
                f"{done.deleted} deleted there, {done.known} known"
            )
            for annotation, reason in list(done.reasons.items())[:20]:
                typer.echo(f"  - annotation {annotation}: {reason}")
            if not follow:
                break
            _wait_for_hint(store)
    typer.echo(f"next: reelhf annotate export {folder}")


HOUR = 3600.0
POLL_SECONDS = 5.0


def _wait_for_hint(store: Store) -> None:
    from annotation.label_studio.pull import new_hints

    started = time.monotonic()
    while time.monotonic() - started < HOUR and not new_hints(store):
        time.sleep(POLL_SECONDS)


def _needed(key: str) -> str:
    if not key:
        raise UserError("Label Studio needs an API key: set LABEL_STUDIO_API_KEY")
    return key


def _read_people(path: Path) -> dict[str, str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not rows or not {"email", "name"} <= rows[0].keys():
        raise UserError(f"{path} needs the columns email and name")
    return {row["email"]: row["name"] for row in rows}

"""`reelhf annotate ...`: projects, the annotation page, export."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from annotation.candidates.commands import register as add_candidates
from annotation.exports_commands import register as add_exports
from annotation.label_studio.commands import app as label_studio_app
from annotation.prompts.commands import app as prompts_app
from annotation.quality.commands import register as add_quality
from annotation.upkeep import register as add_upkeep
from reelhf.errors import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from annotation.accounts import Account
    from annotation.quickstart import Plan
from annotation.store import Store

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Clips become tasks, tasks become judgments."
)
clips_app = typer.Typer(no_args_is_help=True, help="Clips of a project.")
tasks_app = typer.Typer(no_args_is_help=True, help="Tasks of a project.")
user_app = typer.Typer(no_args_is_help=True, help="Accounts of a project.")
app.add_typer(clips_app, name="clips")
app.add_typer(tasks_app, name="tasks")
token_app = typer.Typer(no_args_is_help=True, help="API tokens for scripts.")
app.add_typer(user_app, name="user")
app.add_typer(prompts_app, name="prompts")
add_candidates(clips_app, tasks_app)
add_exports(app)
add_quality(app)
add_upkeep(app)
app.add_typer(token_app, name="token")
app.add_typer(label_studio_app, name="label-studio")

DEFAULT_PROJECT = Path("runs/annotation")
DEFAULT_PORT = 7860
MAX_SHOWN = 40

ConfigOption = Annotated[
    Path | None, typer.Option(help="YAML such as configs/annotation/team.yaml")
]
ProjectArgument = Annotated[Path, typer.Argument(help="Project folder", show_default=True)]


@app.command()
def quickstart(
    source: Annotated[
        Path, typer.Argument(help="<model>/<prompt>.mp4 folder, or a manifest .csv or .jsonl")
    ],
    out: Annotated[Path, typer.Option(help="Project folder to make")] = DEFAULT_PROJECT,
    k: Annotated[
        int | None, typer.Option("--k", help="Clips per task, 2 to 8 [default: 4]")
    ] = None,
    need: Annotated[int | None, typer.Option(help="Judgments wanted per task [default: 1]")] = None,
    config: ConfigOption = None,
    with_ratings: Annotated[
        bool, typer.Option("--with-ratings", help="Import FETV's ratings as judgments too")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what fits and stop")] = False,
) -> None:
    """Make a labelling project of anyone's clips."""
    from annotation.config import AnnotationConfig
    from annotation.quickstart import quickstart as make
    from reelhf.config import load_config

    settings = load_config(AnnotationConfig, config)
    project = make(
        source,
        out,
        k=settings.clips_per_task if k is None else k,
        need=settings.judgments_per_task if need is None else need,
        dry_run=dry_run,
        with_ratings=with_ratings,
        presentation=settings.presentation,
    )
    _print_plan(project.plan)
    if dry_run:
        typer.echo(f"dry run: nothing was written. next: the same without --dry-run makes {out}")
        return
    typer.echo(f"project: {out} ({project.num_tasks} tasks)")
    typer.echo(f"sign in as: {project.admin}  password: {project.password}")
    typer.echo(f"next: reelhf annotate serve {out}")


@app.command()
def init(
    project: ProjectArgument = DEFAULT_PROJECT,
    database: Annotated[
        str | None, typer.Option(help="postgresql://user@host/name [default: SQLite in PROJECT]")
    ] = None,
    media: Annotated[
        str | None, typer.Option(help="Object storage, s3://bucket/prefix [default: PROJECT/media]")
    ] = None,
) -> None:
    """Make an empty project, or bring an old one up to date."""
    from annotation.place import Place, write_place
    from annotation.store import Store

    if database or media:
        write_place(project, Place(database=database, media=media))
    with Store.open(project) as store:
        counts = store.counts()
    typer.echo(f"project: {project} ({counts['tasks']} tasks, {counts['judgments']} judgments)")
    typer.echo(f"next: reelhf annotate clips import SOURCE --project {project}")


@app.command()
def serve(
    project: ProjectArgument = DEFAULT_PROJECT,
    port: Annotated[int, typer.Option(help="Port on this machine")] = DEFAULT_PORT,
    host: Annotated[str, typer.Option(help="Address; only this machine by default")] = "127.0.0.1",
    demo: Annotated[
        bool, typer.Option("--demo", help="Make a local admin account and a one-time sign-in link")
    ] = False,
    wanted: Annotated[int | None, typer.Option(help="Tasks asked of each annotator")] = None,
    secure_cookie: Annotated[
        bool, typer.Option("--secure-cookie", help="Behind HTTPS: never send the cookie without it")
    ] = False,
    root_path: Annotated[
        str | None, typer.Option(help="Where a reverse proxy shows the site, such as /labels")
    ] = None,
    trust_proxy: Annotated[
        list[str] | None,
        typer.Option("--trust-proxy", help="Address whose X-Forwarded-* headers are believed"),
    ] = None,
    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="Serve other machines without TLS all the same")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Server processes; more than one needs PostgreSQL  [default: 2 on PostgreSQL, 1 on SQLite or a single core]",
        ),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Serve the annotation page."""
    from annotation.api.app import create_app
    from annotation.api.server import bind, bind_several, running_server
    from annotation.api.workers import (
        SERVER_BUSY_SECONDS,
        check_exposure,
        serve_with_workers,
        usual_workers,
    )
    from annotation.config import AnnotationConfig
    from annotation.store import Store
    from reelhf.config import load_config

    overrides = ["serve.secure_cookie=true"] if secure_cookie else []
    if wanted is not None:
        overrides.append(f"serve.wanted_tasks={wanted}")
    if root_path is not None:
        overrides.append(f"serve.root_path={root_path}")
    if trust_proxy:
        overrides.append(f"serve.trusted_proxies=[{', '.join(trust_proxy)}]")
    settings = load_config(AnnotationConfig, config, overrides).serve
    problem = check_exposure(
        host, demo=demo, encrypted=settings.secure_cookie, plain_http=plain_http
    )
    if problem:
        raise UserError(problem)
    listener = bind(host, port)  # a taken port is found before anything else
    port = listener.getsockname()[1]
    listener.close()
    with Store.open(project, create=False, busy_seconds=SERVER_BUSY_SECONDS) as store:
        workers = workers or usual_workers(store.database, os.cpu_count() or 1)
        if workers > 1 and store.database.is_sqlite:
            raise UserError(
                f"--workers {workers} needs PostgreSQL: SQLite has one writer, so more processes only wait for each other. "
                "Make the project with: reelhf annotate init PROJECT --database postgresql://..."
            )
        counts = store.counts()
        typer.echo(
            f"{counts['open_tasks']} of {counts['tasks']} tasks are open, {counts['judgments']} judgments so far"
        )
        site = create_app(store, settings, page=workers == 1)
        if workers > 1:
            _say_where(site, store, f"http://{host}:{port}", project, demo=demo)
            serve_with_workers(project, settings, bind_several(host, port, workers))
        else:
            with running_server(
                site, host=host, port=port, trusted_proxies=settings.trusted_proxies
            ) as url:
                _say_where(site, store, url, project, demo=demo)
                _wait()
    typer.echo(f"next: reelhf annotate export {project}")


def _say_where(site: FastAPI, store: Store, url: str, project: Path, *, demo: bool) -> None:
    """How to get in; makes the local admin of `--demo`."""
    if demo:
        name, password = "demo", secrets.token_urlsafe(9)
        if store.find_user(name) is None:
            store.add_user(name, password, role="admin")
        else:
            store.set_password(name, password)
        account = store.find_user(name)
        assert account is not None
        typer.echo(f"annotation: {url}{site.state.sign_in_link(account)}  (works once)")
        typer.echo(
            f"afterwards: {url}{site.state.site.url('/')}  name: {name}  password: {password}"
        )
    else:
        address = url + site.state.site.url("/").rstrip("/")
        typer.echo(f"annotation: {address}  (accounts: reelhf annotate user add {project})")
    hint = tunnel_line(int(url.rpartition(":")[2]))
    if hint:
        typer.echo(hint)
    typer.echo("Ctrl-C ends it; every judgment is on disk when the page says so.")


@app.command()
def watch(
    project: ProjectArgument = DEFAULT_PROJECT,
    once: Annotated[bool, typer.Option("--once", help="Look once and stop")] = False,
    config: ConfigOption = None,
) -> None:
    """Tell a webhook or a mailbox when the queue runs empty or the answers look wrong."""
    import time

    from annotation.alerts import look
    from annotation.config import AnnotationConfig
    from annotation.store import Store
    from reelhf.config import load_config

    alerts = load_config(AnnotationConfig, config).alerts
    if alerts.webhook_url is None and alerts.smtp_host is None and not once:
        raise UserError(
            "nobody would be told: set alerts.webhook_url or alerts.smtp_host in the config, or look with --once"
        )
    with Store.open(project, create=False) as store:
        while True:
            seen = look(store, alerts)
            for name in seen.raised if once else seen.new:
                typer.echo(f"{name}: {seen.raised[name]}")
            for failure in seen.failures:
                typer.echo(f"not sent: {failure}", err=True)
            if once:
                break
            time.sleep(alerts.every_seconds)
    typer.echo("nothing is wrong" if not seen.raised else f"{len(seen.raised)} alerts stand")


@clips_app.command("import")
def clips_import(
    source: Annotated[Path, typer.Argument(help="Folder or manifest, as for quickstart")],
    project: Annotated[Path, typer.Option(help="Project folder")] = DEFAULT_PROJECT,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what fits and stop")] = False,
) -> None:
    """Add clips to a project, without tasks."""
    from annotation.quickstart import plan_project
    from annotation.records import MAX_CLIPS
    from annotation.store import Store

    plan = plan_project(source, k=MAX_CLIPS)
    _print_plan(plan, tasks=False)
    if dry_run:
        typer.echo("dry run: nothing was written")
        return
    with Store.open(project) as store:
        clips = [clip for group in plan.groups for clip in group]
        ids = store.add_clips(clips, project=source.resolve().name, label="clips")
    typer.echo(f"project: {project} ({len(set(ids))} clips)")
    typer.echo(f"next: reelhf annotate tasks create {project}")


@tasks_app.command("create")
def tasks_create(
    project: ProjectArgument = DEFAULT_PROJECT,
    k: Annotated[int, typer.Option("--k", help="Clips per task, 2 to 8")] = 4,
    need: Annotated[int, typer.Option(help="Judgments wanted per task")] = 1,
    round_number: Annotated[int, typer.Option("--round", help="Round of the loop")] = 0,
    kind: Annotated[
        str, typer.Option(help="best_worst, gsb (pairs: good, same, bad) or score (1 to 5)")
    ] = "best_worst",
    priority: Annotated[int, typer.Option(help="Higher comes first")] = 0,
    experts_only: Annotated[
        bool, typer.Option("--experts-only", help="Only for accounts of experts")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="Where copies are made: local, or ray (RAY_ADDRESS)")
    ] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count the tasks and stop")] = False,
) -> None:
    """Make tasks of the clips that are in none yet, K per prompt."""
    from annotation.store import Store

    with Store.open(project, create=False) as store:
        groups = store.clips_without_task(2 if kind == "gsb" else k)
        if dry_run:
            typer.echo(f"dry run: {len(groups)} tasks would be made")
            return
        store.create_tasks(
            groups,
            need=need,
            round_number=round_number,
            kind=kind,
            priority=priority,
            experts_only=experts_only,
            engine=engine,
            label="copies for showing",
        )
    typer.echo(f"project: {project} ({len(groups)} new tasks)")
    typer.echo(f"next: reelhf annotate serve {project} --demo")


@tasks_app.command("known")
def tasks_known(
    source: Annotated[
        Path, typer.Argument(help="JSONL: prompt, clips (path, model), answers, kind, per task")
    ],
    project: Annotated[Path, typer.Option(help="Project folder")] = DEFAULT_PROJECT,
    purpose: Annotated[
        str, typer.Option(help="gold (hidden), practice (with feedback) or exam")
    ] = "gold",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the file and stop")] = False,
) -> None:
    """Add tasks whose answers are known.

    One object per line: {"prompt": ..., "clips": [{"path": ..., "model": ...}, ...], "answers": {"motion_quality": {"best": 0,
    "worst": 2, "why": "..."}, "aesthetic_quality": {"tie": true}}}. Clips count from 0 in the line's
    order; everyone sees them in another order, so `why` should not name letters.
    """
    from annotation.quickstart import read_known
    from annotation.store import Store

    found = read_known(source)
    if dry_run:
        typer.echo(f"dry run: {len(found)} tasks for {purpose} would be made")
        return
    with Store.open(project, create=False) as store:
        for task in found:
            ids = store.add_clips(task.clips, project=source.resolve().stem)
            store.create_tasks([ids], purpose=purpose, kind=task.kind, answers=[task.answers])
    typer.echo(f"project: {project} ({len(found)} new tasks for {purpose})")
    if purpose == "gold":
        typer.echo("next: set serve.routing.gold_rate in the YAML of `reelhf annotate serve`")


@app.command("flags")
def flagged(
    project: ProjectArgument = DEFAULT_PROJECT,
    decide: Annotated[
        str | None, typer.Option(help="TASK=reopen puts a task back, TASK=remove takes it away")
    ] = None,
    by: Annotated[str, typer.Option(help="Account that decides")] = "admin",
    note: Annotated[str, typer.Option(help="Why")] = "",
) -> None:
    """List the tasks that wait for a decision, or decide about one."""
    from annotation.flags import decide as rule
    from annotation.flags import held_tasks
    from annotation.refusals import NotFound, Refused
    from annotation.store import Store

    with Store.open(project, create=False) as store:
        if decide is not None:
            number, _, decision = decide.partition("=")
            account = store.find_user(by)
            if account is None:
                raise UserError(f"there is no user named {by!r} to decide; name one with --by")
            try:
                rule(store, account, int(number), decision, note)
            except ValueError as error:
                raise UserError(
                    f"--decide is {decide!r}; expected TASK=reopen or TASK=remove"
                ) from error
            except (NotFound, Refused) as error:
                raise UserError(f"task {number}: {error}") from error
            typer.echo(f"task {number}: {decision}")
        held = held_tasks(store)
    for task in held:
        typer.echo(f"task {task.task_id} ({task.num_judgments} judgments): {task.prompt}")
        for said in task.reports:
            comment = f": {said['note']}" if said["note"] else ""
            typer.echo(f"  {said['pseudonym']} {said['report']}: {said['what']}{comment}")
    typer.echo(f"{len(held)} tasks wait for a decision")
    if held:
        typer.echo(f"next: reelhf annotate flags {project} --decide {held[0].task_id}=reopen")


@user_app.command("add")
def user_add(
    name: Annotated[str, typer.Argument(help="Name to sign in with")],
    project: Annotated[Path, typer.Option(help="Project folder")] = DEFAULT_PROJECT,
    role: Annotated[str, typer.Option(help="annotator, reviewer or admin")] = "annotator",
    expert: Annotated[
        bool, typer.Option("--expert", help="May judge tasks for experts and decide conflicts")
    ] = False,
    password: Annotated[
        str | None,
        typer.Option(help="At least 8 characters; made up if left out", envvar="REELHF_PASSWORD"),
    ] = None,
) -> None:
    """Add an account."""
    from annotation.store import Store

    made = password or secrets.token_urlsafe(9)
    with Store.open(project, create=False) as store:
        account = store.add_user(name, made, role=role, expert=expert)
    shown = "" if password else f"  password: {made}"
    typer.echo(f"{role} {name} ({account.pseudonym} in exports){shown}")


@user_app.command("list")
def user_list(project: ProjectArgument = DEFAULT_PROJECT) -> None:
    """Every account and its role."""
    from annotation.store import Store

    with Store.open(project, create=False) as store:
        for account in store.users():
            typer.echo(f"{account.role:<10} {account.pseudonym:<20} {account.name}")


@user_app.command("role")
def user_role(
    name: Annotated[str, typer.Argument(help="Account")],
    role: Annotated[str, typer.Argument(help="annotator, reviewer or admin")],
    project: Annotated[Path, typer.Option(help="Project folder")] = DEFAULT_PROJECT,
) -> None:
    """Give an account another role."""
    from annotation.store import Store

    with Store.open(project, create=False) as store:
        store.set_role(name, role)
    typer.echo(f"{name} is now {role}")


@user_app.command("password")
def user_password(
    name: Annotated[str, typer.Argument(help="Account")],
    project: Annotated[Path, typer.Option(help="Project folder")] = DEFAULT_PROJECT,
    password: Annotated[
        str | None,
        typer.Option(help="At least 8 characters; made up if left out", envvar="REELHF_PASSWORD"),
    ] = None,
) -> None:
    """Replace a password; every browser signed in with the old one is signed out."""
    from annotation.store import Store

    made = password or secrets.token_urlsafe(9)
    with Store.open(project, create=False) as store:
        store.set_password(name, made)
    typer.echo(f"{name} has a new password" + ("" if password else f": {made}"))


@user_app.command("link")
def user_link(
    name: Annotated[str, typer.Argument(help="Account")],
    issuer: Annotated[str, typer.Argument(help="Address of the identity provider")],
    subject: Annotated[str, typer.Argument(help="Their `sub` there")],
    project: Annotated[Path, typer.Option(help="Project folder")] = DEFAULT_PROJECT,
) -> None:
    """Let an identity of an OpenID Connect provider sign in as an account."""
    from annotation.api.oidc import link_identity
    from annotation.store import Store

    with Store.open(project, create=False) as store:
        link_identity(store, _account(store, name), issuer, subject)
    typer.echo(f"{name} can sign in through {issuer}")


@token_app.command("create")
def token_create(
    name: Annotated[str, typer.Argument(help="Account it acts for")],
    label: Annotated[str, typer.Argument(help="What it is for")],
    project: Annotated[Path, typer.Option(help="Project folder")] = DEFAULT_PROJECT,
    scope: Annotated[list[str] | None, typer.Option(help="judge or read; repeatable")] = None,
    days: Annotated[float | None, typer.Option(help="It dies after so many days")] = None,
) -> None:
    """Make an API token; it is shown this once. Send it as `Authorization: Bearer rhf_...`."""
    from annotation.api.tokens import Tokens
    from annotation.store import Store

    with Store.open(project, create=False) as store:
        account = _account(store, name)
        text, token = Tokens(store).create(account, label, scope or ["judge", "read"], days=days)
    typer.echo(f"token {token.id} of {name}, may {' and '.join(token.scopes)}: {text}")


@token_app.command("list")
def token_list(
    name: Annotated[str, typer.Argument(help="Account")],
    project: Annotated[Path, typer.Option(help="Project folder")] = DEFAULT_PROJECT,
) -> None:
    """The tokens of an account, dead ones too."""
    from annotation.api.tokens import Tokens
    from annotation.store import Store

    with Store.open(project, create=False) as store:
        now = store.now_ms()
        for token in Tokens(store).of(_account(store, name)):
            late = token.expires_ms is not None and token.expires_ms <= now
            state = "revoked" if token.revoked_ms else "expired" if late else "live"
            typer.echo(f"{token.id:>4}  {state:<8} {','.join(token.scopes):<12} {token.label}")


@token_app.command("revoke")
def token_revoke(
    name: Annotated[str, typer.Argument(help="Account")],
    number: Annotated[int, typer.Argument(help="From `token list`")],
    project: Annotated[Path, typer.Option(help="Project folder")] = DEFAULT_PROJECT,
) -> None:
    """End a token at once."""
    from annotation.api.tokens import Tokens
    from annotation.store import Store

    with Store.open(project, create=False) as store:
        if not Tokens(store).revoke(_account(store, name), number):
            raise UserError(f"{name} has no live token {number}")
    typer.echo(f"token {number} is dead")


def _account(store: Store, name: str) -> Account:
    account = store.find_user(name)
    if account is None:
        raise UserError(f"there is no user named {name!r}")
    return account


def tunnel_line(port: int) -> str | None:
    """The line to type on one's own machine when this one is reached over SSH."""
    if not os.environ.get("SSH_CONNECTION"):
        return None
    server = os.environ["SSH_CONNECTION"].split()[2]
    user = os.environ.get("USER", "you")
    return f"over SSH, first run on your own machine: ssh -N -L {port}:127.0.0.1:{port} {user}@{server}"


def _wait() -> None:
    import time

    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        typer.echo("")


def _print_plan(plan: Plan, *, tasks: bool = True) -> None:
    for line in plan.mismatches[:MAX_SHOWN]:
        typer.echo(f"  - {line}")
    if len(plan.mismatches) > MAX_SHOWN:
        typer.echo(f"  - and {len(plan.mismatches) - MAX_SHOWN} more")
    sizes = sorted({len(group) for group in plan.groups})
    shape = f" of {', '.join(map(str, sizes))} clips in {len(plan.groups)} tasks" if tasks else ""
    typer.echo(f"{plan.num_clips} clips fit{shape}; {len(plan.mismatches)} mismatches")

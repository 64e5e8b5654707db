"""`reelhf annotate purge | project | audit | disk | backup | restore`: looking after a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reelhf.errors import UserError

if TYPE_CHECKING:
    from annotation.erasure import Erasure

DEFAULT_PROJECT = Path("runs/annotation")
ProjectArgument = Annotated[Path, typer.Argument(help="Project folder")]
ProjectOption = Annotated[Path, typer.Option(help="Project folder")]
ReasonOption = Annotated[str, typer.Option(help="Why; kept in the tombstone", prompt=False)]
RunsOption = Annotated[
    Path, typer.Option(help="Searched for runs whose config or manifest names a snapshot")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would go")]

purge_app = typer.Typer(no_args_is_help=True, help="Erase a person, a clip or a note for good.")
project_app = typer.Typer(no_args_is_help=True, help="Projects of one store.")


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    app.add_typer(purge_app, name="purge")
    app.add_typer(project_app, name="project")
    app.command()(audit)
    app.command()(disk)
    app.command()(backup)
    app.command()(restore)


@purge_app.command("user")
def purge_user(
    name: Annotated[str, typer.Argument(help="Account")],
    reason: ReasonOption,
    project: ProjectOption = DEFAULT_PROJECT,
    withdraw: Annotated[
        bool, typer.Option("--withdraw", help="Exports leave their judgments out from now on")
    ] = False,
    runs: RunsOption = Path("runs"),
    dry_run: DryRunOption = False,
) -> None:
    """Forget who an account belonged to; their judgments stay under the pseudonym."""
    from annotation import erasure
    from annotation.store import Store

    with Store.open(project, create=False) as store:
        found = erasure.purge_user(
            store, name, reason=reason, withdraw=withdraw, runs=runs, dry_run=dry_run
        )
    typer.echo(f"{_done(dry_run)}: the name, password, sign-ins and notes of {found.subject}")
    kept = "left out of exports from now on" if withdraw else "kept under the pseudonym"
    typer.echo(f"{found.judgments} judgments {kept}")
    _show_copies(found, dry_run)


@purge_app.command("clip")
def purge_clip(
    sha256: Annotated[str, typer.Argument(help="Of the clip, or its first 8 digits and more")],
    reason: ReasonOption,
    project: ProjectOption = DEFAULT_PROJECT,
    runs: RunsOption = Path("runs"),
    dry_run: DryRunOption = False,
) -> None:
    """Delete a clip's bytes and the copies made of it; exports leave its pairs out from now on."""
    from annotation import erasure
    from annotation.store import Store

    with Store.open(project, create=False) as store:
        found = erasure.purge_clip(store, sha256, reason=reason, runs=runs, dry_run=dry_run)
    _show_clip(found, dry_run)


@purge_app.command("expired")
def purge_expired(
    project: ProjectOption = DEFAULT_PROJECT,
    runs: RunsOption = Path("runs"),
    dry_run: DryRunOption = False,
) -> None:
    """Delete the clips that are past the retention of every project they belong to."""
    from annotation import erasure
    from annotation.store import Store

    with Store.open(project, create=False) as store:
        clips = erasure.expired_clips(store)
        for sha256 in clips:
            found = erasure.purge_clip(
                store, sha256, reason="past its retention", runs=runs, dry_run=dry_run
            )
            _show_clip(found, dry_run)
    typer.echo(f"{len(clips)} clips are past their retention")


@purge_app.command("note")
def purge_note(
    judgment: Annotated[int, typer.Argument(help="Number of the judgment, as in j17/...")],
    reason: ReasonOption,
    project: ProjectOption = DEFAULT_PROJECT,
) -> None:
    """Empty the note of a judgment; the judgment itself stays as it is."""
    from annotation import erasure
    from annotation.store import Store

    with Store.open(project, create=False) as store:
        erasure.redact_note(store, judgment, reason=reason)
    typer.echo(f"judgment {judgment} has no note any more")


@project_app.command("list")
def project_list(project: ProjectArgument = DEFAULT_PROJECT) -> None:
    """Every project of the store, with its settings."""
    from annotation.projects import list_projects
    from annotation.store import Store

    with Store.open(project, create=False) as store:
        for line in list_projects(store):
            open_to = f"{line.members} members" if line.members else "open to everyone"
            kept = f", clips kept {line.retention_days} days" if line.retention_days else ""
            asked = f", guideline {line.guideline_version}" if line.guideline_version else ""
            typer.echo(
                f"{line.name}: {line.prompts} prompts, {line.clips} clips, {line.tasks} tasks, {open_to}{kept}{asked}"
            )


@project_app.command("set")
def project_set(
    name: Annotated[str, typer.Argument(help="Project of the store; made if new")],
    project: ProjectOption = DEFAULT_PROJECT,
    retention_days: Annotated[
        int | None, typer.Option(help="Clips are kept so long [default: for ever]")
    ] = None,
    guideline: Annotated[
        str | None,
        typer.Option(
            help="Questions that it is judged by: a version kept here, or a file such as annotation/questions.yaml [default: the present version]"
        ),
    ] = None,
) -> None:
    """Make a project, or set how long it keeps clips and which questions it asks."""
    from annotation.audit import COMMAND_LINE
    from annotation.projects import configure
    from annotation.records import load_guideline
    from annotation.store import Store

    with Store.open(project) as store:
        if guideline is not None and guideline.endswith((".yaml", ".yml")):
            questions = load_guideline(Path(guideline))
            store.remember_guideline(questions)
            guideline = questions.version
        configure(
            store,
            name,
            retention_days=retention_days,
            guideline_version=guideline,
            actor=COMMAND_LINE,
        )
    typer.echo(f"next: reelhf annotate project member {name} ACCOUNT ROLE --project {project}")


@project_app.command("member")
def project_member(
    name: Annotated[str, typer.Argument(help="Project of the store")],
    account: Annotated[str, typer.Argument(help="Account")],
    role: Annotated[str, typer.Argument(help="annotator, reviewer, admin, or none to remove")],
    project: ProjectOption = DEFAULT_PROJECT,
) -> None:
    """Give an account a role in a project. With its first member a project is closed to everyone else."""
    from annotation.audit import COMMAND_LINE
    from annotation.projects import set_member
    from annotation.store import Store

    wanted = None if role == "none" else role
    with Store.open(project, create=False) as store:
        set_member(store, name, account, wanted, actor=COMMAND_LINE)
    typer.echo(f"{account}: {role} in {name}")


def audit(
    project: ProjectArgument = DEFAULT_PROJECT,
    last: Annotated[int, typer.Option(help="Show so many entries")] = 30,
) -> None:
    """Who did what to the project, and whether the chain of entries is whole."""
    from datetime import datetime, timezone

    from annotation import audit as trail
    from annotation.store import Store

    with Store.open(project, create=False) as store, store.read() as connection:
        for entry in trail.entries(connection, limit=last):
            at = datetime.fromtimestamp(entry.at_ms / 1000, timezone.utc)
            typer.echo(
                f"{entry.id:>5}  {at:%Y-%m-%d %H:%M:%S}  {entry.actor}  {entry.action}  {entry.subject}  {entry.detail}"
            )
        broken = trail.first_broken(connection)
    if broken is not None:
        raise UserError(
            f"the audit trail is broken at entry {broken}: it or one before was changed"
        )
    typer.echo("the chain is whole")


def disk(
    project: ProjectArgument = DEFAULT_PROJECT,
    top: Annotated[int, typer.Option(help="Show so many of the largest clips")] = 20,
) -> None:
    """What the project takes on disk, clip by clip, and which clips are past their retention."""
    from annotation.disk import disk_use, human_bytes
    from annotation.store import Store

    with Store.open(project, create=False) as store:
        use = disk_use(store)
    for name in ("originals", "copies", "pictures", "database", "snapshots", "total"):
        typer.echo(f"{name:<10} {human_bytes(getattr(use, name)):>10}")
    for clip in use.clips[:top]:
        late = "  past its retention" if clip.expired else ""
        typer.echo(
            f"{clip.sha256[:16]}  {human_bytes(clip.original):>9}  + {human_bytes(clip.copies)} in {clip.num_copies} copies"
            f"  {clip.age_days:.0f} days{late}"
        )
    expired = sum(clip.expired for clip in use.clips)
    if expired:
        typer.echo(f"next: reelhf annotate purge expired --project {project} --dry-run")


def backup(
    project: ProjectArgument = DEFAULT_PROJECT,
    out: Annotated[Path | None, typer.Option(help="File to write")] = None,
) -> None:
    """Copy the database while it is in use; media are immutable files and can be copied as they are."""
    from datetime import datetime

    from annotation.store import Store

    with Store.open(project, create=False) as store:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        kind, where = ("db", "")
        if not store.database.is_sqlite:
            kind, where = ("dump", " --database postgresql://user@host/EMPTY-DATABASE")
        path = store.backup(out or project / f"backup-{stamp}.{kind}")
    typer.echo(f"backup: {path}")
    typer.echo(
        f"next: reelhf annotate restore {path} NEW-FOLDER --media {project / 'media'}{where}"
    )


def restore(
    source: Annotated[Path, typer.Argument(help="File that `backup` wrote")],
    project: Annotated[Path, typer.Argument(help="New project folder")],
    media: Annotated[
        Path | None, typer.Option(help="Media folder to copy; left out, clips are not there")
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(help="Empty PostgreSQL database, for a backup from one: postgresql://..."),
    ] = None,
) -> None:
    """Make a project of a backup, in a folder that holds none, and say what is missing."""
    from annotation import restore as restoring

    found = restoring.restore(source, project, media, database=database)
    typer.echo(f"project: {project} ({found.tasks} tasks, {found.judgments} judgments)")
    if found.missing:
        raise UserError(
            f"{found.missing} of {found.files} media files are missing; copy the old media folder to {project / 'media'}"
        )
    typer.echo(f"all {found.files} media files are there. next: reelhf annotate serve {project}")


def _done(dry_run: bool) -> str:
    return "would go" if dry_run else "gone"


def _show_clip(found: Erasure, dry_run: bool) -> None:
    from annotation.disk import human_bytes

    typer.echo(
        f"{_done(dry_run)}: clip {found.subject}, {len(found.keys)} files, {human_bytes(found.num_bytes)}"
    )
    if found.tasks:
        typer.echo(f"open tasks that leave the queue: {', '.join(map(str, found.tasks))}")
    typer.echo(f"{found.judgments} judgments name it and stay; exports leave its pairs out")
    _show_copies(found, dry_run)


def _show_copies(found: Erasure, dry_run: bool) -> None:
    for snapshot in found.snapshots:
        typer.echo(f"snapshot {snapshot.name} holds it: {snapshot.folder}")
    for run in found.runs:
        typer.echo(f"run {run} was made from such a snapshot")
    if dry_run:
        typer.echo("dry run: nothing was erased")

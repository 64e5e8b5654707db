"""`reelhf annotate export | snapshots`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reelhf.errors import UserError

DEFAULT_PROJECT = Path("runs/annotation")


def register(app: typer.Typer) -> None:
    """Adds the two verbs."""
    app.command()(export)
    app.command()(snapshots)


def export(
    project: Annotated[Path, typer.Argument(help="Project folder")] = DEFAULT_PROJECT,
    out: Annotated[Path | None, typer.Option(help="[default: PROJECT/preferences]")] = None,
    fmt: Annotated[str, typer.Option("--format", help="parquet, jsonl or csv")] = "parquet",
    implied: Annotated[
        bool, typer.Option(help="Also the pairs that best and worst imply, marked")
    ] = False,
    humans_only: Annotated[
        bool, typer.Option("--humans-only", help="Leave out simulated judgments")
    ] = False,
    min_round: Annotated[int, typer.Option(help="First round")] = 0,
    max_round: Annotated[int | None, typer.Option(help="Last round")] = None,
    of: Annotated[str | None, typer.Option(help="Only this project of the store")] = None,
    adjudicated_only: Annotated[
        bool,
        typer.Option("--adjudicated-only", help="Of decided conflicts, only the expert's word"),
    ] = False,
    snapshot: Annotated[
        str | None, typer.Option(help="Freeze it under this name, with its hash in the store")
    ] = None,
) -> None:
    """Write the preference data."""
    from annotation import snapshots
    from annotation.export import ExportQuery, export_preferences
    from annotation.store import Store

    if snapshot is not None and out is not None:
        raise UserError("--snapshot and --out exclude each other: a snapshot has its own folder")
    query = ExportQuery(of, min_round, max_round, humans_only, implied, adjudicated_only)
    with Store.open(project, create=False) as store:
        if snapshot is not None:
            folder = snapshots.take(store, snapshot, query, fmt=fmt).folder
        else:
            folder = export_preferences(store, out or project / "preferences", query, fmt=fmt)
    typer.echo(f"preference data: {folder} ({_rows(folder)})")
    if fmt == "csv":
        typer.echo("CSV is to look at; training reads parquet or jsonl")
    else:
        typer.echo(f"next: reelhf rewards train --preferences {folder}")


def snapshots(
    project: Annotated[Path, typer.Argument(help="Project folder")] = DEFAULT_PROJECT,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare")] = False,
) -> None:
    """List the frozen exports; with --verify, say whether their files are unchanged."""
    from datetime import datetime, timezone

    from annotation.snapshots import list_snapshots, problem
    from annotation.store import Store

    with Store.open(project, create=False) as store:
        found = list_snapshots(store)
    if not found:
        typer.echo(f"no snapshots yet; next: reelhf annotate export {project} --snapshot NAME")
    problems = []
    for snapshot in found:
        rows = ", ".join(f"{number} {name}" for name, number in snapshot.num_rows.items())
        at = datetime.fromtimestamp(snapshot.created_ms / 1000, timezone.utc)
        typer.echo(f"{snapshot.name}  {at:%Y-%m-%d %H:%M} UTC  sha256 {snapshot.manifest_sha256}")
        typer.echo(f"  {rows}; {snapshot.query.words()}")
        wrong = problem(snapshot) if verify else None
        if wrong:
            problems.append(f"{snapshot.name}: {wrong}")
        elif verify:
            typer.echo("  unchanged")
    if problems:
        raise UserError("; ".join(problems))


def _rows(folder: Path) -> str:
    import json

    files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    return ", ".join(f"{entry['rows']} {name.partition('.')[0]}" for name, entry in files.items())

"""`reelhf annotate prompts import | curate | list`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from reelhf.errors import UserError

DEFAULT_PROJECT = Path("runs/annotation")
ProjectOption = Annotated[Path, typer.Option(help="Project folder")]
OfOption = Annotated[str, typer.Option("--of", help="Which project of the store")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would change")]

app = typer.Typer(no_args_is_help=True, help="The prompt pool: import, filter, balance, list.")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Text, CSV, JSON, JSON lines or a usage log")],
    project: ProjectOption = DEFAULT_PROJECT,
    of: OfOption = "default",
    fmt: Annotated[
        str | None, typer.Option("--format", help="text, csv, json, jsonl or log [default: suffix]")
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="Column or dotted key of the prompt: request.prompt")
    ] = None,
    dry_run: DryRunOption = False,
) -> None:
    """Add prompts: normalised, duplicates dropped, unfit ones held back with the reason."""
    from annotation.prompts.pool import import_prompts
    from annotation.prompts.sources import read_prompts
    from annotation.store import Store

    raw = read_prompts(source, fmt=fmt, field=field)
    with Store.open(project, create=not dry_run) as store:
        report = import_prompts(store, raw, project=of, dry_run=dry_run)
    held = sum(report.held.values())
    fresh = len(report.candidates)
    typer.echo(
        f"{report.read} prompts read: {report.duplicates} duplicates, {fresh - held} taken, {held} held back"
    )
    _counts("held back", report.held)
    _counts("languages", report.languages)
    _counts("categories", report.categories)
    if dry_run:
        typer.echo("dry run: nothing was written")
    else:
        typer.echo(f"next: reelhf annotate prompts curate --project {project}")


@app.command()
def curate(
    project: ProjectOption = DEFAULT_PROJECT,
    of: OfOption = "default",
    balance: Annotated[
        float, typer.Option(help="0 keeps the shares of categories, 1 makes them equal")
    ] = 0.5,
    dry_run: DryRunOption = False,
) -> None:
    """Judge every prompt again, tag categories, and weigh them: frequent ones down, rare ones up."""
    from annotation.prompts.pool import curate_pool
    from annotation.store import Store

    if not 0 <= balance <= 1:
        raise UserError(f"--balance is {balance}; expected 0 to 1")
    with Store.open(project, create=False) as store:
        report = curate_pool(store, project=of, strength=balance, dry_run=dry_run)
    _counts("newly held back", report.held)
    typer.echo(f"released: {report.released}")
    typer.echo(f"{'category':<28} {'prompts':>7}  weight")
    for name, (number, weight) in sorted(report.weights.items(), key=lambda item: -item[1][0]):
        typer.echo(f"{name:<28} {number:>7}  {weight:.2f}")
    if dry_run:
        typer.echo("dry run: nothing was written")
    else:
        typer.echo(
            f"next: reelhf annotate prompts list --project {project} --sample 100 --out prompts.txt"
        )


@app.command("list")
def list_(
    project: ProjectOption = DEFAULT_PROJECT,
    of: OfOption = "default",
    status: Annotated[str, typer.Option(help="active, held or all")] = "active",
    category: Annotated[str | None, typer.Option(help="Only this category")] = None,
    language: Annotated[str | None, typer.Option(help="en, zh or other")] = None,
    sample: Annotated[int | None, typer.Option(help="Draw so many by their weights")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write one prompt per line here")] = None,
) -> None:
    """Show prompts, or write them where `reelhf generator sample --prompts` reads them."""
    from annotation.prompts.pool import list_pool
    from annotation.store import Store

    if status not in ("active", "held", "all"):
        raise UserError(f"--status is {status!r}; expected active, held or all")
    with Store.open(project, create=False) as store:
        rows = list_pool(
            store,
            project=of,
            status=None if status == "all" else status,
            category=category,
            language=language,
            number=sample,
            seed=seed,
        )
    if out is not None:
        try:
            out.write_text("".join(row.text + "\n" for row in rows), encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}") from error
        typer.echo(f"prompts: {out} ({len(rows)})")
        typer.echo(f"next: reelhf generator sample MODEL --prompts {out} --out clips")
        return
    for row in rows:
        why = f"  [held: {row.reason}]" if row.status == "held" else ""
        typer.echo(f"{row.prompt_id}  {row.language:<5} {row.category or '-':<24} {row.text}{why}")
    typer.echo(f"{len(rows)} prompts")


def _counts(title: str, counts: Counter[Any]) -> None:
    if counts:
        words = ", ".join(f"{number} {name}" for name, number in counts.most_common())
        typer.echo(f"{title}: {words}")

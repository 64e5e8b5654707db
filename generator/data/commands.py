"""`reelhf generator data doctor`. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at training footage.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Look at training footage before anything is trained on it."""


@app.command()
def doctor(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.yaml] [KEY=VALUE]...", show_default=False),
    ] = None,
    clips: Annotated[Path | None, typer.Option(help="folder of videos")] = None,
    table: Annotated[Path | None, typer.Option("--csv", help="write the table here too")] = None,
    strict: Annotated[bool, typer.Option(help="exit with 1 if any clip would be skipped")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the resolved config and stop")
    ] = False,
) -> None:
    """Each clip's frames, rate, size and bucket, or why it would be skipped. Nothing is decoded or changed.

    reelhf generator data doctor --clips footage fps=24 num_frames='[33, 65]' area=399360
    """
    from generator.data.buckets import BucketConfig
    from generator.data.doctor import examine, format_report, write_csv
    from reelhf.cli_config import read_config_words
    from reelhf.config import to_yaml
    from reelhf.errors import UserError

    config = read_config_words(BucketConfig, words or [])
    if dry_run:
        typer.echo(to_yaml(config), nl=False)
        return
    if clips is None:
        raise UserError("missing --clips, the folder of videos")
    rows = examine(clips, config)
    if table is not None:
        write_csv(rows, table)
    typer.echo(format_report(rows, config))
    if strict and any(row.placement.bucket is None for row in rows):
        raise typer.Exit(1)

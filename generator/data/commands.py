"""`reelhf generator data doctor | encode`. Nothing heavy is imported before one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at training footage, and encode it.", no_args_is_help=True)


@app.command()
def encode(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="STAGES.yaml [KEY=VALUE]...", show_default=False),
    ] = None,
    clips: Annotated[
        Path | None,
        typer.Option(help="manifest (.jsonl, .parquet), or folder of captioned clips"),
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="trained VAE")] = None,
    text: Annotated[Path | None, typer.Option(help="trained text encoder")] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="of a refiner, in place of both: the generator whose clips it enlarges"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of encoded clips; added to")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what each stage would hold, and stop")
    ] = False,
) -> None:
    """Encode clips for every stage of a training config, each once. Run it again to go on, or to add clips.

    A row of a manifest has `path` and `caption`, and may have `long_caption`, `motion_caption`, `tags`, `start` and `end` in seconds.
    Clips are never re-timed or enlarged beyond what the buckets allow; what fits no bucket is listed with the reason.
    """
    from generator.data.doctor import examine_clips, format_report
    from generator.data.manifest import read_clips
    from generator.training.denoiser import DenoiserTrainConfig
    from generator.training.progressive import encode_stages
    from reelhf.cli_config import read_config_words, report_result
    from reelhf.errors import UserError

    config = read_config_words(DenoiserTrainConfig, words or [])
    assert isinstance(config, DenoiserTrainConfig)
    if clips is None:
        raise UserError("missing --clips, the manifest or folder of captioned clips")
    if dry_run:
        listed = read_clips(clips)
        for stage in config.stages:
            rows = examine_clips(listed, stage.buckets)
            typer.echo(f"{stage.name}:\n{format_report(rows, stage.buckets)}\n")
        return
    parts: dict[str, Path | None] = {"vae": vae, "text": text}
    if config.stage == "refiner":
        parts = {"base": base}
    missing = [f"--{name}" for name, path in {**parts, "out": out}.items() if path is None]
    if missing:
        raise UserError(
            f"missing {', '.join(missing)} for stage '{config.stage}'; `--help` says what each is."
        )
    for name, path in parts.items():
        if path is not None and not path.is_dir():
            raise UserError(f"--{name} {path}: there is no such folder")
    assert out is not None
    result = encode_stages(config, clips, out, **parts)
    named = " ".join(f"--{name} {path}" for name, path in parts.items())
    report_result(
        result, f"reelhf generator train {(words or [''])[0]} --data {{out}} {named} --out DIR"
    )


@app.command()
def doctor(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.yaml] [KEY=VALUE]...", show_default=False),
    ] = None,
    clips: Annotated[Path | None, typer.Option(help="folder of videos, or a manifest")] = None,
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
        raise UserError("missing --clips, the folder of videos or the manifest")
    rows = examine(clips, config)
    if table is not None:
        write_csv(rows, table)
    typer.echo(format_report(rows, config))
    if strict and any(row.placement.bucket is None for row in rows):
        raise typer.Exit(1)

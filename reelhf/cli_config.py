"""Commands that take a YAML, dotted overrides and `--dry-run`: three lines per verb."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from reelhf.cli import load
from reelhf.config import Config, load_config, to_yaml
from reelhf.errors import UserError


def config_command(
    app: typer.Typer,
    name: str,
    config: str,
    function: str,
    *,
    help: str,
    paths: Mapping[str, str] | None = None,
    next_step: str | None = None,
) -> None:
    """Add a command `name [CONFIG.yaml] [key=value ...] [--dry-run] --out DIR` to a typer app.

        config_command(app, "train", "generator.training.vae:VAETrainConfig", "generator.training.vae:train_vae",
                       help="Train the VAE.", paths={"clips": "folder of captioned clips"},
                       next_step="reelhf generator train denoiser.yaml --vae {out}")

    Args:
        config, function: `package.module:name`, imported when the command runs; the function is called
            as `function(config, out=..., **paths)` and returns where its result lies.
        paths: parameter -> help, each a required `--parameter PATH`; a name ending in `?` is optional.
        next_step: what to run next, `{out}` filled in.
    """
    required = {key.rstrip("?"): not key.endswith("?") for key in (paths or {})}
    helps = {key.rstrip("?"): text for key, text in (paths or {}).items()}

    def command(**options: Any) -> None:
        words: list[str] = options.pop("words") or []
        dry_run: bool = options.pop("dry_run")
        resolved = read_config_words(load(config), words)
        if dry_run:
            typer.echo(to_yaml(resolved), nl=False)
            return
        missing = [
            key for key in ("out", *required) if required.get(key, True) and not options[key]
        ]
        if missing:
            options_missing = ", ".join(f"--{key.replace('_', '-')}" for key in missing)
            raise UserError(f"missing {options_missing}; `--help` says what each is for.")
        result = load(function)(resolved, **options)
        report_result(result or options["out"], next_step)

    fields = [
        _parameter(
            "words",
            list[str] | None,
            typer.Argument(None, metavar="[CONFIG.yaml] [KEY=VALUE]...", show_default=False),
        ),
        *(
            _parameter(key, Path | None, typer.Option(None, help=helps[key], show_default=False))
            for key in required
        ),
        _parameter(
            "out", Path | None, typer.Option(None, help="where the result goes", show_default=False)
        ),
        _parameter(
            "dry_run",
            bool,
            typer.Option(False, "--dry-run", help="print the resolved config and stop"),
        ),
    ]
    command.__signature__ = inspect.Signature(fields)  # type: ignore[attr-defined]
    command.__annotations__ = {field.name: field.annotation for field in fields}
    app.command(name, help=help)(command)


def read_config_words(cls: type[Config], words: Sequence[str]) -> Config:
    """The config that `[CONFIG.yaml] [key=value ...]` stands for; without a file, the defaults."""
    path = words[0] if words and "=" not in words[0] else None
    return load_config(cls, path, list(words[1:] if path else words))


def report_result(result: object, next_step: str | None = None) -> None:
    """Say where the result lies and what to run next."""
    typer.echo(f"written to {result}")
    if next_step:
        typer.echo(f"next: {next_step.replace('{out}', str(result))}")


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )

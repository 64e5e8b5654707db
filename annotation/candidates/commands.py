"""`reelhf annotate clips generate | tasks mix`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from annotation.candidates.mix import Mixed

DEFAULT_PROJECT = Path("runs/annotation")
ProjectOption = Annotated[Path, typer.Option(help="Project folder")]


def register(clips: typer.Typer, tasks: typer.Typer) -> None:
    """Adds one verb to each."""
    clips.command()(generate)
    tasks.command("mix")(mix_tasks)


def generate(
    config: Annotated[Path, typer.Argument(help="YAML such as configs/annotation/candidates.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
    project: ProjectOption = DEFAULT_PROJECT,
    out: Annotated[Path, typer.Option(help="Folder for the clips, one in it per source")] = Path(
        "runs/candidates"
    ),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show prompts and commands")] = False,
) -> None:
    """Have configured models make clips of prompts from the pool, and add the clips."""
    import shlex

    from annotation.candidates.generate import (
        CandidatesConfig,
        draw_prompts,
        import_made,
        run_source,
    )
    from annotation.prompts.curate import language_of
    from annotation.store import Store
    from reelhf.config import load_config

    settings = load_config(CandidatesConfig, config, overrides or [])
    with Store.open(project, create=False) as store:
        prompts = draw_prompts(store, settings)
        typer.echo(f"{len(prompts)} prompts, {len(settings.sources)} sources")
        total = 0
        for place, source in enumerate(settings.sources):
            folder = out / f"{place}-{source.stage}"
            if dry_run:
                words = source.words(out / f"{folder.name}.prompts.txt", folder)
                typer.echo(f"  {source.model} ({source.stage}): {shlex.join(words)}")
                continue
            made = run_source(source, prompts, folder)
            languages = {prompt: language_of(prompt) for prompt in prompts}
            ids = import_made(store, made, project=settings.project, language_of=languages)
            total += len(set(ids))
            missing = f", none of {len(made.without)} prompts" if made.without else ""
            typer.echo(f"  {source.model} ({source.stage}): {len(set(ids))} clips{missing}")
    if dry_run:
        typer.echo("dry run: nothing was run or written")
        return
    typer.echo(f"project: {project} ({total} clips)")
    typer.echo(f"next: reelhf annotate tasks mix configs/annotation/mix.yaml --project {project}")


def mix_tasks(
    config: Annotated[Path, typer.Argument(help="YAML such as configs/annotation/mix.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
    project: ProjectOption = DEFAULT_PROJECT,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the mix and stop")] = False,
) -> None:
    """Make tasks that mix stages or models by configured shares and pairs."""
    from annotation.candidates.mix import MixConfig, load_candidates, mix
    from annotation.store import Store
    from reelhf.config import load_config

    settings = load_config(MixConfig, config, overrides or [])
    with Store.open(project, create=False) as store:
        mixed = mix(load_candidates(store, settings), settings)
        _show(mixed, settings.shares)
        if dry_run:
            typer.echo("dry run: nothing was written")
            return
        store.create_tasks(
            [[clip.clip_id for clip in clips] for clips in mixed.groups],
            need=settings.judgments_per_task,
            round_number=settings.round,
            project=settings.project,
            label="copies for showing",
        )
    typer.echo(f"project: {project} ({len(mixed.groups)} new tasks)")
    typer.echo(f"next: reelhf annotate serve {project} --demo")


def _show(mixed: Mixed, shares: dict[str, float]) -> None:
    shown = mixed.shown
    wanted = {name: shares.get(name, 1.0) for name in shown}
    typer.echo(f"{len(mixed.groups)} tasks, {shown.total()} clips shown")
    typer.echo(f"{'group':<28} {'clips':>6}  share  wanted")
    for name, number in sorted(shown.items()):
        share, aim = number / shown.total(), wanted[name] / sum(wanted.values())
        typer.echo(f"{name:<28} {number:>6}  {100 * share:4.0f} %  {100 * aim:4.0f} %")
    for (a, b), number in sorted(mixed.met.items()):
        typer.echo(f"{a} meets {b} in {number} tasks")
    for reason, number in mixed.left_out.items():
        if number:
            typer.echo(f"left out: {number} prompts, {reason}")

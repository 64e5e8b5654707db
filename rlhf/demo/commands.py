"""The commands `reelhf demo` and `reelhf rlhf loop`. Nothing heavy is imported before one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf.demo.options import DEFAULT_PORT, DemoOptions, load_loop_config

app = typer.Typer(add_completion=False)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Config overrides, such as rlhf_base.num_steps=20")
]
Clips = Annotated[
    Path | None, typer.Option(help="A folder of captioned videos instead of the toy world")
]
Out = Annotated[Path, typer.Option(help="Where the results go")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and stop")]


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def demo(
    overrides: Overrides = None,
    preset: Annotated[
        str, typer.Option(help="standard (20 minutes on 2 cores) or smoke (3 minutes)")
    ] = "standard",
    annotator: Annotated[
        str,
        typer.Option(
            help="simulated, or human: you judge 12 tasks in the browser, then it goes on"
        ),
    ] = "simulated",
    clips: Clips = None,
    serve: Annotated[
        bool, typer.Option(help="Open the annotation and review pages at the end")
    ] = True,
    port: Annotated[
        int, typer.Option(help="Annotation page; the review page takes the next one")
    ] = DEFAULT_PORT,
    out: Out = Path("runs/demo"),
    top_up: Annotated[
        bool,
        typer.Option(
            "--top-up", help="With human: simulated annotators judge the rest, marked as such"
        ),
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Go round the whole loop: generate, judge, learn rewards, maximise them, compare; then serve the pages."""
    options = DemoOptions(
        preset=preset,
        annotator=annotator,
        clips=clips,
        serve=serve,
        port=port,
        out=out,
        top_up=top_up,
        overrides=tuple(overrides or ()),
    )
    start(options, dry_run=dry_run)


def loop(
    config: Annotated[
        str, typer.Argument(help="A loop config, such as configs/loop/demo_standard.yaml")
    ],
    overrides: Overrides = None,
    clips: Clips = None,
    out: Out = Path("runs/loop"),
    dry_run: DryRun = False,
) -> None:
    """Round after round by one YAML, with simulated annotators: each starts from the generator the last one improved."""
    options = DemoOptions(
        preset=None,
        config=config,
        clips=clips,
        serve=False,
        out=out,
        overrides=tuple(overrides or ()),
    )
    if not dry_run:
        load_loop_config(options)  # one that does not load leaves no folder behind
    start(options, dry_run=dry_run)


def start(options: DemoOptions, *, dry_run: bool) -> None:
    if dry_run:
        from reelhf.config import to_yaml

        typer.echo(to_yaml(load_loop_config(options)), nl=False)
        return
    from rlhf.demo.run import run_demo

    run_demo(options)

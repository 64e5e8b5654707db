"""`reelhf distill train`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import typer

from reelhf.cli_config import config_command

app = typer.Typer(help="Fewer denoiser evaluations per clip.", no_args_is_help=True)


@app.callback()
def _verbs() -> None:
    """Keeps `train` a named command while it is the only one."""


config_command(
    app,
    "train",
    "distill.consistency:ConsistencyConfig",
    "distill.consistency:distill_refiner",
    help="Segment-wise consistency distillation of a refiner; run it again to resume.",
    paths={
        "teacher": "refiner to distil",
        "base": "generator whose clips it enlarges",
        "clips": "folder of captioned clips: the prompts",
    },
    next_step="reelhf rlhf train configs/rlhf/toy_refiner.yaml generator={out} --out DIR",
)

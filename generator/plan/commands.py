"""`reelhf plan CONFIG`. Nothing heavy is imported before it runs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

app = typer.Typer(help="Parameters, FLOPs, memory per device, step time: does it fit?")

HELP = """Say what a training would cost, before anything is launched: parameters, FLOPs, memory per device, time, and whether it fits.

CONFIG is a YAML that `reelhf generator train` takes (a base or refiner, in stages or not, with or without adapters; a VAE; a text encoder), or a
preset: tiny, 1b, 7b. Keys after it change it, as in training.

    reelhf plan 1b --size 480p --device h200
    reelhf plan 7b --size 720p --device h100 --devices 64 zero_stage=3
    reelhf plan configs/generator/base_toy.yaml architecture.width=256 --device cpu
    reelhf plan configs/generator/stages_toy.yaml --device cpu

Memory: weights, gradients and optimizer as ZeRO splits them; activations by running the very model on tensors without storage.
Time: executed FLOPs over an assumed share of the data sheet's peak; `--utilisation` takes the share you measured.
If it does not fit, it names the smallest change that makes it fit. `--json` prints every figure, in bytes, FLOPs and seconds.
"""


@app.command(help=HELP)
def plan(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="PRESET|CONFIG.yaml [KEY=VALUE]...", show_default=False),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="480p, 720p or 1080p instead of the config's height, width")
    ] = None,
    device: Annotated[str, typer.Option(help="h100, h200, a100, 4090 or cpu")] = "h100",
    devices: Annotated[int, typer.Option(help="how many, each with its share of a batch")] = 1,
    text_tokens: Annotated[int, typer.Option(help="length of a prompt in tokens")] = 512,
    utilisation: Annotated[
        float | None,
        typer.Option(
            help="share of the peak that is reached, 0 to 1; MFU where nothing is recomputed",
            show_default="0.38; cpu 0.5",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="figures instead of text")] = False,
) -> None:
    from generator.plan.devices import find_device
    from generator.plan.networks import NetworkPlan
    from generator.plan.planner import Plan, read_training_config
    from generator.plan.stages import StagedPlan
    from generator.training.denoiser import DenoiserTrainConfig
    from generator.training.text import TextTrainConfig
    from generator.training.vae import VAETrainConfig
    from reelhf.errors import UserError

    if devices < 1:
        raise UserError(f"--devices {devices}: expected 1 or more")
    if text_tokens < 1:
        raise UserError(f"--text-tokens {text_tokens}: expected 1 or more")
    if utilisation is not None and not 0 < utilisation <= 1:
        raise UserError(f"--utilisation {utilisation:g}: expected a share above 0, at most 1")
    chosen = find_device(device)
    config = read_training_config(words or [], size)
    share = chosen.utilisation if utilisation is None else utilisation
    where = chosen, devices, text_tokens, share
    made: Plan | StagedPlan | NetworkPlan
    if isinstance(config, DenoiserTrainConfig):
        made = StagedPlan(config, *where) if config.stages else Plan(config, *where)
    else:
        assert isinstance(config, VAETrainConfig | TextTrainConfig)
        made = NetworkPlan(config, *where)
    if as_json:
        typer.echo(json.dumps(made.as_json(), indent=2))
        return
    from generator.plan.report import report

    assert words
    typer.echo(report(made, words[0]))

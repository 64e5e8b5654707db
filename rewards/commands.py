"""`reelhf rewards`: pre-train, train, evaluate and apply the reward models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reelhf.cli_config import config_command

app = typer.Typer(no_args_is_help=True, help="Reward models: train, evaluate, score.")

config_command(
    app,
    "pretrain",
    "rewards.pretrain:PretrainConfig",
    "rewards.pretrain:pretrain_backbones",
    help="Pre-train the tiny backbones on captioned clips.",
    paths={"clips": "folder of captioned clips"},
    next_step="reelhf rewards train configs/rewards/toy.yaml --backbones {out}",
)
config_command(
    app,
    "train",
    "rewards.train:RewardTrainConfig",
    "rewards.train:train_rewards",
    help="Train the reward models on preference data.",
    paths={
        "preferences": "folder of preference data",
        "backbones": "folder of pre-trained backbones",
    },
    next_step="reelhf rewards eval {out} --preferences DIR --out DIR",
)
config_command(
    app,
    "texture",
    "rewards.texture:TextureConfig",
    "rewards.texture:train_texture",
    help="Train the refiner's texture reward: original against degraded frames, no votes.",
    paths={"clips": "folder of captioned clips, sharp ones"},
    next_step="reelhf rlhf train configs/rlhf/toy_refiner.yaml with weights for texture_quality and {out} as rewards",
)


@app.command("merge")
def merge(
    reward: Annotated[Path, typer.Argument(help="one reward trained with `lora`")],
    out: Annotated[Path, typer.Option(help="where the self-contained reward goes")],
) -> None:
    """Add a reward's low-rank deltas to its backbone: the same scores from one folder that needs no other."""
    from rewards.lora import merge_reward

    typer.echo(f"written to {merge_reward(reward, out)}")
    typer.echo("next: reelhf rewards eval on the folder that holds it")


config_command(
    app,
    "cross-validate",
    "rewards.evaluation.cross_validate:CrossValidateConfig",
    "rewards.evaluation.cross_validate:cross_validate",
    help="Accuracy with one prompt or one generator left out at a time, for sets too small to split once.",
    paths={
        "preferences": "folder of preference data",
        "backbones": "folder of pre-trained backbones",
    },
)


@app.command("eval")
def evaluate(
    rewards: Annotated[Path, typer.Argument(help="folder written by `rewards train`")],
    preferences: Annotated[Path, typer.Option(help="folder of preference data")],
    out: Annotated[Path, typer.Option(help="where evaluation.json and report.html go")],
    quick: Annotated[
        bool,
        typer.Option("--quick", help="accuracy and baselines alone, without corruption probes"),
    ] = False,
) -> None:
    """Accuracy on held-out prompts next to the baselines; ties, calibration, people, sources and corruptions on a page."""
    from rewards.evaluation.held_out import evaluate_rewards, format_report
    from rewards.evaluation.page import write_page

    typer.echo(format_report(evaluate_rewards(rewards, preferences, out, thorough=not quick)))
    typer.echo(f"{out / 'evaluation.json'}\n{write_page(out)}")
    typer.echo("next: reelhf rlhf train configs/rlhf/toy_base.yaml --rewards " + str(rewards))


@app.command("import")
def import_published(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT", help="fetv, videoalign, videogen-rewardbench or genai-bench"
        ),
    ],
    source: Annotated[Path, typer.Argument(help="the published file, or the folder it lies in")],
    out: Annotated[Path, typer.Option(help="where the preference data goes")],
    size: Annotated[
        int | None, typer.Option(help="make all clips alike: squares of this side", min=16)
    ] = None,
    fps: Annotated[
        float, typer.Option(help="frames per second of clips made alike", min=0.1)
    ] = 5.0,
    frames: Annotated[int, typer.Option(help="frames of clips made alike", min=1)] = 8,
    split: Annotated[
        str | None, typer.Option(help="put all rows in one split: train, validation or test")
    ] = None,
) -> None:
    """Published judgments as preference data: pairs or ratings in the format of a known set."""
    from reelhf.errors import UserError
    from rewards.importers import reader
    from rewards.importers.alike import Alike
    from rewards.importers.tables import write_tasks

    if split not in (None, "train", "validation", "test"):
        raise UserError(f"split {split!r}; expected train, validation or test")
    alike = None if size is None else Alike(size, fps, frames)
    tasks = reader(kind)(source)
    found = write_tasks(tasks, out, project=kind, alike=alike, split=split)
    again = f"; {found.repeated} rows repeated others and count once" if found.repeated else ""
    typer.echo(f"{found.tasks} tasks, {found.clips} clips, {found.verdicts} verdicts{again}")
    typer.echo(f"written to {out}")
    typer.echo(
        f"next: reelhf rewards train --preferences {out} ..., or reelhf rewards benchmark REWARDS --preferences {out}"
    )


@app.command("benchmark")
def benchmark(
    rewards: Annotated[Path, typer.Argument(help="folder written by `rewards train`")],
    preferences: Annotated[Path, typer.Option(help="folder written by `rewards import`")],
    out: Annotated[Path, typer.Option(help="where published.json goes")],
) -> None:
    """Accuracy by the published conventions of VideoGen-RewardBench and GenAI-Bench, to be read beside their tables."""
    from rewards.evaluation.published import evaluate_published, format_published

    typer.echo(format_published(evaluate_published(rewards, preferences, out)))
    typer.echo(f"written to {out}")


@app.command("score")
def score(
    rewards: Annotated[Path, typer.Argument(help="folder written by `rewards train`")],
    video: Annotated[list[Path], typer.Argument(help="video files")],
    prompt: Annotated[str, typer.Option(help="what the clips were to show")],
) -> None:
    """Raw logit and z-score of each clip in each dimension."""
    import torch

    from reelhf.errors import UserError
    from reelhf.video import read_video
    from rewards.composite import load_composite

    if not Path(rewards).is_dir():
        raise UserError(f"no folder of rewards at {rewards}")
    composite = load_composite(rewards, {})
    clips = [read_video(path) for path in video]
    with torch.no_grad():
        for path, (frames, fps) in zip(video, clips, strict=True):
            scores = composite.score(frames[None].float() / 255, fps=fps, prompts=[prompt])
            for name, value, z in zip(
                scores.dimensions, scores.values[0].tolist(), scores.z[0].tolist(), strict=True
            ):
                typer.echo(f"{path}\t{name}\tlogit {value:+.3f}\tbounded z {z:+.2f}")
    typer.echo("next: reelhf rewards eval, or reelhf rlhf train to follow these scores")

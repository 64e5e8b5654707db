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


@app.command("merge")
def merge(
    reward: Annotated[Path, typer.Argument(help="one reward trained with `lora`")],
    out: Annotated[Path, typer.Option(help="where the self-contained reward goes")],
) -> None:
    """Add a reward's low-rank deltas to its backbone: the same scores from one folder that needs no other."""
    from rewards.lora import merge_reward

    typer.echo(f"written to {merge_reward(reward, out)}")
    typer.echo("next: reelhf rewards eval on the folder that holds it")


@app.command("eval")
def evaluate(
    rewards: Annotated[Path, typer.Argument(help="folder written by `rewards train`")],
    preferences: Annotated[Path, typer.Option(help="folder of preference data")],
    out: Annotated[Path, typer.Option(help="where evaluation.json goes")],
) -> None:
    """Accuracy on held-out prompts, same-stage pairs, next to the baselines."""
    from rewards.evaluate import evaluate_rewards, format_report

    typer.echo(format_report(evaluate_rewards(rewards, preferences, out)))
    typer.echo(f"{out / 'evaluation.json'}")
    typer.echo("next: reelhf rlhf train configs/rlhf/toy_base.yaml --rewards " + str(rewards))


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

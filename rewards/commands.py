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


@app.command("references")
def references(
    reward: Annotated[Path, typer.Argument(help="a generative reward that asks against_reference")],
    clips: Annotated[Path, typer.Option(help="captioned clips, several per caption, of one model")],
    out: Annotated[Path, typer.Option(help="where the reward with its references goes")],
) -> None:
    """Choose the clip that others are held against: per caption, the best of its clips."""
    from rewards.references import choose_references

    typer.echo(f"written to {choose_references(reward, clips, out)}")
    typer.echo("next: reelhf rlhf train with the folder that holds it as rewards")


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
    split: Annotated[
        str,
        typer.Option(
            help="test, validation or train; `all` for rows that taught these rewards nothing"
        ),
    ] = "test",
) -> None:
    """Accuracy on held-out prompts next to the baselines; ties, calibration, people, sources and corruptions on a page."""
    from reelhf.errors import UserError
    from rewards.evaluation.held_out import evaluate_rewards, format_report
    from rewards.evaluation.page import write_page

    if split not in ("test", "validation", "train", "all"):
        raise UserError(f"split {split!r}; expected test, validation, train or all")
    chosen = None if split == "all" else split
    found = evaluate_rewards(rewards, preferences, out, split=chosen, thorough=not quick)
    typer.echo(format_report(found))
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
    preferences: Annotated[Path, typer.Option(help="folder written by `rewards import`")],
    out: Annotated[Path, typer.Option(help="where published.json goes")],
    rewards: Annotated[
        Path | None, typer.Argument(help="folder written by `rewards train`", show_default=False)
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="instead: another model's scores, a CSV of path, reward_VQ, reward_MQ, reward_TA, reward_Overall"
        ),
    ] = None,
) -> None:
    """Accuracy by the published conventions of VideoGen-RewardBench and GenAI-Bench, to be read beside their tables."""
    from rewards.evaluation.published import evaluate_published, format_published

    found = evaluate_published(preferences, out, rewards=rewards, table=scores)
    typer.echo(format_published(found))
    typer.echo(f"written to {out}")


@app.command("weights")
def weights(
    rewards: Annotated[Path, typer.Argument(help="folder written by `rewards train`")],
    preferences: Annotated[Path, typer.Option(help="folder of preference data")],
    out: Annotated[Path, typer.Option(help="where weights.yaml and weights.json go")],
    wins: Annotated[
        str,
        typer.Option(help="dimension whose verdicts say who won overall; `all` takes every one"),
    ] = "overall",
) -> None:
    """How much each dimension counts for what people prefer: composite weights by regression of wins on scores."""
    from rewards.weights import fit_composite_weights, write_weights

    found = fit_composite_weights(rewards, preferences, wins=wins)
    for name, weight in found["weights"].items():
        low, high = found["intervals"][name]
        typer.echo(f"{name:<21} {weight:6.3f}  [{low:.3f}, {high:.3f}]")
    typer.echo(f"from {found['pairs']} pairs, {found['accuracy_on_these_pairs']:.3f} of them right")
    typer.echo(f"written to {write_weights(found, out)}")
    typer.echo("next: put its reward_weights into the YAML of `reelhf rlhf train`")


WeightOption = Annotated[
    list[str] | None,
    typer.Option(
        "--weight", help="DIMENSION=NUMBER in the total; may be repeated; all 1 by default"
    ),
]
PessimismOption = Annotated[
    float, typer.Option(help="standard deviations of an ensemble that come off each score", min=0)
]


@app.command("score")
def score(
    rewards: Annotated[Path, typer.Argument(help="folder written by `rewards train`")],
    source: Annotated[
        list[Path], typer.Argument(help="video files, folders, or manifests (.jsonl, .csv)")
    ],
    prompt: Annotated[
        str | None, typer.Option(help="what clips were to show that have no prompt of their own")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="write one JSON line per clip here, not a table")
    ] = None,
    weight: WeightOption = None,
    pessimism: PessimismOption = 0.0,
    batch_size: Annotated[int, typer.Option(help="clips read and scored together", min=1)] = 8,
    workers: Annotated[int, typer.Option(help="processes that share the clips", min=1)] = 1,
    engine: Annotated[str, typer.Option(help="local, or ray with --workers tasks")] = "local",
) -> None:
    """Scores of clips in each dimension. A clip that cannot be scored is invalid and named; what was scored before is not scored again."""
    from reelhf.errors import UserError
    from rewards.scoring.run import ScoreRun, score_all, summary, write_scores
    from rewards.scoring.scorer import ScoreSettings
    from rewards.scoring.sources import find_items

    if not Path(rewards).is_dir():
        raise UserError(f"no folder of rewards at {rewards}")
    if engine not in ("local", "ray"):
        raise UserError(f"engine {engine!r}; expected local or ray")
    settings = ScoreSettings(_weights(weight), pessimism=pessimism)
    run = ScoreRun(rewards, settings, batch_size, workers, engine)
    rows = score_all(run, find_items(source, prompt))
    if not rows:
        return  # another process of the launcher writes
    for row in rows if out is None else []:
        for name, found in row.get("dimensions", {}).items():
            typer.echo(
                f"{row['path']}\t{name}\tlogit {found['value']:+.3f}\tbounded z {found['z']:+.2f}"
            )
    typer.echo(summary(rows))
    if out is not None:
        typer.echo(f"written to {write_scores(rows, out)}")
    typer.echo("next: reelhf rewards eval, or reelhf rlhf train to follow these scores")
    if not any(row["valid"] for row in rows):
        raise UserError(f"none of {len(rows)} clips could be scored")


@app.command("serve")
def serve(
    rewards: Annotated[Path, typer.Argument(help="folder written by `rewards train`")],
    host: Annotated[str, typer.Option(help="address; only this machine by default")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port on this machine")] = 7870,
    weight: WeightOption = None,
    pessimism: PessimismOption = 0.0,
    max_megabytes: Annotated[float, typer.Option(help="largest clip taken", min=0.001)] = 64.0,
    max_frames: Annotated[int, typer.Option(help="longest clip taken", min=1)] = 600,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="REELHF_REWARDS_TOKEN", help="asked of every scoring request as a bearer token"
        ),
    ] = None,
) -> None:
    """A scoring service for other tools: POST a clip and its prompt to /score; also /health and /dimensions."""
    from reelhf.errors import UserError
    from rewards.scoring import service
    from rewards.scoring.scorer import Scorer, ScoreSettings

    if not Path(rewards).is_dir():
        raise UserError(f"no folder of rewards at {rewards}")
    scorer = Scorer(rewards, ScoreSettings(_weights(weight), pessimism=pessimism))
    limits = service.Limits(max_megabytes=max_megabytes, max_frames=max_frames)
    typer.echo(f"scores {', '.join(scorer.dimensions)} on http://{host}:{port}; Ctrl-C ends it")
    typer.echo(f"try: curl -F clip=@clip.mp4 -F 'prompt=a red disc' http://{host}:{port}/score")
    service.serve(service.create_app(scorer, limits, token=token), host, port)


def _weights(words: list[str] | None) -> dict[str, float]:
    """`DIMENSION=NUMBER` words as a mapping; unknown names are found when the rewards are loaded."""
    from reelhf.errors import UserError

    found = {}
    for word in words or []:
        name, _, number = word.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise UserError(f"--weight {word!r}; expected DIMENSION=NUMBER") from None
    return found

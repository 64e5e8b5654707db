"""Training the reward models on human verdicts.

1. tasks: a prompt, its K clips, every verdict on their pairs; split by prompt cluster, never by pair
2. each clip of a task is scored once; the verdicts are gathered from those scores (`rewards.training.loss`)
3. Bradley-Terry with ties (Rao-Kupper) per dimension, missing labels masked; explicit votes weigh 1, implied less
4. mean, spread and range are frozen on validation prompts and travel with the checkpoint
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reelhf.engine import barrier, is_main
from rewards.data import Clip, RewardTask, load_clips
from rewards.lora import base_of
from rewards.training.calibrate import calibrate, held_out_accuracy
from rewards.training.config import RewardTrainConfig
from rewards.training.fit import fit
from rewards.training.lessons import LEARNED_SPLITS, Lessons, read_tasks

if TYPE_CHECKING:
    from rewards.module import RewardModule

LONGEST_FIRST = ("motion", "foundational", "aesthetic")
"""The order in which models side by side are started."""


def train_rewards(
    config: RewardTrainConfig,
    preferences: Path,
    backbones: Path,
    out: Path,
    *,
    annotators: Collection[str] | None = None,
    prompt_ids: Collection[str] | None = None,
    splits: Collection[str] | None = LEARNED_SPLITS,
) -> Path:
    """Train, calibrate and save each reward model under `out`.

    Args:
        preferences, annotators, prompt_ids, splits: what they learn from, see `Lessons`.
        backbones: folder written by `rewards.pretrain`, or an earlier round's rewards.
    """
    from reelhf.run import RunFolder
    from reelhf.side_by_side import run_jobs

    lessons = Lessons(Path(preferences), annotators, prompt_ids, splits)
    run = RunFolder.open(out, config)
    jobs = {
        name: partial(_train_one, name, config.of(name), lessons, Path(backbones), Path(out))
        for name in sorted(config.models, key=LONGEST_FIRST.index)
    }
    for name, metrics in run_jobs(jobs, at_once=config.side_by_side).items():
        for step, row in enumerate(metrics):
            run.log(step, {f"{name}/{key}": value for key, value in row.items()})
    return Path(out)


def _train_one(
    name: str, config: RewardTrainConfig, lessons: Lessons, backbones: Path, out: Path
) -> list[dict[str, float]]:
    """Train, calibrate and save one model or an ensemble of it; returns its log."""
    from annotation.records import read_preferences
    from rewards.checkpoint import read_reward_json
    from rewards.ensemble import EnsembleReward, member_folder

    data = read_preferences(lessons.preferences)
    tasks = read_tasks(data, lessons, read_reward_json(backbones / name)["dimensions"])
    clips = load_clips(data, tasks)
    members, logs = [], []
    count = config.ensemble.models
    for index in range(count):
        seeded = config.model_copy(update={"seed": config.seed + index})
        label = name if count == 1 else f"{name} {index + 1}/{count}"
        member, metrics = _train_member(
            member_folder(backbones / name, index),
            seeded,
            tasks,
            clips,
            label=label,
            checkpoints=out / "checkpoints" / f"{name}_{index}",
        )
        members.append(member)
        logs += metrics
    if is_main():
        if count > 1:
            together = EnsembleReward(members)
            together.data_hash = members[0].data_hash
            calibrate(together, tasks, clips)
            together.save(out / name)
        else:
            members[0].save(out / name)
    barrier()
    return logs


def _train_member(
    source: Path,
    config: RewardTrainConfig,
    tasks: Sequence[RewardTask],
    clips: dict[str, Clip],
    *,
    label: str,
    checkpoints: Path,
) -> tuple[RewardModule, list[dict[str, float]]]:
    """Train and calibrate one model from the weights in `source`."""
    import shutil

    from reelhf.engine import seed_everything
    from reelhf.hashing import content_hash, sha256_file
    from rewards.checkpoint import load_trainable, one_model

    seed_everything(config.seed)
    model = one_model(load_trainable(source), source)
    held = [task for task in tasks if task.split == "validation"]
    training = [task for task in tasks if task.split != "validation"] or list(tasks)
    data_hash = content_hash([t.task_id for t in tasks], [len(t.votes) for t in tasks])
    identity = content_hash(config, data_hash, sha256_file(source / "manifest.json"))
    keeps = config.checkpoint_every or (config.evaluate_every and held)
    model, metrics = fit(
        model,
        training,
        clips,
        config,
        label=label,
        held=held,
        checkpoints=checkpoints if keeps else None,
        identity=identity,
    )
    if not is_main():
        return model, metrics
    if config.lora is not None:
        model.base = base_of(source)
    model.data_hash = data_hash
    scores = calibrate(model, tasks, clips)
    model.card = {
        "tasks": len(training),
        "verdicts": sum(len(task.votes) for task in training),
        "seed": config.seed,
        "held_out_prompts": len({task.prompt_id for task in held}),
        "held_out": held_out_accuracy(model.dimensions, held, scores),
        "settings": config.model_dump(mode="json"),
    }
    shutil.rmtree(checkpoints, ignore_errors=True)
    return model, metrics

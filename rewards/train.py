"""Training the reward models on human verdicts.

1. tasks: a prompt, its K clips, every verdict on their pairs; split by prompt cluster, never by pair
2. each clip of a task is scored once; the verdicts are gathered from those scores (`rewards.training.loss`)
3. Bradley-Terry with ties (Rao-Kupper) per dimension, missing labels masked; explicit votes weigh 1, implied less
4. mean, spread and range are frozen on validation prompts and travel with the checkpoint
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reelhf.engine import barrier, init_distributed, is_main, world_size
from reelhf.errors import UserError
from rewards.data import Clip, RewardTask, check_dimensions, load_clips, load_tasks
from rewards.lora import add_lora, base_of, only_deltas_learn
from rewards.training.answers import load_rationales
from rewards.training.calibrate import calibrate, held_out_accuracy
from rewards.training.config import LossConfig, RewardTrainConfig
from rewards.training.groups import freeze_groups
from rewards.training.loss import only_ties, tie_widths
from rewards.training.weights import weighted

if TYPE_CHECKING:
    from annotation.records import PreferenceData
    from rewards.module import RewardModule

LONGEST_FIRST = ("motion", "foundational", "aesthetic")
"""The order in which models side by side are started."""
LEARNED_SPLITS = ("train", "validation")
"""Splits of the preference data that teach a reward; the third, `test`, measures it."""


@dataclass(frozen=True)
class Lessons:
    """Which verdicts teach a reward."""

    preferences: Path
    """Folder of preference data (`annotation.export`)."""
    annotators: Collection[str] | None = None
    prompt_ids: Collection[str] | None = None
    """Only these; None means all."""
    splits: Collection[str] | None = LEARNED_SPLITS
    """Only rows of these splits; None means all, where the rewards are measured on other prompts altogether."""


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
    from rewards.ensemble import EnsembleReward, member_folder
    from rewards.module import read_reward_json

    data = read_preferences(lessons.preferences)
    tasks = read_tasks(data, lessons, read_reward_json(backbones / name)["dimensions"])
    clips = load_clips(data, tasks)
    members, logs = [], []
    for index in range(config.ensemble):
        seeded = config.model_copy(update={"seed": config.seed + index})
        label = name if config.ensemble == 1 else f"{name} {index + 1}/{config.ensemble}"
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
        if config.ensemble > 1:
            together = EnsembleReward(members)
            together.data_hash = members[0].data_hash
            calibrate(together, tasks, clips)
            together.save(out / name)
        else:
            members[0].save(out / name)
    barrier()
    return logs


def read_tasks(
    data: PreferenceData, lessons: Lessons, dimensions: Sequence[str]
) -> list[RewardTask]:
    """The tasks that teach a model of these dimensions; UserError when there is nothing to learn."""
    check_dimensions(data)
    tasks = load_tasks(
        data,
        dimensions=dimensions,
        splits=lessons.splits,
        annotators=lessons.annotators,
        prompt_ids=lessons.prompt_ids,
    )
    if not tasks:
        raise UserError(
            f"{lessons.preferences} holds no training rows for {', '.join(dimensions)} by these annotators and prompts"
        )
    for dimension in dimensions:
        if only_ties(dimension, tasks):
            raise UserError(
                f"every verdict on {dimension} in {lessons.preferences} is a tie; expected some clips to be better than others"
            )
    return tasks


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
    from rewards.checkpoint import load_trainable

    seed_everything(config.seed)
    model = load_trainable(source)
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


def prepare(model: RewardModule, config: RewardTrainConfig) -> None:
    """Freeze, put on deltas and switch on recomputation, as the settings say."""
    if config.lora is not None:
        if model.lora is None:
            add_lora(model, config.lora)
        only_deltas_learn(model)
    if config.backbone_lr == 0:
        freeze_groups(model, ("backbone",))
    freeze_groups(model, config.frozen)
    if config.gradient_checkpointing:
        model.recompute_layers()


def check_loss(
    model: RewardModule, loss: LossConfig, label: str, *, synthetic: float = 0.0
) -> None:
    """UserError when a model cannot learn from this loss."""
    if loss.kind == "gaussian" and not model.settings.uncertainty:
        raise UserError(
            f"loss.kind=gaussian trains a spread that the {label} model does not have; set uncertainty: true where its backbone "
            "is configured, or another loss.kind"
        )
    if (loss.kind == "answers") != model.compares:
        what = "answers, comparing two clips" if model.compares else "scores, not answers"
        wanted = "answers" if model.compares else "pairs, best_worst or gaussian"
        raise UserError(
            f"the {label} model gives {what}; expected loss.kind {wanted}, got {loss.kind} (`own: {{{label}: {{loss: …}}}}` is for it alone)"
        )
    if model.compares and synthetic:
        raise UserError(
            f"synthetic lessons are pairs of scores; expected synthetic 0 for the {label} model"
        )


def fit(
    model: RewardModule,
    tasks: Sequence[RewardTask],
    clips: dict[str, Clip],
    config: RewardTrainConfig,
    *,
    label: str,
    held: Sequence[RewardTask] = (),
    checkpoints: Path | None = None,
    identity: str = "",
) -> tuple[RewardModule, list[dict[str, float]]]:
    """Train one model with transformers' Trainer; returns it, whole on every process, and its log, one row per step.

    Args:
        held: tasks that decide when to stop and which weights to keep (`evaluate_every`).
        checkpoints: folder of the checkpoints, from whose newest it goes on; None keeps none.
        identity: hash of what it learns from, so that it never goes on from another training's.
    """
    import tempfile

    from rewards.training.deepspeed import gather_readouts, whole_model
    from rewards.training.resume import open_checkpoints
    from rewards.training.trainer import TaskDataset, reward_trainer_class, training_arguments

    if world_size() > 1 and config.zero_stage is None:
        raise UserError(
            f"{world_size()} processes were launched and zero_stage is unset; expected 1, 2 or 3, or one process"
        )
    if config.zero_stage is not None:
        init_distributed()
    check_loss(model, config.loss, label, synthetic=config.synthetic)
    model.requires_grad_(True)
    model.train()
    prepare(model, config)
    width = tie_widths(model.dimensions, tasks)
    if not isinstance(config.loss.ties, str):
        width.fill_(config.loss.ties)
    with tempfile.TemporaryDirectory() as scratch, model.learning_ties(width, config.loss.ties):
        newest = None if checkpoints is None else open_checkpoints(checkpoints, identity)
        twin = None if config.zero_stage is None else copy.deepcopy(model)
        if config.zero_stage == 3:
            gather_readouts(model)
        trainer = reward_trainer_class()(
            model=model,
            args=training_arguments(
                config,
                checkpoints or Path(scratch),
                has_held_out=bool(held) and checkpoints is not None,
            ),
            train_dataset=TaskDataset(weighted(tasks, config.loss)),
            eval_dataset=TaskDataset(held),
            data_collator=list,
            config=config,
            clips=clips,
            label=label,
            tie_width=width,
            rationales=load_rationales(config.loss.rationales) if config.loss.rationales else {},
        )
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        if twin is not None:
            model = whole_model(trainer, twin)
    return model, trainer.metrics

"""Training the reward models on human verdicts.

1. tasks: a prompt, its K clips, every verdict on their pairs; split by prompt cluster, never by pair
2. each clip of a task is scored once; the verdicts are gathered from those scores (`rewards.training.loss`)
3. Bradley-Terry with ties (Rao-Kupper) per dimension, missing labels masked; explicit votes weigh 1, implied less
4. mean, spread and range are frozen on validation prompts and travel with the checkpoint
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reelhf.errors import UserError
from rewards.data import Clip, RewardTask, load_clips, load_tasks
from rewards.lora import add_lora, base_of, only_deltas_learn
from rewards.training.answers import load_rationales
from rewards.training.calibrate import calibrate
from rewards.training.config import LossConfig, RewardTrainConfig
from rewards.training.groups import freeze_groups
from rewards.training.loss import only_ties, tie_widths
from rewards.training.weights import weighted

if TYPE_CHECKING:
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
    """Train, calibrate and save one model; returns its log."""
    from annotation.records import read_preferences
    from reelhf.engine import seed_everything
    from reelhf.hashing import content_hash
    from rewards.checkpoint import reward_class
    from rewards.module import read_reward_json

    data = read_preferences(lessons.preferences)
    seed_everything(config.seed)
    model = reward_class(read_reward_json(backbones / name)["type"]).load(backbones / name)
    tasks = load_tasks(
        data,
        dimensions=model.dimensions,
        splits=lessons.splits,
        annotators=lessons.annotators,
        prompt_ids=lessons.prompt_ids,
    )
    if not tasks:
        raise UserError(
            f"{lessons.preferences} holds no training rows for {', '.join(model.dimensions)} by these annotators and prompts"
        )
    for dimension in model.dimensions:
        if only_ties(dimension, tasks):
            raise UserError(
                f"every verdict on {dimension} in {lessons.preferences} is a tie; expected some clips to be better than others"
            )
    clips = load_clips(data, tasks)
    training = [task for task in tasks if task.split != "validation"] or tasks
    metrics = fit(model, training, clips, config, label=name)
    if config.lora is not None:
        model.base = base_of(backbones / name)
    model.data_hash = content_hash([t.task_id for t in tasks], [len(t.votes) for t in tasks])
    calibrate(model, tasks, clips)
    model.save(out / name)
    return metrics


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
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})


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
) -> list[dict[str, float]]:
    """Train one model in place with transformers' Trainer; returns its log, one row per logged step."""
    import tempfile

    from rewards.training.trainer import TaskDataset, reward_trainer_class, training_arguments

    model.requires_grad_(True)
    model.train()
    prepare(model, config)
    check_loss(model, config.loss, label, synthetic=config.synthetic)
    width = tie_widths(model.dimensions, tasks)
    if not isinstance(config.loss.ties, str):
        width.fill_(config.loss.ties)
    with tempfile.TemporaryDirectory() as scratch, model.learning_ties(width, config.loss.ties):
        trainer = reward_trainer_class()(
            model=model,
            args=training_arguments(config, Path(scratch), has_held_out=False),
            train_dataset=TaskDataset(weighted(tasks, config.loss)),
            data_collator=list,
            config=config,
            clips=clips,
            label=label,
            tie_width=width,
            rationales=load_rationales(config.loss.rationales) if config.loss.rationales else {},
        )
        trainer.train()
    return trainer.metrics

"""Training of one model: what of it learns, from which loss, on how many processes."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reelhf.engine import init_distributed, world_size
from reelhf.errors import UserError
from rewards.data import Clip, RewardTask
from rewards.heads import set_heads
from rewards.lora import add_lora, only_deltas_learn
from rewards.training.answers import load_rationales
from rewards.training.calibrate import calibrate_heads
from rewards.training.config import LossConfig, RewardTrainConfig
from rewards.training.groups import freeze_groups
from rewards.training.loss import tie_widths
from rewards.training.weights import weighted

if TYPE_CHECKING:
    from rewards.module import RewardModule


def prepare(model: RewardModule, config: RewardTrainConfig) -> None:
    """Draw further heads, freeze, put on deltas and switch on recomputation, as the settings say."""
    set_heads(model, config.ensemble.heads)
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
    from rewards.training.arguments import training_arguments
    from rewards.training.deepspeed import gather_readouts, whole_model
    from rewards.training.resume import open_checkpoints
    from rewards.training.trainer import RewardTrainer, TaskDataset

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
        trainer = RewardTrainer(
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
    calibrate_heads(model, [*tasks, *held], clips)
    return model, trainer.metrics

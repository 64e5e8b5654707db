"""Training the reward models on human verdicts.

1. tasks: a prompt, its K clips, every verdict on their pairs; split by prompt cluster, never by pair
2. each clip of a task is scored once; the pairs are gathered from those scores
3. Bradley-Terry with ties (Rao-Kupper) per dimension, missing labels masked; explicit votes weigh 1, implied less
4. mean, spread and range are frozen on validation prompts and travel with the checkpoint
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset

from reelhf.config import Config
from reelhf.errors import UserError
from rewards.calibration import MIN_CLIPS, fit_temperature, spread
from rewards.composite import MODEL_FOLDERS
from rewards.data import Clip, RewardTask, group_by_shape, load_clips, load_tasks, score_clips
from rewards.losses import bradley_terry_ties_loss, masked_mean, tie_width_from_rate

if TYPE_CHECKING:
    from rewards.module import RewardModule


LONGEST_FIRST = ("motion", "foundational", "aesthetic")
"""The order in which models side by side are started."""
LEARNED_SPLITS = ("train", "validation")
"""Splits of the preference data that teach a reward; the third, `test`, measures it."""


class RewardTrainConfig(Config):
    """How the reward models learn from preference data."""

    models: tuple[str, ...] = MODEL_FOLDERS
    """Which of foundational, motion and aesthetic to train."""
    epochs: PositiveFloat = 3.0
    """Passes over the training tasks."""
    tasks_per_batch: PositiveInt = 4
    """Tasks per step; each brings its K clips and all its verdicts."""
    head_lr: PositiveFloat = 1e-3
    """Learning rate of the heads; warms up over a tenth of the steps, then falls as a cosine."""
    backbone_lr: float = Field(1e-4, ge=0)
    """Learning rate of everything before the heads; 0 freezes it."""
    weight_decay: float = Field(0.05, ge=0)
    """Of AdamW."""
    grad_clip: PositiveFloat = 1.0
    """Largest gradient norm."""
    shift: float = Field(0.06, ge=0, lt=0.5)
    """Augmentation: each clip is moved by up to this fraction of its side, its border repeated."""
    side_by_side: PositiveInt = 1
    """Models that are trained at once, each in a process of its own with its share of the threads."""
    seed: int = 0
    """Of batches and augmentation."""
    own: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of one model that differ from the above: {aesthetic: {tasks_per_batch: 2}}."""

    @model_validator(mode="after")
    def _own_settings(self) -> RewardTrainConfig:
        for option, names in (("models", self.models), ("own", self.own)):
            for name in names:
                if name not in MODEL_FOLDERS:
                    raise ValueError(
                        f"{option} names '{name}'; expected one of {', '.join(MODEL_FOLDERS)}"
                    )
        for name in self.own:
            self.of(name)
        return self

    def of(self, name: str) -> RewardTrainConfig:
        """The settings that one model is trained with."""
        shared = self.model_dump(exclude={"own"})
        return RewardTrainConfig(**(shared | self.own.get(name, {})))


class TaskDataset(Dataset[RewardTask]):
    """Tasks for the Trainer's loader."""

    def __init__(self, tasks: Sequence[RewardTask]) -> None:
        self.tasks = list(tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> RewardTask:
        return self.tasks[index]


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
    clips = load_clips(data, tasks)
    training = [task for task in tasks if task.split != "validation"] or tasks
    metrics = fit(model, training, clips, config, label=name)
    model.data_hash = content_hash([t.task_id for t in tasks], [len(t.votes) for t in tasks])
    calibrate(model, tasks, clips)
    model.save(out / name)
    return metrics


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

    from transformers import TrainingArguments

    model.requires_grad_(True)
    model.train()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=config.tasks_per_batch,
            num_train_epochs=config.epochs,
            learning_rate=config.head_lr,
            weight_decay=config.weight_decay,
            max_grad_norm=config.grad_clip,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=config.seed,
        )
        trainer = reward_trainer_class()(
            model=model,
            args=arguments,
            train_dataset=TaskDataset(tasks),
            data_collator=list,
            config=config,
            clips=clips,
            label=label,
        )
        trainer.train()
    return trainer.metrics


def tie_widths(dimensions: Sequence[str], tasks: Sequence[RewardTask]) -> Tensor:
    """Rao-Kupper tie width per dimension from the share of ties among explicit verdicts, [D]."""
    widths = []
    for name in dimensions:
        votes = [
            v.preference == 0 for t in tasks for v in t.votes if v.dimension == name and v.explicit
        ]
        widths.append(tie_width_from_rate(sum(votes) / max(1, len(votes))))
    return torch.tensor(widths)


def reward_trainer_class() -> type[Any]:
    """transformers.Trainer with our loss; built on demand because importing it is slow."""
    from transformers import Trainer, TrainerCallback

    from reelhf.engine import world_size

    class Report(TrainerCallback):
        """Progress in our own words instead of the Trainer's prints."""

        def __init__(self, label: str) -> None:
            self.label = label

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                print(
                    f"  {self.label}: step {state.global_step}/{state.max_steps} "
                    f"loss {float(logs['loss']):.3f}",
                    flush=True,
                )

    class RewardTrainer(Trainer):
        def __init__(
            self,
            *,
            config: RewardTrainConfig,
            clips: dict[str, Clip],
            label: str,
            **kwargs: Any,
        ) -> None:
            from transformers.trainer_callback import PrinterCallback

            super().__init__(**kwargs)
            self.remove_callback(PrinterCallback)
            self.add_callback(Report(label))
            self.reward_config, self.clips = config, clips
            self.metrics: list[dict[str, float]] = []
            self.draws = torch.Generator().manual_seed(config.seed)
            self.tie_width = tie_widths(self.model.dimensions, self.train_dataset.tasks)
            self.model_accepts_loss_kwargs = False

        def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
            groups = [
                {
                    "params": [
                        parameter
                        for name, parameter in self.model.named_parameters()
                        if name.startswith(self.model.readouts) == readout
                    ],
                    "lr": lr,
                }
                for readout, lr in (
                    (True, self.reward_config.head_lr),
                    (False, self.reward_config.backbone_lr),
                )
            ]
            self.optimizer = torch.optim.AdamW(
                groups, weight_decay=self.args.weight_decay, betas=(0.9, 0.98)
            )
            return self.optimizer

        def compute_loss(
            self, model: nn.Module, inputs: list[RewardTask], *_: Any, **__: Any
        ) -> Tensor:
            # after another trainer in this process there is a process group of one, and Accelerate wraps the model in DDP
            alone = world_size() == 1
            loss, metrics = preference_loss(
                self.model if alone else model,
                inputs,
                self.clips,
                tie_width=self.tie_width,
                shift=self.reward_config.shift,
                generator=self.draws,
            )
            self.metrics.append(metrics)
            return loss

        def _prepare_inputs(self, inputs: list[RewardTask]) -> list[RewardTask]:
            return inputs  # tasks, not tensors: clips are looked up and moved in the loss

    return RewardTrainer


def preference_loss(
    model: Any,
    tasks: Sequence[RewardTask],
    clips: dict[str, Clip],
    *,
    tie_width: Tensor,
    shift: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Mean over dimensions of the weighted Rao-Kupper loss of all verdicts on these tasks.

    Args:
        tie_width: per dimension, [D].
        generator: of frame choices and augmentation; None means fixed frames.
    Returns: the loss and {"loss", "accuracy", "valid_fraction", "votes"}.
    """
    device = next(model.parameters()).device
    flat = [(sha, task.prompt) for task in tasks for sha in task.clips]
    offsets = torch.tensor([0, *(len(task.clips) for task in tasks)]).cumsum(0).tolist()

    # 1. Score every clip once, clips of one shape together.
    values = torch.full((len(flat), len(model.dimensions)), float("nan"), device=device)
    for rows, frames, fps in group_by_shape([clips[sha] for sha, _ in flat]):
        selection = model.select(frames.shape[2], float(fps[0]), generator)
        if shift and generator is not None:
            frames = shift_clips(frames, shift, generator)
        scores = model(
            frames.to(device),
            selection=selection,
            fps=fps.to(device),
            prompts=[flat[i][1] for i in rows],
        )
        values = values.index_copy(0, torch.tensor(rows, device=device), scores.values)

    # 2. Gather the pairs, a column per dimension; a pair judged in one dimension has no label in the others.
    votes = [
        (vote, start)
        for task, start in zip(tasks, offsets, strict=False)
        for vote in task.votes
        if vote.dimension in model.dimensions
    ]
    a = values[[start + vote.a for vote, start in votes]]  # [N, D]
    b = values[[start + vote.b for vote, start in votes]]
    column = torch.tensor(
        [model.dimensions.index(vote.dimension) for vote, _ in votes], device=device
    )
    labelled = nn.functional.one_hot(column, len(model.dimensions)).bool()
    preference = torch.tensor([vote.preference for vote, _ in votes], device=device)
    preference = preference[:, None].expand_as(a)
    weight = torch.tensor([vote.weight for vote, _ in votes], device=device)[:, None].expand_as(a)

    # 3. Rao-Kupper per dimension over its valid rows.
    mask = labelled & a.isfinite() & b.isfinite()
    # a masked row's NaN would come back through the gradient
    a, b = a.masked_fill(~mask, 0.0), b.masked_fill(~mask, 0.0)
    losses = bradley_terry_ties_loss(a, b, preference, tie_width=tie_width.to(device))
    per_dimension = [
        masked_mean(losses[:, d], mask[:, d], weight[:, d]) for d in range(len(model.dimensions))
    ]
    present = [loss for loss, count in per_dimension if count > 0]
    total = torch.stack(present).mean() if present else values.nansum() * 0.0
    decided = mask & (preference != 0)
    right = ((a - b) * preference > 0)[decided].float()
    return total, {
        "loss": float(total.detach()),
        "accuracy": float(right.mean()) if len(right) else float("nan"),
        "valid_fraction": float(values.detach().isfinite().all(1).float().mean()),
        "votes": float(mask.sum()),
    }


def shift_clips(frames: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Each clip moved as a whole by up to `most` of its side, its border repeated; [N, 3, F, H, W]."""
    height, width = frames.shape[-2:]
    down, right = (
        ((2 * torch.rand(len(frames), generator=generator) - 1) * most * side).round().long()
        for side in (height, width)
    )
    out = []
    for clip, y, x in zip(frames, down.tolist(), right.tolist(), strict=True):
        rows = (torch.arange(height) - y).clamp(0, height - 1)
        columns = (torch.arange(width) - x).clamp(0, width - 1)
        out.append(clip[:, :, rows][..., columns])
    return torch.stack(out)


def calibrate(model: RewardModule, tasks: Sequence[RewardTask], clips: dict[str, Clip]) -> None:
    """Set the model's mean, std, range and temperature on validation prompts (all prompts when those are too few)."""
    held = [task for task in tasks if task.split == "validation"]
    if sum(len(task.clips) for task in held) < MIN_CLIPS:
        held = list(tasks)
    scores = score_clips(model, clips, [(sha, task.prompt) for task in held for sha in task.clips])
    mean, std, low, high = spread(torch.stack(list(scores.values())))
    for name, value in (("mean", mean), ("std", std), ("low", low), ("high", high)):
        getattr(model, name).copy_(value)
    for index, dimension in enumerate(model.dimensions):
        gaps = [
            vote.preference
            * (
                scores[task.clips[vote.a], task.prompt][index]
                - scores[task.clips[vote.b], task.prompt][index]
            )
            for task in held
            for vote in task.votes
            if vote.dimension == dimension and vote.preference != 0
        ]
        model.temperature[index] = fit_temperature(torch.stack(gaps) if gaps else torch.empty(0))

"""transformers' Trainer with our loss: two learning rates, frozen groups, held-out prompts, exact resume, DeepSpeed.

Importing this file imports transformers' Trainer, which is slow: do it where one is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from reelhf.engine import rank, world_size
from rewards.data import Clip, RewardTask
from rewards.training.answers import Rationales, answer_loss
from rewards.training.config import RewardTrainConfig
from rewards.training.loss import preference_loss
from rewards.training.synthetic import synthetic_loss

OUR_STATE = "reward_state_{rank}.pt"
"""Beside the Trainer's own files in a checkpoint: the generator of frames and augmentation, and the log so far."""


class TaskDataset(Dataset[RewardTask]):
    """Tasks for the Trainer's loader."""

    def __init__(self, tasks: Sequence[RewardTask]) -> None:
        self.tasks = list(tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> RewardTask:
        return self.tasks[index]


class Report(TrainerCallback):
    """Progress in our own words instead of the Trainer's prints."""

    def __init__(self, label: str) -> None:
        self.label = label

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not (logs and state.is_world_process_zero):
            return
        for name, what in (("loss", "loss"), ("eval_loss", "held-out loss")):
            if name in logs:
                print(
                    f"  {self.label}: step {state.global_step}/{state.max_steps} "
                    f"{what} {float(logs[name]):.3f}",
                    flush=True,
                )


class RewardTrainer(Trainer):
    """Takes batches of tasks; its draws and its log survive a resume."""

    def __init__(
        self,
        *,
        config: RewardTrainConfig,
        clips: dict[str, Clip],
        label: str,
        tie_width: Tensor,
        rationales: Rationales,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)
        self.add_callback(Report(label))
        if self.args.load_best_model_at_end:
            self.add_callback(EarlyStoppingCallback(config.patience))
        self.reward_config, self.clips, self.tie_width = config, clips, tie_width
        self.rationales = rationales
        self.metrics: list[dict[str, float]] = []
        self.draws = torch.Generator().manual_seed(config.seed + 7919 * rank())
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        groups = [
            {
                "params": [
                    parameter
                    for name, parameter in self.model.named_parameters()
                    if self.model.is_readout(name) == readout and parameter.requires_grad
                ],
                "lr": lr,
            }
            for readout, lr in (
                (True, self.reward_config.head_lr),
                (False, self.reward_config.backbone_lr),
            )
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            weight_decay=self.args.weight_decay,
            betas=(0.9, 0.98),
        )
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: list[RewardTask], *_: Any, **__: Any
    ) -> Tensor:
        # after another trainer in this process there is a process group of one, and Accelerate wraps the model in DDP
        alone = world_size() == 1 and not self.is_deepspeed_enabled
        model, config = self.model if alone else model, self.reward_config
        loss, metrics = self._loss(model, inputs, shift=config.shift, generator=self.draws)
        if config.synthetic:
            lesson, right = synthetic_loss(model, inputs, self.clips, generator=self.draws)
            loss = loss + config.synthetic * lesson
            metrics |= {"synthetic_accuracy": right}
        self.metrics.append(metrics)
        return loss

    def _loss(
        self,
        model: Any,
        tasks: list[RewardTask],
        *,
        shift: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        config = self.reward_config.loss
        if config.kind == "answers":
            return answer_loss(
                model,
                tasks,
                self.clips,
                config=config,
                rationales=self.rationales,
                generator=generator,
            )
        return preference_loss(
            model,
            tasks,
            self.clips,
            tie_width=self.model.tie_width_now(self.tie_width),
            config=config,
            shift=shift,
            generator=generator,
            seed=self.reward_config.seed,
        )

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss and accuracy on held-out prompts, fixed frames; every process does all of them."""
        tasks, size = self.eval_dataset.tasks, self.args.per_device_eval_batch_size
        model = self.model_wrapped if self.is_deepspeed_enabled else self.model
        rows = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for start in range(0, len(tasks), size):
                rows.append(self._loss(model, tasks[start : start + size])[1])
        votes = sum(row["votes"] for row in rows)
        metrics = {
            f"eval_{name}": sum(row[name] * row["votes"] for row in rows if row["votes"])
            / max(1.0, votes)
            for name in ("loss", "accuracy")
        }
        self.log(metrics)
        self.metrics.append(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _prepare_inputs(self, inputs: list[RewardTask]) -> list[RewardTask]:
        return inputs  # tasks, not tensors: clips are looked up and moved in the loss

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        state = {"draws": self.draws.get_state(), "metrics": self.metrics}
        torch.save(state, Path(output_dir) / OUR_STATE.format(rank=rank()))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        path = Path(checkpoint or "") / OUR_STATE.format(rank=rank())
        if checkpoint is not None and path.is_file():
            state = torch.load(path, weights_only=True)
            self.draws.set_state(state["draws"])
            self.metrics = list(state["metrics"])

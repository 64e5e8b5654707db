"""What transformers' Trainer is told of a reward's training."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from rewards.training.config import RewardTrainConfig
from rewards.training.deepspeed import deepspeed_config


def training_arguments(
    config: RewardTrainConfig, folder: Path, *, has_held_out: bool
) -> TrainingArguments:
    """What transformers' Trainer is told, from our settings."""
    watches = config.evaluate_every if has_held_out else 0
    saves = watches or config.checkpoint_every
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.tasks_per_batch,
        per_device_eval_batch_size=config.tasks_per_batch,
        gradient_accumulation_steps=config.accumulation_steps,
        num_train_epochs=config.epochs,
        learning_rate=config.head_lr,
        weight_decay=config.weight_decay,
        max_grad_norm=config.grad_clip,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        logging_steps=10,
        save_strategy="steps" if saves else "no",
        save_steps=saves or 500,
        save_total_limit=2 if saves else None,
        eval_strategy="steps" if watches else "no",
        eval_steps=watches or None,
        load_best_model_at_end=bool(watches),
        metric_for_best_model="loss" if watches else None,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        bf16=config.bf16 and config.zero_stage is None,
        deepspeed=deepspeed_config(config),
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=config.seed,
    )

"""The DeepSpeed settings of reward training; transformers' Trainer fills in what they share with its own."""

from __future__ import annotations

from typing import Any

from rewards.training.config import RewardTrainConfig


def deepspeed_config(config: RewardTrainConfig) -> dict[str, Any] | None:
    """ZeRO-1, 2 or 3; None when `zero_stage` is unset.

    Our AdamW is used as it is, so that one process without DeepSpeed and many with it take the same steps.
    """
    if config.zero_stage is None:
        return None
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage == 3:
        # small readouts are read outside a forward of their own (`words.weight`): they stay whole on every process
        zero |= {"stage3_gather_16bit_weights_on_model_save": True}
        zero |= {"stage3_param_persistence_threshold": 100_000}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": config.bf16},
        "gradient_clipping": config.grad_clip,
        "gradient_accumulation_steps": config.accumulation_steps,
        "train_micro_batch_size_per_gpu": config.tasks_per_batch,
        "train_batch_size": "auto",
        "zero_allow_untested_optimizer": True,
    }

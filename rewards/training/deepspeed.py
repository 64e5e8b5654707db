"""The DeepSpeed settings of reward training; transformers' Trainer fills in what they share with its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rewards.training.config import RewardTrainConfig

if TYPE_CHECKING:
    from rewards.module import RewardModule


def deepspeed_config(config: RewardTrainConfig) -> dict[str, Any] | None:
    """ZeRO-1, 2 or 3; None when `zero_stage` is unset.

    Our AdamW is used as it is, so that one process without DeepSpeed and many with it take the same steps.
    """
    if config.zero_stage is None:
        return None
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": True}
    return {
        "zero_optimization": zero,
        # weights stay float32, as without DeepSpeed: frames and readouts meet them unrounded
        "torch_autocast": {"enabled": config.bf16, "dtype": "bfloat16"},
        "gradient_clipping": config.grad_clip,
        "gradient_accumulation_steps": config.accumulation_steps,
        "train_micro_batch_size_per_gpu": config.tasks_per_batch,
        "train_batch_size": "auto",
        "zero_allow_untested_optimizer": True,
    }


def gather_readouts(model: RewardModule) -> None:
    """Have ZeRO-3 gather at the start of a forward what is read outside a forward of its own: all but the backbone, and its embeddings.

    `WordHead.match` reads its weights, a prompt's likelihood the embeddings: DeepSpeed's hooks alone would leave them empty.
    """
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter

    for name, parameter in model.named_parameters():
        if not name.startswith("backbone.") or "embed_tokens" in name:
            register_external_parameter(model, parameter)


def whole_model(trainer: Any, twin: RewardModule) -> RewardModule:
    """`twin`, a copy of the model from before, with the trained weights, whole on every process."""
    from torch import distributed
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    box = [state if trainer.accelerator.is_main_process else None]
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.broadcast_object_list(box)
    unset_hf_deepspeed_config()  # models that are built from now on are not to be split
    twin.load_state_dict(box[0])
    return twin

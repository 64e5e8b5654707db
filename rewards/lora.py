"""Low-rank deltas of a reward's backbone (LoRA, 2106.09685): learned with the readouts, saved with them as one thing, merged on demand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PositiveFloat, PositiveInt

from reelhf.config import Config
from reelhf.errors import UserError
from rewards.training.groups import Group, linear_layers

if TYPE_CHECKING:
    from rewards.module import RewardModule

LEARNED = ("lora_", "trainable_tokens_")
"""What stands in the names of the backbone's parameters that are learned."""


class LoraSettings(Config):
    """Which layers of the backbone get a delta of low rank; everything else of the backbone stays as it is."""

    rank: PositiveInt = 64
    """Rank of each delta."""
    alpha: PositiveFloat = 128.0
    """Deltas are scaled by alpha / rank."""
    groups: tuple[Group, ...] = ("language", "vision")
    """Parts of the backbone whose linear layers get one."""


def add_lora(model: RewardModule, settings: LoraSettings) -> None:
    """Put deltas, at first zero, on a reward's backbone; of the embeddings only the reward tokens' rows learn."""
    from peft import LoraConfig, get_peft_model

    layers = list(linear_layers(model.backbone, settings.groups))
    if not layers:
        raise UserError(
            f"lora.groups {', '.join(settings.groups)} hold no linear layer of this backbone; an encoder is all `vision`"
        )
    tokens = sorted(getattr(model, "reward_ids", {}).values())
    model.backbone = get_peft_model(
        model.backbone,
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=0.0,  # a frozen reward stays in train(): dropout would make it random
            target_modules=layers,
            trainable_token_indices={"embed_tokens": tokens} if tokens else None,
        ),
    )
    model.lora = settings


def only_deltas_learn(model: RewardModule) -> None:
    """Freeze what of the backbone is no delta."""
    for name, parameter in model.backbone.named_parameters():
        parameter.requires_grad_(any(mark in name for mark in LEARNED))


def merge_lora(model: RewardModule) -> None:
    """Add the deltas to the weights they belong to: the same scores, no peft, a self-contained checkpoint."""
    if model.lora is not None:
        model.backbone = model.backbone.merge_and_unload()
        model.lora, model.base = None, None


def is_base_weight(name: str) -> bool:
    """Whether a parameter of a reward with deltas is one of the untouched backbone: it lies in the base's own checkpoint."""
    return name.startswith("backbone.") and not any(mark in name for mark in LEARNED)


def base_of(folder: Path) -> dict[str, str]:
    """How a checkpoint of deltas names the checkpoint it was learned on: where it lies and the hash of its manifest."""
    from reelhf.hashing import sha256_file

    return {
        "path": str(Path(folder).resolve()),
        "manifest": sha256_file(Path(folder) / "manifest.json"),
    }


def base_state(base: dict[str, str], of: Path) -> dict[str, Any]:
    """The weights under a checkpoint of deltas; UserError when they are gone or are no longer the same."""
    from safetensors.torch import load_file

    from reelhf.hashing import sha256_file
    from reelhf.run import verify

    folder = Path(base["path"])
    if not (folder / "manifest.json").is_file():
        raise UserError(
            f"{of} holds deltas on {folder}, which is not there; put it back, or `reelhf rewards merge` where both are"
        )
    if sha256_file(folder / "manifest.json") != base["manifest"]:
        raise UserError(
            f"{of} holds deltas on {folder}, which has been written anew since; train again on it"
        )
    verify(folder)
    return load_file(folder / "model.safetensors")


def merge_reward(source: Path, out: Path) -> Path:
    """Write a checkpoint of deltas as a self-contained one."""
    from rewards.checkpoint import load_reward, one_model

    model = one_model(load_reward(source), source)
    if model.lora is None:
        raise UserError(f"{source} holds no deltas to merge; it is self-contained as it is")
    merge_lora(model)
    return model.save(Path(out))

"""Loading a trained reward model."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from reelhf.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from rewards.module import RewardModule


def reward_class(type_name: str) -> type[RewardModule]:
    """The class behind the `type` of a reward.json."""
    from rewards import REWARD_MODELS

    if type_name not in REWARD_MODELS:
        raise UserError(
            f"reward type {type_name!r}; expected one of {', '.join(REWARD_MODELS)}."
            + did_you_mean(type_name, REWARD_MODELS)
        )
    module, name = REWARD_MODELS[type_name].split(":")
    return getattr(import_module(module), name)


def load_trainable(folder: Path) -> RewardModule:
    """The model of a checkpoint folder, its weights free to learn."""
    from rewards.module import read_reward_json

    return reward_class(read_reward_json(folder)["type"]).load(folder)


def load_reward(path: Path | str) -> RewardModule:
    """A frozen reward model (see `RewardModule.freeze`) from a sealed checkpoint folder."""
    from reelhf.run import verify
    from rewards.module import read_reward_json

    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"no reward checkpoint at {folder}")
    read_reward_json(folder)
    verify(folder)
    return load_trainable(folder).freeze()

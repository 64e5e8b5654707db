"""Loading a trained reward model."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reelhf.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from rewards.calibrated import CalibratedReward
    from rewards.module import RewardModule

REWARD_SCHEMA_VERSION = 1


def reward_class(type_name: str) -> type[CalibratedReward]:
    """The class behind the `type` of a reward.json."""
    from rewards import REWARD_MODELS

    if type_name not in REWARD_MODELS:
        raise UserError(
            f"reward type {type_name!r}; expected one of {', '.join(REWARD_MODELS)}."
            + did_you_mean(type_name, REWARD_MODELS)
        )
    module, name = REWARD_MODELS[type_name].split(":")
    return getattr(import_module(module), name)


def read_reward_json(folder: Path) -> dict[str, Any]:
    """reward.json of a checkpoint folder; UserError when it is missing or of another schema version."""
    path = Path(folder) / "reward.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a reward checkpoint: it has no reward.json")
    described = json.loads(path.read_text())
    if described.get("schema_version") != REWARD_SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {described.get('schema_version')!r}; this version reads "
            f"{REWARD_SCHEMA_VERSION}. Train it again with `reelhf rewards train`"
        )
    return described


def one_model(reward: CalibratedReward, folder: Path) -> RewardModule:
    """The reward of a folder where one on a backbone is needed; UserError for an ensemble."""
    from rewards.module import RewardModule

    if not isinstance(reward, RewardModule):
        raise UserError(
            f"{folder} is an ensemble; expected one model, such as that of its member_0/"
        )
    return reward


def load_trainable(folder: Path) -> CalibratedReward:
    """The model of a checkpoint folder, its weights free to learn."""
    return reward_class(read_reward_json(folder)["type"]).load(folder)


def load_reward(path: Path | str) -> CalibratedReward:
    """A frozen reward model (see `CalibratedReward.freeze`) from a sealed checkpoint folder."""
    from reelhf.run import verify

    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"no reward checkpoint at {folder}")
    read_reward_json(folder)
    verify(folder)
    return load_trainable(folder).freeze()

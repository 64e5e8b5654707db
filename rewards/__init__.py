"""Reward models: foundational (VLM), motion (video encoder), aesthetic (image encoder on keyframes).

Everything heavy is imported when first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewards.base import CompositeScores, FrameSelection, RewardModel, RewardScores
    from rewards.checkpoint import load_reward
    from rewards.composite import CompositeReward, load_composite

_LAZY = {
    "FrameSelection": "rewards.base",
    "RewardScores": "rewards.base",
    "RewardModel": "rewards.base",
    "CompositeScores": "rewards.base",
    "CompositeReward": "rewards.composite",
    "load_composite": "rewards.composite",
    "load_reward": "rewards.checkpoint",
}
REWARD_MODELS = {
    "qwen_vl_foundational": "rewards.foundational:FoundationalReward",
    "qwen_vl_generative": "rewards.generative:GenerativeReward",
    "vjepa2_motion": "rewards.motion:MotionReward",
    "siglip_aesthetic": "rewards.aesthetic:AestheticReward",
    "ensemble": "rewards.ensemble:EnsembleReward",
}
"""The `type` in a checkpoint's reward.json -> the class that loads it."""

__all__ = [
    "REWARD_MODELS",
    "CompositeReward",
    "CompositeScores",
    "FrameSelection",
    "RewardModel",
    "RewardScores",
    "load_composite",
    "load_reward",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'rewards' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)

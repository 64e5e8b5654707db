"""Low-rank deltas under DeepSpeed: two processes with ZeRO-2 and ZeRO-3 train, resume and save what one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_backbones import reward_on
from tiny_rewards import CAPTIONS, smooth_clip, write_tiny_preferences
from torch import Tensor
from zero_worker import launch

from rewards import load_reward
from rewards.lora import is_base_weight, merge_reward
from rewards.train import train_rewards
from rewards.training.config import RewardTrainConfig

FAMILIES = {"motion": "vjepa2", "foundational": "qwen3_vl"}
STATISTICS = ("mean", "std", "low", "high", "temperature")
WORDS = ("epochs=2", "shift=0", "lora.rank=4", "lora.alpha=8", "head_lr=1e-2", "backbone_lr=1e-2")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rewards on tiny checkpoints of real families, verdicts, and what one process learns from them in `alone`.

    The motion reward looks at every frame, so that nothing is drawn per process; the other one's frames are drawn.
    """
    folder = tmp_path_factory.mktemp("lora_zero")
    for name, backbone in FAMILIES.items():
        reward_on(backbone, folder / "hub" / backbone).save(folder / "backbones" / name)
    write_tiny_preferences(
        folder / "data",
        quality=float,
        make=lambda i: smooth_clip(i, 4),
        num_tasks=12,
        clips_per_task=3,
        dimensions=("prompt_following", "structural_stability", "motion_quality"),
    )
    alone = RewardTrainConfig(
        models=("motion",),
        epochs=2,
        shift=0,
        lora={"rank": 4, "alpha": 8},  # type: ignore[arg-type]
        head_lr=1e-2,
        backbone_lr=1e-2,
        tasks_per_batch=4,
    )
    train_rewards(alone, folder / "data", folder / "backbones", folder / "alone", splits=None)
    return folder


def weights(out: Path, name: str) -> dict[str, Tensor]:
    return load_file(out / name / "model.safetensors")


def distance(one: dict[str, Tensor], two: dict[str, Tensor], keys: list[str]) -> float:
    """Euclidean, over these weights together."""
    return sum(float((two[key] - one[key]).square().sum()) for key in keys) ** 0.5


def score(folder: Path) -> Tensor:
    model = load_reward(folder)
    frames = torch.stack([smooth_clip(i, 4) for i in range(2)])
    return model.score(frames, selection=model.select(4, 8.0), fps=8.0, prompts=CAPTIONS[:2]).values


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_train_resume_and_save_deltas_as_one_does(
    root: Path, tmp_path: Path, stage: int
) -> None:
    words = [*WORDS, f"zero_stage={stage}", "tasks_per_batch=2", "checkpoint_every=2"]
    words.append("models=[motion,foundational]")
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    launch(root, whole, 2, *words)
    launch(root, torn, 2, *words, stop="FoundationalReward:4")
    left = torn / "checkpoints" / "foundational_0"
    assert list(left.glob("checkpoint-*"))
    launch(root, torn, 2, *words)
    assert not left.exists()

    # resumed is never stopped
    for name in FAMILIES:
        first, second = weights(whole, name), weights(torn, name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)

    # two processes are one: the same deltas and readouts, and nothing of the base beside them
    one, two = weights(root / "alone", "motion"), weights(whole, "motion")
    assert one.keys() == two.keys()
    assert not any(map(is_base_weight, two))
    start = weights(root / "backbones", "motion")
    learned = [key for key in one if key not in STATISTICS]
    for mark in ("lora_B", "read.", "head."):  # deltas begin at zero
        own = [key for key in learned if mark in key]
        moved = distance({key: start.get(key, torch.zeros(())) for key in own}, one, own)
        assert moved > 1e-2, mark
        assert distance(one, two, own) < 0.1 * moved, mark
    alone, both = score(root / "alone" / "motion"), score(whole / "motion")
    torch.testing.assert_close(alone, both, atol=5e-3, rtol=5e-2)

    # one loadable thing: beside the base, saved again, and merged
    for name in FAMILIES:
        expected = score(whole / name)
        assert expected.isfinite().all()
        again = load_reward(whole / name).save(tmp_path / "again" / name)
        assert torch.equal(score(again), expected)
        merged = merge_reward(whole / name, tmp_path / "merged" / name)
        torch.testing.assert_close(score(merged), expected, atol=1e-4, rtol=1e-3)
        assert not torch.allclose(score(root / "backbones" / name), expected, atol=1e-3)

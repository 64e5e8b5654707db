"""Low-rank deltas: learned with the readouts, one loadable thing, merged to the same scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_backbones import reward_on
from tiny_rewards import CAPTIONS, smooth_clip, write_tiny_preferences
from torch import Tensor
from typer.testing import CliRunner

from reelhf.errors import UserError
from rewards import load_reward
from rewards.backbones import LANGUAGE
from rewards.commands import app
from rewards.ensemble import EnsembleReward
from rewards.lora import LoraSettings, add_lora, merge_lora, merge_reward
from rewards.module import RewardModule
from rewards.train import train_rewards
from rewards.training.config import RewardTrainConfig
from rewards.training.fit import prepare

FOLDERS = {"qwen3_vl": "foundational", "vjepa2": "motion", "siglip": "aesthetic"}
LORA = LoraSettings(rank=4, alpha=8)


def score(model: RewardModule) -> Tensor:
    frames = torch.stack([smooth_clip(i) for i in range(2)])
    return model.score(frames, selection=model.select(5, 8.0), fps=8.0, prompts=CAPTIONS[:2]).values


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three rewards on real backbones' tiny copies, trained with deltas for a few steps."""
    root = tmp_path_factory.mktemp("lora")
    for name, folder in FOLDERS.items():
        reward_on(name, root / "hub" / name).save(root / "base" / folder)
    data = write_tiny_preferences(
        root / "data",
        quality=float,
        make=smooth_clip,
        num_tasks=6,
        dimensions=(
            "prompt_following",
            "structural_stability",
            "motion_quality",
            "aesthetic_quality",
        ),
    )
    config = RewardTrainConfig(
        epochs=1, tasks_per_batch=2, lora=LORA, head_lr=1e-2, backbone_lr=1e-2
    )
    train_rewards(config, data, root / "base", root / "rewards", splits=None)
    return root


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_deltas_and_readouts_are_one_loadable_thing(trained: Path, folder: str) -> None:
    base, new = load_reward(trained / "base" / folder), load_reward(trained / "rewards" / folder)
    assert not torch.equal(score(base), score(new))
    weights = trained / "rewards" / folder / "model.safetensors"
    assert weights.stat().st_size < (trained / "base" / folder / "model.safetensors").stat().st_size
    again = load_reward(new.save(trained / "again" / folder))
    torch.testing.assert_close(score(again), score(new), rtol=0, atol=0)
    own = dict(base.backbone.named_parameters())
    for name, parameter in new.backbone.base_model.model.named_parameters():
        if "lora_" not in name and "trainable_tokens" not in name:
            plain = name.replace(".base_layer", "").replace(".token_adapter", "")
            torch.testing.assert_close(parameter, own[plain], rtol=0, atol=0)


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_merging_keeps_the_scores_and_needs_no_other_folder(
    trained: Path, folder: str, tmp_path: Path
) -> None:
    answer = CliRunner().invoke(
        app, ["merge", str(trained / "rewards" / folder), "--out", str(tmp_path / folder)]
    )
    assert answer.exit_code == 0, answer.output
    merged = load_reward(tmp_path / folder)
    assert merged.lora is None
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(
        score(merged), score(load_reward(trained / "rewards" / folder)), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(UserError, match="no deltas to merge"):
        merge_reward(tmp_path / folder, tmp_path / "twice")
    EnsembleReward([merged, merged]).save(tmp_path / "both")
    with pytest.raises(UserError, match=r"is an ensemble; expected one model.*member_0"):
        merge_reward(tmp_path / "both", tmp_path / "twice")


@pytest.mark.parametrize("name", LANGUAGE)
def test_deltas_begin_at_nothing_and_reach_the_reward_tokens(tmp_path: Path, name: str) -> None:
    model = reward_on(name, tmp_path / "q")
    before = score(model)
    model.requires_grad_(True)
    prepare(model, RewardTrainConfig(lora=LORA))
    torch.testing.assert_close(score(model), before, atol=1e-6, rtol=1e-5)
    score(model).sum().backward()
    learned = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for mark in ("lora_B", "trainable_tokens", "heads."):
        found = [g for n, g in learned.items() if mark in n]
        assert found, mark
        assert all(g is not None and g.isfinite().all() for g in found)
        assert any((g != 0).any() for g in found), mark
    assert not any("embed_tokens" in n and "trainable" not in n for n in learned)
    merge_lora(model)
    torch.testing.assert_close(score(model), before, atol=1e-6, rtol=1e-5)


def test_frozen_groups_stay_and_a_group_without_layers_is_named(tmp_path: Path) -> None:
    model = reward_on("qwen2_5_vl", tmp_path / "q")
    model.requires_grad_(True)
    prepare(model, RewardTrainConfig(frozen=("vision", "embeddings")))
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("visual" in name or "embed_tokens" in name for name in learns)
    assert any("language_model.layers" in name for name in learns)
    model = reward_on("siglip", tmp_path / "s")
    with pytest.raises(UserError, match="all `vision`"):
        add_lora(model, LoraSettings(groups=("language",)))


def test_deltas_whose_base_is_gone_or_changed_are_named(trained: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(trained / "base" / "motion", tmp_path / "base")
    model = load_reward(trained / "rewards" / "motion")
    model.base = model.base | {"path": str(tmp_path / "base")}
    folder = model.save(tmp_path / "reward")
    load_reward(folder)
    (tmp_path / "base" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="written anew since"):
        load_reward(folder)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match="which is not there"):
        load_reward(folder)

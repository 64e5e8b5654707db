"""Several heads on one backbone: an ensemble in one checkpoint."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
from tiny_rewards import (
    CAPTIONS,
    FOUNDATIONAL,
    MOTION,
    smooth_clip,
    tiny_models,
    write_tiny_preferences,
)
from torch import Tensor, nn
from typer.testing import CliRunner

from reelhf.errors import UserError
from rewards import load_composite, load_reward
from rewards.base import RewardScores
from rewards.commands import app
from rewards.composite import soft_cap
from rewards.data import Clip, RewardTask, Vote
from rewards.generative import GenerativeConfig, GenerativeReward
from rewards.heads import (
    bootstrap_weight,
    bootstrapped,
    every_head,
    mean_and_disagreement,
    set_heads,
)
from rewards.module import RewardModule
from rewards.train import train_rewards
from rewards.training.config import EnsembleConfig, RewardTrainConfig
from rewards.training.fit import fit
from rewards.training.loss import preference_loss
from rewards.training.synthetic import synthetic_loss

NAMES = ("foundational", "motion", "aesthetic")
DIMENSIONS = (
    "prompt_following",
    "structural_stability",
    "motion_quality",
    "aesthetic_quality",
)


def score(model: RewardModule, frames: Tensor) -> RewardScores:
    options = {"selection": model.select(frames.shape[2], 8.0), "fps": 8.0}
    return model.score(frames, prompts=CAPTIONS[: len(frames)], **options)


def batch(count: int = 2) -> Tensor:
    return torch.stack([smooth_clip(i, 4) for i in range(count)])


def several(name: str, count: int = 3) -> RewardModule:
    model = tiny_models()[name]
    torch.manual_seed(5)
    set_heads(model, count)
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tiny rewards trained with three heads each, in the folder `rewards`."""
    folder = tmp_path_factory.mktemp("heads")
    for name, model in tiny_models().items():
        model.save(folder / "backbones" / name)
    write_tiny_preferences(
        folder / "data",
        quality=float,
        make=lambda i: smooth_clip(i, 4),
        num_tasks=12,
        clips_per_task=3,
        dimensions=DIMENSIONS,
    )
    train(folder, folder / "rewards", ensemble={"kind": "heads", "size": 3}, synthetic=0.1)
    return folder


def train(root: Path, out: Path, **options: object) -> Path:
    config = RewardTrainConfig(**{"epochs": 1, **options})  # type: ignore[arg-type]
    return train_rewards(config, root / "data", root / "backbones", out, splits=None)


def test_the_uncertainty_of_several_is_their_spread_and_their_own() -> None:
    z = torch.tensor([[[1.0]], [[3.0]]])
    mean, std = mean_and_disagreement(z, None)
    assert (mean.item(), std.item()) == (2.0, pytest.approx(2**0.5))
    _, both = mean_and_disagreement(z, torch.tensor([[[1.0]], [[2.0]]]))
    assert both.item() == pytest.approx((2 + 2.5) ** 0.5)
    alike = torch.zeros(3, 2, 1, requires_grad=True)
    mean_and_disagreement(alike, None)[1].sum().backward()
    assert alike.grad is not None and alike.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_one_head_is_the_model_as_it_was_and_more_keep_it_first(name: str) -> None:
    model, plain = tiny_models()[name], tiny_models()[name]
    before, keys = score(model, batch()), set(model.state_dict())
    draws = torch.get_rng_state()
    set_heads(model, 1)
    assert set(model.state_dict()) == keys == set(plain.state_dict())
    assert torch.equal(torch.get_rng_state(), draws)
    set_heads(model, 3)
    own = model.hear(batch(), selection=model.select(4, 8.0), fps=8.0, prompts=CAPTIONS[:2])
    assert torch.equal(own.values[:, 0], before.values)
    kept = [list(head.values()) for head in every_head(model)]
    set_heads(model, 2)
    assert [list(head.values()) for head in every_head(model)] == kept[:2]
    set_heads(model, 1)
    assert torch.equal(score(model, batch()).values, before.values)
    assert score(model, batch()).std is None
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize("name", NAMES)
def test_the_score_is_the_mean_of_the_heads_z_and_its_std_their_disagreement(name: str) -> None:
    model = several(name)
    model.head_mean.copy_(torch.randn(model.head_mean.shape))
    model.head_std.copy_(0.5 + torch.rand(model.head_std.shape))
    said = model.hear(batch(), selection=model.select(4, 8.0), fps=8.0, prompts=CAPTIONS[:2])
    z = (said.values - model.head_mean) / model.head_std  # [B, H, D]
    found = score(model, batch())
    torch.testing.assert_close(found.values, z.mean(1))
    torch.testing.assert_close(found.std, z.std(1), atol=1e-5, rtol=1e-4)
    assert found.std is not None and (found.std > 1e-3).all()  # each drawn anew
    frames = batch()
    frames[0] = float("nan")
    assert score(model, frames).valid.tolist() == [False, True]


@pytest.mark.parametrize("name", NAMES)
def test_the_backbone_is_run_once_for_all_heads(name: str) -> None:
    model, calls = several(name, 4), [0]
    layer = next(part for part in model.backbone.modules() if isinstance(part, nn.LayerNorm) or "RMSNorm" in type(part).__name__)  # fmt: skip
    layer.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    score(tiny_models()[name], batch())
    score(model, batch())
    of_four = calls[0]
    set_heads(model, 1)
    score(model, batch())
    assert calls[0] == 2 * of_four > 0


def test_each_head_sees_the_prompts_with_weights_of_its_own() -> None:
    weights = [[bootstrap_weight(0, head, f"p{i}") for i in range(2000)] for head in range(2)]
    for row in weights:  # exponential: mean and standard deviation 1
        assert statistics.mean(row) == pytest.approx(1, abs=0.1)
        assert statistics.stdev(row) == pytest.approx(1, abs=0.1)
        assert min(row) > 0
    assert abs(statistics.correlation(*weights)) < 0.1
    votes = (Vote(0, 1, "motion_quality", 1, 0.5, True, True),)
    tasks = [RewardTask(f"t{i}", "x", f"p{i % 2}", "train", ("a", "b"), votes) for i in range(4)]
    seen = [task.votes[0].weight for task in bootstrapped(tasks, 3, 1)]
    assert seen[:2] == seen[2:] == [0.5 * bootstrap_weight(3, 1, p) for p in ("p0", "p1")]


def lessons() -> tuple[list[RewardTask], dict[str, Clip]]:
    clips = {f"{i}": Clip((smooth_clip(i, 4) * 255).byte(), 8.0) for i in range(6)}
    votes = (Vote(0, 1, "motion_quality", 1, 1.0, True, True),)
    tasks = [
        RewardTask(f"t{i}", CAPTIONS[i], f"p{i}", "train", (f"{2 * i}", f"{2 * i + 1}"), votes)
        for i in range(3)
    ]
    return tasks, clips


def test_the_loss_is_the_mean_of_each_heads_loss_on_its_own_weights() -> None:
    tasks, clips = lessons()
    model, width = several("motion"), torch.tensor([0.3])
    fixed, _ = preference_loss(model, tasks, clips, tie_width=width)
    generator = torch.Generator().manual_seed(0)
    drawn, metrics = preference_loss(
        model, tasks, clips, tie_width=width, generator=generator, seed=4
    )
    each = []
    for i, head in enumerate(every_head(model)):
        single = tiny_models()["motion"]
        for name, part in head.items():
            own = single.words.weight if name == "words.weight" else getattr(single, name)
            if isinstance(part, nn.Module):
                own.load_state_dict(part.state_dict())
            else:
                own.data.copy_(part)
        seen = bootstrapped(tasks, 4, i)
        each.append(
            [preference_loss(single, t, clips, tie_width=width)[0].item() for t in (tasks, seen)]
        )
    assert fixed.item() == pytest.approx(statistics.mean(row[0] for row in each), rel=1e-5)
    assert drawn.item() == pytest.approx(statistics.mean(row[1] for row in each), rel=1e-5)
    assert abs((drawn - fixed).item()) > 1e-6
    assert metrics["loss"] == pytest.approx(drawn.item())


def test_lessons_without_votes_teach_every_head() -> None:
    tasks, clips = lessons()
    model = several("motion")
    model.requires_grad_(True)
    synthetic_loss(model, tasks, clips, generator=torch.Generator().manual_seed(0))[0].backward()
    for head in every_head(model):
        assert head["read"].weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_trained_heads_are_one_checkpoint_that_moved_and_disagrees(root: Path, name: str) -> None:
    folder = root / "rewards" / name
    assert [p.name for p in folder.rglob("*.safetensors")] == ["model.safetensors"]
    described = json.loads((folder / "reward.json").read_text())
    assert described["heads"] == 3
    model = load_reward(folder)
    assert isinstance(model, RewardModule)
    assert model.num_heads == 3
    found = score(model, batch())
    assert found.std is not None and (found.std > 1e-4).all()
    assert (model.head_std != 1).all()
    assert (model.low < model.mean).all() and (model.mean < model.high).all()
    assert model.mean.abs().max() < 1.5  # of z-scores
    again = load_reward(model.save(root / "again" / name))
    for one, other in zip(_both(found), _both(score(again, batch())), strict=True):
        assert torch.equal(one, other)
    assert "3 heads" in (folder / "README.md").read_text()


def _both(scores: RewardScores) -> tuple[Tensor, Tensor]:
    assert scores.std is not None
    return scores.values, scores.std


def test_pessimism_takes_the_disagreement_of_heads_off(root: Path) -> None:
    asked = {"fps": 8.0, "prompts": CAPTIONS[:2]}
    weights = dict.fromkeys(DIMENSIONS, 1.0)
    plain = load_composite(root / "rewards", weights).score(batch(), **asked)
    careful = load_composite(root / "rewards", weights, pessimism=1.5).score(batch(), **asked)
    models = load_composite(root / "rewards", weights).models
    mean, std = (torch.cat([getattr(m, key) for m in models]) for key in ("mean", "std"))
    expected = soft_cap((plain.values - 1.5 * plain.std - mean) / std, 2.0)
    torch.testing.assert_close(careful.z, expected)


def test_training_again_goes_on_with_the_heads_there_are(root: Path, tmp_path: Path) -> None:
    config = RewardTrainConfig(
        models=("aesthetic",), ensemble={"kind": "heads", "size": 2}, epochs=0.1, head_lr=1e-9
    )
    out = train_rewards(config, root / "data", root / "rewards", tmp_path, splits=None)
    before, after = (load_reward(f / "aesthetic") for f in (root / "rewards", out))
    assert after.num_heads == 2
    one, other = (m.other_heads[0].head[2].weight for m in (before, after))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_heads_with_deltas_and_recomputation_are_one_checkpoint_too(
    root: Path, tmp_path: Path
) -> None:
    out = train(
        root,
        tmp_path,
        models=("foundational",),
        epochs=0.4,
        lora={"rank": 2, "alpha": 4},
        gradient_checkpointing=True,
        ensemble={"kind": "heads", "size": 2},
        loss={"kind": "best_worst", "ties": "learned"},
    )
    model = load_reward(out / "foundational")
    assert model.num_heads == 2
    assert model.lora is not None
    assert score(model, batch()).valid.all()


def test_scoring_and_evaluation_on_the_command_line_see_the_heads(
    root: Path, tmp_path: Path
) -> None:
    runner, rewards = CliRunner(), str(root / "rewards")
    words = ["eval", rewards, "--preferences", str(root / "data"), "--split", "all"]
    answer = runner.invoke(app, [*words, "--out", str(tmp_path / "eval")])
    assert answer.exit_code == 0, answer.output
    report = json.loads((tmp_path / "eval" / "evaluation.json").read_text())["dimensions"]
    for name in DIMENSIONS:
        doubt = report[name]["details"]["disagreement"]
        assert doubt["mean"] > 0
        assert doubt["agreed"]["n"] + doubt["disputed"]["n"] == report[name]["n"]
    assert "disagree" in (tmp_path / "eval" / "report.html").read_text()
    clip = str(next((root / "data" / "media").glob("*.mp4")))
    words = ["score", rewards, clip, "--prompt", CAPTIONS[0], "--pessimism", "1"]
    answer = runner.invoke(app, [*words, "--out", str(tmp_path / "scores.jsonl")])
    assert answer.exit_code == 0, answer.output
    row = json.loads((tmp_path / "scores.jsonl").read_text().splitlines()[0])
    assert all(row["dimensions"][name]["std"] > 0 for name in DIMENSIONS)


def test_the_setting_is_a_number_of_seeds_or_a_kind_and_a_size() -> None:
    assert RewardTrainConfig(ensemble=3).ensemble == EnsembleConfig(kind="seeds", size=3)  # type: ignore[arg-type]
    both = [EnsembleConfig(kind=kind, size=4) for kind in ("seeds", "heads")]
    assert [(e.models, e.heads) for e in both] == [(4, 1), (1, 4)]
    own = RewardTrainConfig(own={"motion": {"ensemble": {"kind": "heads", "size": 2}}})
    assert (own.of("motion").ensemble.heads, own.of("aesthetic").ensemble.heads) == (2, 1)
    with pytest.raises(ValueError, match="kind"):
        RewardTrainConfig(ensemble={"kind": "backbones", "size": 2})  # type: ignore[arg-type]


def test_a_generative_reward_has_no_head_to_have_several_of() -> None:
    settings = FOUNDATIONAL.model_dump(exclude={"dimensions", "reads"})
    model = GenerativeReward(
        GenerativeConfig(**settings, asks="single"), tiny_models()["motion"].tokenizer
    )
    with pytest.raises(UserError, match=r"no head to have several of.*ensemble\.kind seeds"):
        fit(model, [], {}, RewardTrainConfig(ensemble=EnsembleConfig(kind="heads", size=2)), label="f")  # fmt: skip


def test_a_config_of_the_model_knows_nothing_of_heads() -> None:
    """They belong to training and to the checkpoint: pre-trained backbones stay what they are."""
    assert "heads" not in type(MOTION).model_fields

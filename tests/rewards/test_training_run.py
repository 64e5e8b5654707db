"""A training from start to finish: interrupted, stopped early, spread over processes, as an ensemble; what it leaves behind."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_rewards import CAPTIONS, smooth_clip, tiny_models, write_tiny_preferences
from torch import Tensor
from zero_worker import launch

from reelhf.errors import UserError
from rewards import load_composite, load_reward
from rewards.ensemble import EnsembleReward
from rewards.train import train_rewards
from rewards.training import trainer
from rewards.training.config import RewardTrainConfig

BRIGHTNESS = [random.Random(i).random() for i in range(400)]
MODELS = ("motion", "aesthetic")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny untrained rewards and verdicts on brightness."""
    folder = tmp_path_factory.mktemp("run")
    for name, model in tiny_models().items():
        model.save(folder / "backbones" / name)
    write_tiny_preferences(
        folder / "data",
        quality=BRIGHTNESS.__getitem__,
        make=lambda i: 0.4 * smooth_clip(i, 4, 32) + 0.6 * BRIGHTNESS[i],
        num_tasks=24,
        clips_per_task=3,
        dimensions=(
            "prompt_following",
            "structural_stability",
            "motion_quality",
            "aesthetic_quality",
        ),
    )
    return folder


def run(root: Path, out: Path, **options: Any) -> Path:
    options = {"models": ("aesthetic",), "epochs": 1, **options}
    return train_rewards(
        RewardTrainConfig(**options), root / "data", root / "backbones", out, splits=None
    )


def weights(out: Path, name: str = "aesthetic") -> dict[str, Tensor]:
    return load_file(out / name / "model.safetensors")


def rows(out: Path, key: str) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    own, calls = trainer.preference_loss, [0]

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return own(*arguments, **options)

    monkeypatch.setattr(trainer, "preference_loss", interrupted)


@pytest.mark.parametrize("call", [6, 8], ids=["within_an_epoch", "after_an_epoch"])
def test_an_interrupted_training_goes_on_bit_for_bit(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    options = {"epochs": 2, "checkpoint_every": 2 if call == 6 else 6, "synthetic": 0.1}
    whole = run(root, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        interrupt_at(patch, call)
        with pytest.raises(KeyboardInterrupt):
            run(root, tmp_path / "torn", **options)
    left = tmp_path / "torn" / "checkpoints" / "aesthetic_0"
    assert list(left.glob("checkpoint-*"))
    again = run(root, tmp_path / "torn", **options)
    first, second = weights(whole), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert rows(whole, "aesthetic/loss") == rows(again, "aesthetic/loss")
    assert not left.exists()  # nothing to go on from any more


def test_checkpoints_of_another_training_are_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run(root, tmp_path, checkpoint_every=2)
    with pytest.raises(UserError, match="checkpoints of a training with other settings"):
        run(root, tmp_path, checkpoint_every=2, head_lr=0.5)
    newest = max((tmp_path / "checkpoints" / "aesthetic_0").glob("checkpoint-*"))
    (newest / "trainer_state.json").unlink()  # torn while it was written: not gone on from
    run(root, tmp_path, checkpoint_every=2)


def test_training_stops_when_held_out_prompts_learn_no_more_and_keeps_the_best(
    root: Path, tmp_path: Path
) -> None:
    options = {"evaluate_every": 1, "patience": 2, "epochs": 6, "tasks_per_batch": 8}
    out = run(root, tmp_path, **options, head_lr=0.3, backbone_lr=0.3)
    held = rows(out, "aesthetic/eval_loss")
    steps = len(rows(out, "aesthetic/loss"))
    best = held.index(min(held))
    assert len(held) == best + 1 + 2  # two looks without a better one
    assert steps == len(held) < 6 * 3
    card = json.loads((out / "aesthetic" / "reward.json").read_text())["training"]
    kept = rows(out, "aesthetic/eval_accuracy")[best]
    assert card["held_out"]["aesthetic_quality"]["accuracy"] == pytest.approx(kept)


def test_bfloat16_recomputation_and_accumulation_leave_float32_weights_that_moved(
    root: Path, tmp_path: Path
) -> None:
    options = {"bf16": True, "gradient_checkpointing": True, "accumulation_steps": 2}
    out = run(root, tmp_path, **options, models=MODELS)
    for name in MODELS:
        before, after = weights(root / "backbones", name), weights(out, name)
        assert all(tensor.dtype == before[key].dtype for key, tensor in after.items())
        assert any(not torch.equal(before[key], after[key]) for key in after)
        assert all(tensor.isfinite().all() for key, tensor in after.items())


def test_recomputation_is_the_same_training(root: Path, tmp_path: Path) -> None:
    plain = weights(run(root, tmp_path / "plain"))
    again = weights(run(root, tmp_path / "again", gradient_checkpointing=True))
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def ensemble(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(root, tmp_path_factory.mktemp("ensemble"), ensemble=3, models=MODELS)


def score(model: Any, frames: Tensor) -> Any:
    options = {"selection": model.select(frames.shape[2], 8.0), "fps": 8.0}
    return model.score(frames, prompts=CAPTIONS[: len(frames)], **options)


def test_members_differ_by_their_seed_and_their_disagreement_is_the_std(ensemble: Path) -> None:
    model = load_reward(ensemble / "motion")
    assert isinstance(model, EnsembleReward)
    frames = torch.stack([smooth_clip(i, 4) for i in range(2)])
    scores = score(model, frames)
    z = torch.stack([(score(m, frames).values - m.mean) / m.std for m in model.members])
    assert z.std(dim=0).min() > 1e-4
    torch.testing.assert_close(scores.values, z.mean(0))
    torch.testing.assert_close(scores.std, z.std(dim=0), atol=1e-4, rtol=1e-3)
    assert (model.low < model.mean).all() and (model.mean < model.high).all()
    frames[0] = float("nan")
    assert score(model, frames).valid.tolist() == [False, True]


def test_one_member_is_the_training_without_an_ensemble(
    root: Path, ensemble: Path, tmp_path: Path
) -> None:
    for index in (0, 2):
        alone = weights(run(root, tmp_path / str(index), seed=index))
        member = load_file(ensemble / "aesthetic" / f"member_{index}" / "model.safetensors")
        assert all(torch.equal(alone[name], member[name]) for name in alone)


def test_an_ensemble_is_a_composites_model_and_the_start_of_another(
    root: Path, ensemble: Path, tmp_path: Path
) -> None:
    composite = load_composite(ensemble, {"aesthetic_quality": 1.0})
    frames = torch.stack([smooth_clip(i, 4) for i in range(2)])
    assert composite.score(frames, fps=8.0, prompts=CAPTIONS[:2]).total.isfinite().all()
    config = RewardTrainConfig(models=("aesthetic",), ensemble=2, epochs=0.2)
    out = train_rewards(config, root / "data", ensemble, tmp_path, splits=None)
    assert len(load_reward(out / "aesthetic").members) == 2


def test_a_checkpoint_says_what_it_is_in_words(root: Path, tmp_path: Path) -> None:
    out = run(root, tmp_path)
    described = json.loads((out / "aesthetic" / "reward.json").read_text())
    assert described["training"]["verdicts"] > 0
    assert described["preprocessing"]["area"] == 32 * 32
    card = (out / "aesthetic" / "README.md").read_text()
    score = described["training"]["held_out"]["aesthetic_quality"]
    assert f"{score['accuracy']:.2f} of {score['verdicts']} verdicts" in card
    for word in ("aesthetic_quality", described["data_hash"], "no fixed zero", "area 1024"):
        assert word in card


def test_a_dimension_nobody_knows_is_named(root: Path, tmp_path: Path) -> None:
    from annotation.records import read_preferences, write_preferences

    data = read_preferences(root / "data")
    write_preferences(
        tmp_path / "data",
        clips=data.clips,
        judgments=data.judgments,
        preferences=[row | {"dimension": "asthetic_quality"} for row in data.preferences],
        guideline_version="test",
        source_query="test",
    )
    with pytest.raises(UserError, match=r"'asthetic_quality'.*Did you mean 'aesthetic_quality'\?"):
        train_rewards(RewardTrainConfig(), tmp_path / "data", root / "backbones", tmp_path / "out")


# Several processes


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_processes_with_zero_are_one_without(root: Path, tmp_path: Path, stage: int) -> None:
    """The motion reward looks at every frame, so that nothing is drawn per process."""
    alone = run(root, tmp_path / "one", models=("motion",), shift=0, tasks_per_batch=4)
    words = ["models=[motion]", "epochs=1", "shift=0", "tasks_per_batch=2", f"zero_stage={stage}"]
    launch(root, tmp_path / "two", 2, *words)
    one, two = weights(alone, "motion"), weights(tmp_path / "two", "motion")
    start = weights(root / "backbones", "motion")
    moved = max((one[name] - start[name]).abs().max() for name in one if "weight" in name)
    for name in one:
        if name not in ("mean", "std", "low", "high", "temperature"):
            gap = (two[name] - one[name]).abs().max()
            assert gap < 0.05 * moved, (name, gap, moved)
    values = [
        score(load_reward(out / "motion"), smooth_clip(3, 4)[None]).values
        for out in (alone, tmp_path / "two")
    ]
    torch.testing.assert_close(*values, atol=5e-3, rtol=5e-2)


@pytest.mark.slow
def test_every_model_trains_under_zero_3_in_bfloat16(root: Path, tmp_path: Path) -> None:
    words = ["epochs=0.2", "zero_stage=3", "bf16=true", "gradient_checkpointing=true"]
    launch(root, tmp_path / "out", 2, *words)
    for name in ("foundational", *MODELS):
        assert score(load_reward(tmp_path / "out" / name), smooth_clip(0, 4)[None]).valid.all()


def test_several_processes_without_zero_are_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewards.training.fit.world_size", lambda: 2)
    with pytest.raises(UserError, match="2 processes were launched and zero_stage is unset"):
        run(root, tmp_path)

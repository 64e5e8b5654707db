from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_rewards import CAPTIONS, smooth_clip, tiny_models
from torch import Tensor

from reelhf.errors import UserError
from reelhf.run import seal
from rewards import load_reward
from rewards.module import RewardModule

NAMES = ("foundational", "motion", "aesthetic")


@pytest.fixture(scope="module")
def models() -> dict[str, RewardModule]:
    return tiny_models()


def clips(count: int = 2, num_frames: int = 5, size: int = 40) -> Tensor:
    return torch.stack([smooth_clip(i, num_frames, size) for i in range(count)])


def score(model: RewardModule, frames: Tensor, prompts: list[str] | None = None) -> Tensor:
    selection = model.select(frames.shape[2], 8.0)
    prompts = prompts or CAPTIONS[: len(frames)]
    return model.score(frames, selection=selection, fps=8.0, prompts=prompts).values


@pytest.mark.parametrize("name", NAMES)
def test_encoded_prompts_score_like_their_strings(
    models: dict[str, RewardModule], name: str
) -> None:
    model, frames = models[name], clips()
    encoded = model.encode_prompts(CAPTIONS[:2])
    values = model.score(frames, selection=model.select(5, 8.0), fps=8.0, prompts=encoded).values
    torch.testing.assert_close(values, score(model, frames))


def test_the_frame_rate_reaches_the_foundational_reward(models: dict[str, RewardModule]) -> None:
    model, frames = models["foundational"], clips(1)
    selection = model.select(5, 8.0)
    slow, fast = (
        model.score(frames, selection=selection, fps=fps, prompts=CAPTIONS[:1]).values
        for fps in (2.0, 24.0)
    )
    assert (slow - fast).abs().max() > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_with_a_broken_pixel_is_invalid_and_harms_no_other(
    models: dict[str, RewardModule], name: str
) -> None:
    model, frames = models[name], clips()
    expected = score(model, frames)[1]
    frames[0] = float("nan")
    frames.requires_grad_()
    scores = model.score(frames, selection=model.select(5, 8.0), fps=8.0, prompts=CAPTIONS[:2])
    assert scores.valid.tolist() == [False, True]
    assert scores.values[0].isnan().all()
    torch.testing.assert_close(scores.values[1], expected, atol=2e-5, rtol=1e-4)
    scores.values[1].sum().backward()
    assert frames.grad is not None
    assert frames.grad.isfinite().all()
    assert (frames.grad[0] == 0).all()


@pytest.mark.parametrize("size", [24, 64])
@pytest.mark.parametrize("name", NAMES)
def test_any_frame_size_and_a_single_frame_are_scored(
    models: dict[str, RewardModule], name: str, size: int
) -> None:
    assert score(models[name], clips(1, num_frames=1, size=size)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_loads_frozen_equal_and_in_train_mode(
    models: dict[str, RewardModule], name: str, tmp_path: Path
) -> None:
    model = models[name]
    model.mean.fill_(0.3)
    loaded = load_reward(model.save(tmp_path / name))
    assert loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any(m.p for m in loaded.modules() if isinstance(m, torch.nn.Dropout))
    torch.testing.assert_close(loaded.mean, model.mean)
    torch.testing.assert_close(score(loaded, clips()), score(model, clips()), atol=0, rtol=0)


def test_a_checkpoint_of_another_schema_is_refused(
    models: dict[str, RewardModule], tmp_path: Path
) -> None:
    folder = models["aesthetic"].save(tmp_path / "aesthetic")
    described = json.loads((folder / "reward.json").read_text())
    (folder / "reward.json").write_text(json.dumps(described | {"schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99"):
        load_reward(folder)


def test_a_checkpoint_cut_short_is_refused(models: dict[str, RewardModule], tmp_path: Path) -> None:
    folder = models["motion"].save(tmp_path / "motion")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_reward(folder)


def test_weights_of_another_version_of_a_model_are_refused(
    models: dict[str, RewardModule], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = models["motion"].save(tmp_path / "motion")
    weights = load_file(folder / "model.safetensors")
    del weights["read.weight"]
    save_file(weights, folder / "model.safetensors")
    seal(folder)
    with pytest.raises(UserError, match=r"do not fit a vjepa2_motion reward.*read\.weight"):
        load_reward(folder)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward\.json"):
        load_reward(tmp_path)
    with pytest.raises(UserError, match="no reward checkpoint"):
        load_reward(tmp_path / "missing")


def test_gradient_checkpointing_recomputes_in_a_loaded_reward(
    models: dict[str, RewardModule], tmp_path: Path
) -> None:
    model = load_reward(models["motion"].save(tmp_path / "motion"))
    plain = clips().requires_grad_()
    score(model, plain).sum().backward()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.backbone.encoder.layer[0].mlp.register_forward_pre_hook(count)
    model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    frames = clips().requires_grad_()
    score(model, frames).sum().backward()
    assert calls == 2
    torch.testing.assert_close(frames.grad, plain.grad)


def test_keyframes_are_stratified_distinct_and_the_middles_without_a_generator() -> None:
    from rewards.preprocess import stratified_frames

    assert stratified_frames(9, 3).tolist() == [1, 4, 7]
    assert stratified_frames(2, 3).tolist() == [0, 1]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        indices = stratified_frames(9, 4, generator).tolist()
        assert indices == sorted(set(indices))
        assert len(indices) == 4

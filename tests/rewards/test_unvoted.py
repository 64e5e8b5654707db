"""Lessons without votes: synthetic negatives, the texture reward, sub-scores where labels exist, keyframes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_rewards import AESTHETIC, CAPTIONS, MOTION, smooth_clip, tiny_models
from torch import Tensor

from reelhf.errors import UserError
from reelhf.video import write_video
from rewards import load_composite, load_reward, train
from rewards.aesthetic import mean_with_softmin
from rewards.data import Clip, RewardTask, Vote
from rewards.degrade import UNVOTED, degrade
from rewards.motion import MotionConfig, MotionReward
from rewards.texture import (
    TextureConfig,
    sharpest,
    split_clips,
    texture_pair,
    train_texture,
)
from rewards.training.config import RewardTrainConfig
from rewards.training.synthetic import synthetic_loss


@pytest.mark.parametrize("dimension", list(UNVOTED))
def test_every_spoiling_begins_at_nothing_and_changes_the_clip(dimension: str) -> None:
    frames = torch.stack([smooth_clip(i, 7, 32) for i in range(2)])
    for name, function in UNVOTED[dimension].items():
        draws = torch.Generator().manual_seed(1)
        same = function(frames, torch.zeros(2), draws)
        torch.testing.assert_close(same, frames, atol=1e-5, rtol=0, msg=name)
        worse = function(frames, torch.ones(2), draws)
        assert (worse - frames).flatten(1).abs().amax(1).min() > 0.01, name
        assert worse.min() >= 0
        assert worse.max() <= 1


def test_stutter_holds_frames_and_reverse_turns_time_round() -> None:
    frames = torch.arange(9.0).view(1, 1, 9, 1, 1).expand(1, 3, 9, 2, 2) / 10
    draws = torch.Generator()
    held = UNVOTED["motion_quality"]["stutter"](frames, torch.tensor([1.0]), draws)
    assert (held[0, 0, :, 0, 0] * 10).round().tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 8]
    turned = UNVOTED["motion_quality"]["reverse"](frames, torch.tensor([1.0]), draws)
    torch.testing.assert_close(turned, frames.flip(2))
    half = UNVOTED["motion_quality"]["reverse"](frames, torch.tensor([0.5]), draws)
    assert (half[0, 0, :, 0, 0] * 10).round().tolist() == [0, 1, 2, 3, 8, 7, 6, 5, 4]


def moving_tasks() -> tuple[list[RewardTask], dict[str, Clip]]:
    """Clips of a square that glides; verdicts that say nothing."""
    tasks, clips = [], {}
    for i in range(16):
        names = (f"{i}a", f"{i}b")
        for name, speed in zip(names, (1 + i % 3, 2), strict=True):
            frames = torch.zeros(3, 8, 32, 32)
            for t in range(8):
                frames[:, t, 8:20, speed * t : speed * t + 10] = 0.8
            clips[name] = Clip((frames * 255).byte(), 8.0)
        tie = (Vote(0, 1, "motion_quality", 0, 1.0, True, True),)
        tasks.append(RewardTask(f"t{i}", CAPTIONS[i % 8], "p", "train", names, tie))
    return tasks, clips


@pytest.mark.slow
def test_clips_learn_to_beat_themselves_spoiled() -> None:
    tasks, clips = moving_tasks()
    torch.manual_seed(0)
    model = MotionReward(MOTION, tiny_models()["motion"].tokenizer)
    config = RewardTrainConfig(
        synthetic=1.0, epochs=20, tasks_per_batch=8, head_lr=3e-3, backbone_lr=1e-3, shift=0
    )
    model, metrics = train.fit(model, tasks, clips, config, label="motion")
    right = [row["synthetic_accuracy"] for row in metrics]
    assert sum(right[-8:]) / 8 > 0.8
    assert sum(right[-8:]) > sum(right[:8])


def test_lessons_without_votes_stand_beside_the_verdicts_or_are_off() -> None:
    tasks, clips = moving_tasks()
    for synthetic in (0.0, 0.5):
        model = MotionReward(MOTION, tiny_models()["motion"].tokenizer)
        config = RewardTrainConfig(synthetic=synthetic, epochs=1)
        _, (row,) = train.fit(model, tasks[:4], clips, config, label="motion")
        assert ("synthetic_accuracy" in row) == (synthetic > 0)


def test_an_invalid_clip_teaches_nothing() -> None:
    model = tiny_models()["motion"].requires_grad_(True)
    clips = {"a": Clip(torch.full((3, 4, 32, 32), float("nan")), 8.0)}
    task = RewardTask("t", CAPTIONS[0], "p", "train", ("a",), ())
    loss, right = synthetic_loss(model, [task], clips, generator=torch.Generator().manual_seed(0))
    loss.backward()
    assert (loss.item(), right) == (0, 0)


def test_sub_scores_learn_where_a_verdict_names_them() -> None:
    torch.manual_seed(0)
    config = MOTION.model_copy(update={"dimensions": ("motion_quality", "motion_amplitude")})
    model = MotionReward(config, tiny_models()["motion"].tokenizer)
    tasks, clips = moving_tasks()
    named = [
        RewardTask(
            t.task_id,
            t.prompt,
            "p",
            "train",
            t.clips,
            (Vote(0, 1, "motion_amplitude", 1, 1.0, True, True),),
        )
        for t in tasks
    ]
    before = model.read.weight.detach().clone()
    model, metrics = train.fit(model, named, clips, RewardTrainConfig(epochs=1), label="motion")
    assert metrics[0]["votes"] == 4
    moved = (model.read.weight.detach() - before).abs().amax(1)
    decayed = before[0].abs().max() * 0.01  # by the optimizer's weight decay alone
    assert moved[1] > 5 * moved[0]
    assert moved[0] < decayed
    with pytest.raises(ValueError, match="motion_quality first"):
        MotionConfig(dimensions=("motion_amplitude",))


# The texture reward


def striped(seed: int) -> Tensor:
    """A picture full of fine detail, [3, 1, 48, 48]."""
    draws = torch.Generator().manual_seed(seed)
    fine = torch.rand(1, 3, 24, 24, generator=draws)
    return torch.nn.functional.interpolate(fine, size=(48, 48), mode="nearest")[0][:, None]


@pytest.fixture(scope="module")
def texture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texture")
    (folder / "clips").mkdir()
    rows = []
    for i in range(32):
        write_video(folder / "clips" / f"{i}.mp4", striped(i).expand(3, 1, 48, 48), 1.0, crf=4)
        rows.append(json.dumps({"path": f"{i}.mp4", "caption": CAPTIONS[i % 8]}))
    (folder / "clips" / "captions.jsonl").write_text("\n".join(rows))
    config = TextureConfig(
        model=AESTHETIC.model_copy(
            update={"dimensions": ("texture_quality",), "area": 32 * 32, "patch_size": 8}
        ),
        num_steps=120,
        batch_size=8,
        size=48,
        crop=32,
        sharpest=1.0,
    )
    train_texture(config, folder / "clips", folder / "rewards")
    return folder


def test_the_texture_reward_tells_originals_from_copies_it_never_saw(texture: Path) -> None:
    rows = [json.loads(line) for line in (texture / "rewards" / "metrics.jsonl").open()]
    assert rows[-1]["held_out/accuracy"] > 0.8
    assert {name for name in rows[-1] if name.startswith("held_out/")} == {
        *(f"held_out/{name}" for name in UNVOTED["texture_quality"]),
        "held_out/accuracy",
    }
    model = load_reward(texture / "rewards" / "texture")
    assert model.dimensions == ("texture_quality",)
    assert model.low < model.mean < model.high
    composite = load_composite(texture / "rewards", {"texture_quality": 1.0})
    assert composite.dimensions == ("texture_quality",)


def test_texture_needs_a_clip_to_measure_on(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", striped(0).expand(3, 2, 48, 48), 2.0)
    (tmp_path / "captions.jsonl").write_text(json.dumps({"path": "a.mp4", "caption": "one"}))
    with pytest.raises(UserError, match="expected two at least"):
        train_texture(TextureConfig(size=48, crop=48), tmp_path, tmp_path / "out")


def test_windows_of_one_clip_stay_on_one_side() -> None:
    entries = [0, 0, 1, 1, 2, 3, 3, 4]
    learned, held = split_clips(entries, 0.4, seed=0)
    assert sorted(learned + held) == list(range(8))
    assert not {entries[i] for i in learned} & {entries[i] for i in held}


def test_the_sharpest_frames_are_kept_and_the_worse_copy_is_degraded_further() -> None:
    fine, flat = striped(0), torch.full((3, 1, 48, 48), 0.5)
    kept = sharpest((torch.stack([flat, fine, flat]) * 255).byte(), 0.34)
    torch.testing.assert_close(kept[0], (fine * 255).byte())
    frames = torch.stack([striped(i) for i in range(32)])
    better, worse, gap = texture_pair(frames, 32, torch.Generator().manual_seed(0))
    assert better.shape == (32, 3, 1, 32, 32)
    assert (gap > 0).all()
    further = (worse - better).abs().flatten(1).mean(1)
    assert (further > 1e-3).float().mean() > 0.9


# Keyframes


def test_the_softmin_weighs_frames_by_a_softmax_and_nothing_flows_through_the_weights() -> None:
    scores = torch.randn(2, 5, dtype=torch.double, requires_grad=True)
    mean_with_softmin(scores, share=0.3, temperature=0.5).sum().backward()
    weights = 0.7 / 5 + 0.3 * torch.softmax(-scores.detach() / 0.5, dim=1)
    torch.testing.assert_close(scores.grad, weights)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, dtype=torch.double))


def test_keyframes_come_from_the_callers_generator_and_nothing_else() -> None:
    model = tiny_models()["aesthetic"]

    def draw(seed: int) -> list[list[int]]:
        draws = torch.Generator().manual_seed(seed)
        return [model.select(30, 8.0, draws).indices.tolist() for _ in range(4)]

    torch.manual_seed(1)
    first = draw(0)
    torch.manual_seed(2)  # the global generator has no say: a resumed run draws the same
    assert draw(0) == first
    assert draw(1) != first
    assert len({tuple(d) for d in first}) > 1
    assert all(10 * k <= index < 10 * (k + 1) for d in first for k, index in enumerate(d))


def test_the_score_depends_on_the_selected_frames_alone() -> None:
    model, frames = tiny_models()["aesthetic"], smooth_clip(0, 9)[None]
    selection = model.select(9, 8.0, torch.Generator().manual_seed(3))
    options = {"selection": selection, "fps": 8.0, "prompts": CAPTIONS[:1]}
    expected = model.score(frames, **options).values
    filled = torch.full_like(frames, float("nan"))  # what was never decoded
    filled[:, :, selection.indices] = frames[:, :, selection.indices]
    torch.testing.assert_close(model.score(filled, **options).values, expected, rtol=0, atol=0)


def test_degrading_by_default_draws_as_it_did() -> None:
    frames = smooth_clip(0)[None].expand(8, -1, -1, -1, -1)
    plain = degrade(frames, "motion_quality", torch.ones(8), torch.Generator().manual_seed(0))
    other = degrade(
        frames, "motion_quality", torch.ones(8), torch.Generator().manual_seed(0), ways=UNVOTED
    )
    assert not torch.equal(plain, other)

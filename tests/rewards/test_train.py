from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_rewards import (
    CAPTIONS,
    smooth_clip,
    tiny_models,
    tiny_pretrain_config,
    write_tiny_preferences,
)
from torch import Tensor

from annotation.records import read_preferences
from reelhf.errors import UserError
from rewards import load_reward, train
from rewards.calibration import fit_temperature, spread
from rewards.data import Clip, RewardTask, Vote, group_by_shape, load_tasks
from rewards.degrade import DEGRADATIONS, degrade
from rewards.evaluation.held_out import evaluate_rewards, format_report
from rewards.evaluation.slots import chi_square_uniform, slot_test
from rewards.motion import MotionReward
from rewards.pretrain import PRETRAIN, build_models, pretrain_backbones
from rewards.pretraining.motion import MOST_OCTAVES, WRONG_MOTION, WRONG_SPEED, worse_motion
from rewards.pretraining.pairs import swapped_captions
from rewards.train import train_rewards
from rewards.training.augment import shift_clips
from rewards.training.config import RewardTrainConfig
from rewards.training.loss import preference_loss, tie_widths

BRIGHTNESS = [random.Random(i).random() for i in range(400)]


def brighter_is_better(i: int) -> Tensor:
    size = 32 if i % 2 else 48  # two stages, two sizes in one task
    return 0.4 * smooth_clip(i, 5, size) + 0.6 * BRIGHTNESS[i]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from reelhf.video import write_video

    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for i, text in enumerate(CAPTIONS):
        write_video(folder / f"{i}.mp4", smooth_clip(i), 8.0)
        rows.append(json.dumps({"path": f"{i}.mp4", "caption": text}))
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return pretrain_backbones(tiny_pretrain_config(), folder, folder / "backbones")


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_preferences(
        tmp_path_factory.mktemp("preferences") / "data",
        quality=BRIGHTNESS.__getitem__,
        make=brighter_is_better,
        num_tasks=40,
        clips_per_task=lambda task: 3 + task % 2,
    )


@pytest.fixture(scope="module")
def two_dimensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_preferences(
        tmp_path_factory.mktemp("two_dimensions") / "data",
        quality=BRIGHTNESS.__getitem__,
        make=brighter_is_better,
        num_tasks=20,
        dimensions=("motion_quality", "aesthetic_quality"),
    )


def test_training_learns_a_visible_quality_on_prompts_it_never_saw(
    backbones: Path, preferences: Path, tmp_path: Path
) -> None:
    config = RewardTrainConfig(models=("aesthetic",), epochs=5.0, head_lr=3e-3, backbone_lr=1e-3)
    out = train_rewards(config, preferences, backbones, tmp_path / "rewards")
    result = evaluate_rewards(
        out, preferences, tmp_path / "eval", ceiling={"aesthetic_quality": 1.0}
    )
    row = result["dimensions"]["aesthetic_quality"]
    assert row["n"] >= 4
    assert row["accuracy"] > 0.8
    assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
    assert row["stage_identity"] == 0.5  # within a stage its name says nothing
    assert row["ceiling"] == 1.0
    assert (
        json.loads((tmp_path / "eval" / "evaluation.json").read_text())["tasks"] == result["tasks"]
    )
    assert "aesthetic_quality" in format_report(result)
    model = load_reward(out / "aesthetic")
    assert model.std.item() > 0.01
    assert model.low.item() < model.mean.item() < model.high.item()
    assert model.data_hash


def test_a_finished_pre_training_is_kept(backbones: Path) -> None:
    before = (backbones / "motion" / "model.safetensors").stat().st_mtime_ns
    pretrain_backbones(tiny_pretrain_config(), backbones.parent, backbones)
    assert (backbones / "motion" / "model.safetensors").stat().st_mtime_ns == before


def test_only_the_backbone_that_is_missing_is_pre_trained(backbones: Path) -> None:
    files = {name: backbones / name / "model.safetensors" for name in PRETRAIN}
    before = {name: (file.stat().st_mtime_ns, file.read_bytes()) for name, file in files.items()}
    (backbones / "aesthetic.sha256").unlink()  # as if it had been killed in it
    pretrain_backbones(tiny_pretrain_config(), backbones.parent, backbones)
    redone = [n for n, file in files.items() if file.stat().st_mtime_ns != before[n][0]]
    assert redone == ["aesthetic"]
    assert files["aesthetic"].read_bytes() == before["aesthetic"][1]


def test_a_backbone_in_a_folder_is_used_with_its_own_tokenizer(tmp_path: Path) -> None:
    source = tiny_models()["foundational"]
    source.backbone.save_pretrained(tmp_path)
    source.tokenizer.save_pretrained(tmp_path)
    config = tiny_pretrain_config()
    named = config.foundational.model_copy(update={"backbone": str(tmp_path)})
    model = build_models(config.model_copy(update={"foundational": named}), CAPTIONS)[
        "foundational"
    ]
    torch.testing.assert_close(
        model.backbone.get_input_embeddings().weight, source.backbone.get_input_embeddings().weight
    )
    assert model.encode_prompts(CAPTIONS) == source.encode_prompts(CAPTIONS)
    values = model.score(
        smooth_clip(0)[None], selection=model.select(5, 8.0), fps=8.0, prompts=CAPTIONS[:1]
    ).values
    assert values.isfinite().all()


def test_annotators_and_prompts_choose_the_rows(preferences: Path) -> None:
    everything = load_tasks(preferences)
    assert len(load_tasks(preferences, annotators=["a0"])) == len(everything) // 2
    assert len(load_tasks(preferences, prompt_ids=[everything[0].prompt_id])) == 1
    assert {len(task.clips) for task in everything} == {3, 4}
    splits = [{t.prompt_id for t in load_tasks(preferences, splits=[s])} for s in ("train", "test")]
    assert not splits[0] & splits[1]


def test_training_without_a_row_says_so(backbones: Path, preferences: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training rows for motion_quality"):
        train_rewards(RewardTrainConfig(models=("motion",)), preferences, backbones, tmp_path)


def test_another_preference_schema_is_refused(preferences: Path, tmp_path: Path) -> None:
    manifest = json.loads((preferences / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99"):
        train_rewards(RewardTrainConfig(), tmp_path, tmp_path, tmp_path / "out")


def task_of(votes: list[Vote]) -> RewardTask:
    return RewardTask("t", CAPTIONS[0], "p", "train", ("a", "b", "c"), tuple(votes))


def test_a_dimension_without_labels_and_an_invalid_clip_leave_the_loss_alone() -> None:
    model = tiny_models()["foundational"]
    clips = {name: Clip((smooth_clip(i) * 255).byte(), 8.0) for i, name in enumerate("abc")}
    vote = Vote(0, 1, "prompt_following", 1, 1.0, True, True)
    widths = torch.tensor([0.3, 0.3])
    expected, metrics = preference_loss(model, [task_of([vote])], clips, tie_width=widths)
    assert metrics["votes"] == 1
    broken = Clip(torch.full((3, 5, 32, 32), float("nan")), 8.0)
    other = Vote(0, 2, "structural_stability", 1, 1.0, True, True)
    loss, metrics = preference_loss(
        model, [task_of([vote, other])], clips | {"c": broken}, tie_width=widths
    )
    torch.testing.assert_close(loss, expected)
    assert metrics["votes"] == 1
    assert metrics["valid_fraction"] == pytest.approx(2 / 3)


def test_tie_widths_follow_the_share_of_ties() -> None:
    votes = [Vote(0, 1, "motion_quality", p, 1.0, True, True) for p in (0, 1, 1, -1)]
    (width,) = tie_widths(("motion_quality",), [task_of(votes)])
    assert torch.tanh(width / 2).item() == pytest.approx(0.25)


def test_clips_of_one_shape_share_a_batch() -> None:
    clips = [Clip((smooth_clip(i, 5, s) * 255).byte(), 8.0) for i, s in enumerate((32, 48, 32))]
    groups = group_by_shape(clips)
    assert [rows for rows, _, _ in groups] == [[0, 2], [1]]
    assert groups[0][1].shape == (2, 3, 5, 32, 32)


def test_shifting_moves_a_clip_as_a_whole() -> None:
    frames = torch.stack([smooth_clip(i, 3, 40) for i in range(3)])
    moved = shift_clips(frames, 0.1, torch.Generator().manual_seed(0))
    assert moved.shape == frames.shape
    assert not torch.equal(moved, frames)
    same = shift_clips(frames, 0.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(same, frames)


def test_drift_adds_one_velocity_to_everything():
    frames = torch.zeros(3, 3, 9, 64, 64)
    frames[..., 28:36, 28:36] = 1.0
    moved = DEGRADATIONS["motion_quality"]["drift"](
        frames, torch.tensor([0.0, 0.5, 1.0]), torch.Generator().manual_seed(0)
    )
    grid = torch.arange(64.0)
    mass = moved[:, 0].sum((2, 3))
    place = torch.stack(
        [(moved[:, 0].sum(axis) * grid).sum(-1) / mass for axis in (3, 2)], dim=-1
    )  # [B, F, 2]
    travelled = (place[:, -1] - place[:, 0]).norm(dim=-1)
    torch.testing.assert_close(
        travelled, torch.tensor([0.0, 0.5, 1.0]) * 0.35 * 64, atol=1.5, rtol=0
    )
    steps = place.diff(dim=1)
    assert (steps - steps.mean(1, keepdim=True)).abs().max() < 1.0  # whole pixels


@pytest.mark.parametrize("dimension", list(DEGRADATIONS))
def test_no_severity_changes_nothing_and_more_changes_more(dimension: str) -> None:
    frames = torch.stack([smooth_clip(i, 6, 32) for i in range(2)])
    for function in DEGRADATIONS[dimension].values():
        changes = []
        for severity in (0.0, 0.4, 1.0):
            draws = torch.Generator().manual_seed(3)
            out = function(frames, torch.full((2,), severity), draws)
            assert out.shape == frames.shape
            assert out.min() >= 0
            assert out.max() <= 1
            changes.append(float((out - frames).abs().mean()))
        assert changes[0] < 1e-5
        assert changes[0] < changes[1] <= changes[2] * 1.2
    mixed = degrade(frames, dimension, torch.tensor([0.0, 1.0]), torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed[0], frames[0], atol=1e-5, rtol=0)


def test_a_swapped_caption_is_never_the_right_one() -> None:
    prompts = [[1, 2, 3], [1, 2, 4], [1, 2, 3], [7]]
    draws = torch.Generator().manual_seed(0)
    for _ in range(20):
        wrong = swapped_captions(torch.arange(4), prompts, draws)
        assert all(w != prompts[i] for i, w in enumerate(wrong))


def test_spread_leaves_invalid_rows_out() -> None:
    values = torch.tensor([[1.0], [3.0], [float("nan")]])
    mean, std, low, high = spread(values)
    assert [mean.item(), std.item(), low.item(), high.item()] == [2.0, 1.0, 1.0, 3.0]


def test_the_temperature_of_calibrated_logits_is_one_and_scales_with_them() -> None:
    generator = torch.Generator().manual_seed(0)
    gaps = torch.randn(20000, generator=generator) * 2
    won = torch.rand(20000, generator=generator) < torch.sigmoid(gaps)
    signed = torch.where(won, gaps, -gaps)
    assert fit_temperature(signed) == pytest.approx(1.0, rel=0.13)
    assert fit_temperature(3 * signed) == pytest.approx(3.0, rel=0.13)
    assert fit_temperature(torch.empty(0)) == 1.0


def test_the_slot_test_gives_known_p_values() -> None:
    assert chi_square_uniform([10, 10, 10, 10])["p"] == pytest.approx(1.0)
    result = chi_square_uniform([20, 10, 5, 5])  # statistic 15, 3 degrees of freedom
    assert result["chi_square"] == pytest.approx(15.0)
    assert result["p"] == pytest.approx(0.001817, rel=1e-3)


def test_the_slots_of_an_export_are_counted(preferences: Path) -> None:
    slots = slot_test(read_preferences(preferences))
    assert {k: sum(row["counts"]) for k, row in slots.items()} == {"3": 20, "4": 20}
    assert all(row["p"] > 0.01 for row in slots.values())


def test_a_model_may_have_settings_of_its_own():
    config = RewardTrainConfig(epochs=2, own={"aesthetic": {"tasks_per_batch": 2}})
    assert config.of("aesthetic").tasks_per_batch == 2
    assert config.of("motion").tasks_per_batch == config.tasks_per_batch
    assert config.of("aesthetic").epochs == config.of("motion").epochs == 2
    with pytest.raises(ValueError, match="own names 'asthetic'; expected one of foundational"):
        RewardTrainConfig(own={"asthetic": {"epochs": 1}})
    with pytest.raises(ValueError, match="epochs"):
        RewardTrainConfig(own={"motion": {"epochs": 0}})


def test_worse_motion_is_two_sided_and_leaves_the_better_clip_alone():
    frames = torch.stack([smooth_clip(i, 9, 32) for i in range(256)])
    better, worse, margin, rate = worse_motion(frames, torch.Generator().manual_seed(0))
    assert better.shape == worse.shape == frames.shape
    hurried = rate != 1
    assert ((rate > 1).sum() - (rate < 1).sum()).abs() < 0.4 * hurried.sum()  # both ways alike
    torch.testing.assert_close(worse[hurried], frames[hurried])  # same pictures, other rate
    torch.testing.assert_close(margin[hurried], rate[hurried].log2().abs())
    other = (margin == 1) & ~hurried  # another motion altogether, beside the untouched clip
    torch.testing.assert_close(better[hurried | other], frames[hurried | other])
    assert ((worse - frames).flatten(1).abs().amax(1) > 0)[other].float().mean() > 0.9
    for found, share in ((hurried, WRONG_SPEED), (other, WRONG_MOTION)):
        assert abs(float(found.float().mean()) - share) < 0.08
    changed = (worse - better).flatten(1).abs().amax(1) > 0
    assert (changed | hurried | other | (margin < 0.15)).all()
    assert ((margin >= 0) & (margin <= MOST_OCTAVES)).all()


def test_the_probe_is_shown_clips_at_the_rate_that_makes_them_wrong(monkeypatch):
    """Pre-training gives the worse half its other frames per second, and the better half the clips' own."""
    config = tiny_pretrain_config(steps=12)
    model = build_models(config, CAPTIONS)["motion"]
    seen, shown = [], MotionReward.values_and_words

    def spy(self, frames, fps, prompts):
        seen.append(fps)
        return shown(self, frames, fps, prompts)

    monkeypatch.setattr(MotionReward, "values_and_words", spy)
    windows = (torch.stack([smooth_clip(seed) for seed in range(16)]) * 255).byte()
    PRETRAIN["motion"](model, config, windows, [CAPTIONS[0]] * 16)
    better, worse = (torch.cat(half) for half in zip(*(fps.chunk(2) for fps in seen), strict=True))
    assert (better == config.fps).all()
    assert (worse > config.fps).any()
    assert (worse < config.fps).any()


def test_each_model_is_trained_with_its_own_settings(
    backbones, two_dimensions, tmp_path, monkeypatch
):
    used, fit = {}, train.fit

    def spy(model, tasks, clips, config, *, label, **options):
        used[label] = config.tasks_per_batch
        return fit(model, tasks, clips, config, label=label, **options)

    monkeypatch.setattr(train, "fit", spy)
    config = RewardTrainConfig(
        models=("motion", "aesthetic"), epochs=0.05, own={"aesthetic": {"tasks_per_batch": 1}}
    )
    train_rewards(config, two_dimensions, backbones, tmp_path)
    assert used == {"motion": 4, "aesthetic": 1}


def test_side_by_side_is_the_same_training(backbones, two_dimensions, tmp_path):
    """What is trained beside it changes no weight of a model."""
    config = RewardTrainConfig(models=("motion", "aesthetic"), epochs=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train_rewards(config, two_dimensions, backbones, tmp_path / "in_turn")
    finally:
        torch.set_num_threads(threads)
    beside = config.model_copy(update={"side_by_side": 2})
    train_rewards(beside, two_dimensions, backbones, tmp_path / "beside")
    for name in config.models:
        one, other = (
            load_file(tmp_path / way / name / "model.safetensors") for way in ("in_turn", "beside")
        )
        assert all(torch.equal(one[key], other[key]) for key in one)
    rows = [
        (tmp_path / way / "metrics.jsonl").read_text().count("aesthetic/loss")
        for way in ("in_turn", "beside")
    ]
    assert rows[0] == rows[1] > 0


def test_backbones_pre_trained_side_by_side_are_the_same(backbones, tmp_path):
    threads = torch.get_num_threads()
    config = tiny_pretrain_config()
    torch.set_num_threads(1)
    try:
        pretrain_backbones(config, backbones.parent, tmp_path / "in_turn")
    finally:
        torch.set_num_threads(threads)
    beside = config.model_copy(update={"side_by_side": 2})
    pretrain_backbones(beside, backbones.parent, tmp_path / "beside")
    for name in PRETRAIN:
        one, other = (
            load_file(tmp_path / way / name / "model.safetensors") for way in ("in_turn", "beside")
        )
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_members_begin_from_backbones_of_their_own(backbones, two_dimensions, tmp_path):
    config = tiny_pretrain_config().model_copy(update={"ensemble": 2})
    out = pretrain_backbones(config, backbones.parent, tmp_path / "backbones")
    first, second = (load_reward(out / "motion" / f"member_{i}").state_dict() for i in range(2))
    alone = load_reward(backbones / "motion").state_dict()
    assert all(torch.equal(first[name], alone[name]) for name in alone)
    assert any(not torch.allclose(first[name], second[name]) for name in alone)
    load_reward(out / "motion")  # a sealed ensemble, its range not yet known
    assert "low" not in json.loads((out / "motion" / "reward.json").read_text())
    (out / "motion" / "member_1.sha256").unlink()  # as if it had been killed in it
    kept = (out / "motion" / "member_0" / "model.safetensors").stat().st_mtime_ns
    pretrain_backbones(config, backbones.parent, out)
    assert (out / "motion" / "member_0" / "model.safetensors").stat().st_mtime_ns == kept
    again = load_reward(out / "motion" / "member_1").state_dict()
    assert all(torch.equal(again[name], second[name]) for name in again)

    train = out / "motion" / "member_0" / "model.safetensors"
    damaged = train.read_bytes()[:-1] + b"?"
    train.write_bytes(damaged)
    pretrain_backbones(config, backbones.parent, out)
    with pytest.raises(UserError, match=r"member_0/model\.safetensors"):
        load_reward(out / "motion")  # it was not sealed again
    pretrain_backbones(tiny_pretrain_config(), backbones.parent, out)  # one of each after all
    assert torch.equal(load_reward(out / "motion").state_dict()["mean"], alone["mean"])
    assert not list((out / "motion").glob("member_*"))
    pretrain_backbones(config, backbones.parent, out)

    frozen = RewardTrainConfig(models=("motion",), ensemble=2, epochs=0.1, backbone_lr=0)
    taught = load_reward(
        train_rewards(frozen, two_dimensions, out, tmp_path / "rewards") / "motion"
    )
    for member, source in zip(taught.members, (first, second), strict=True):
        weights = {n: v for n, v in member.state_dict().items() if n.startswith("backbone.")}
        assert weights and all(torch.equal(source[name], value) for name, value in weights.items())


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="models names 'aesthetics'; expected one of foundational"):
        RewardTrainConfig(models=("aesthetics",))

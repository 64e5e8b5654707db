"""The trainer as a whole: it raises the reward, keeps the best by the stated rule, refuses bad input in clear words."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    DIMENSIONS,
    PROMPTS,
    VALIDATION_PROMPTS,
    run_tiny,
    tiny_composite,
    tiny_config,
    tiny_generator,
)

from generator import load_generator
from reelhf.config import load_config
from reelhf.errors import UserError
from reelhf.run import read_metrics
from reelhf.video import probe_video
from rlhf.direct import DirectConfig, check_inputs, maximise_reward
from rlhf.direct_run import DirectRun, read_prompts
from rlhf.examples import draw_seed, prompt_rows
from rlhf.validation import keep_best_score


@pytest.mark.parametrize("gradient", ["last", "drtune", "x0", "direct_align"])
def test_every_way_of_the_gradient_raises_the_reward(gradient, tmp_path):
    run_tiny(
        tmp_path,
        gradient=gradient,
        num_steps=12,
        validate_every=12,
        checkpoint_every=12,
        anchor_weight=0.01,
        optimizer={"lr": 3e-3},
        ema_decay=0.5,
    )
    rows = read_metrics(tmp_path)
    assert rows[-1]["validation/total"] > rows[0]["validation/total"] + 0.1


@pytest.fixture(scope="module")
def refined(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("refiner")
    run_tiny(out, "refiner", num_steps=4, low_res_weight=1.0, range_weight=1.0)
    return out


def test_a_refiner_run_leaves_generator_folders_with_its_own_sampler(refined):
    before = tiny_generator("refiner")
    for kind in ("best", "last"):
        after = load_generator(refined / kind)
        assert (after.role, after.sampler) == ("refiner", before.sampler)
    changed = load_file(refined / "last" / "denoiser.safetensors")
    assert any(
        not torch.equal(changed[name], value)
        for name, value in before.denoiser.state_dict().items()
    )


def test_metrics_have_the_stable_names_and_step_zero_is_the_start(refined):
    rows = read_metrics(refined)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for name in DIMENSIONS:
        assert f"reward/{name}" in rows[1]
        assert f"held_out/{name}" in rows[0]
        assert f"validation/{name}" in rows[-1]
    expected = {"reward/total", "anchor", "grad_norm", "valid_fraction", "seconds/rollout"}
    assert expected <= rows[1].keys()
    assert rows[1]["anchor"] == 0  # the policy is still the reference
    assert rows[2]["anchor"] > 0


def test_validation_clips_are_saved_as_videos(refined):
    clip = probe_video(refined / "samples/step_000004/validation_00.mp4")
    assert (clip.frames, clip.width, clip.height) == (5, 48, 48)


def test_low_resolution_clips_are_sampled_once_and_kept(refined):
    frames = load_file(refined / "low_res_train.safetensors")["frames"]
    assert frames.dtype == torch.uint8
    assert tuple(frames.shape) == (6, 3, 5, 32, 32)


def test_the_best_is_the_start_when_nothing_better_came(tmp_path):
    run_tiny(
        tmp_path,
        num_steps=2,
        optimizer={"lr": 0.5, "grad_clip": 0},
        ema_decay=0.0,
        hacking={"patience": 9},
    )
    last = read_metrics(tmp_path)[-1]
    if last["validation/total"] > read_metrics(tmp_path)[0]["validation/total"]:
        pytest.skip("a rate of 0.5 happened to help")
    assert last["best/step"] == 0
    best = load_file(tmp_path / "best" / "denoiser.safetensors")
    for name, value in tiny_generator().denoiser.state_dict().items():
        assert torch.equal(best[name], value)


class HalfBlind(torch.nn.Module):
    """A composite that cannot score the first clip of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_composite()
        self.dimensions, self.models = self.inner.dimensions, self.inner.models
        self.select, self.encode_prompts = self.inner.select, self.inner.encode_prompts

    def score(self, frames, **kwargs):
        broken = torch.zeros(len(frames), dtype=torch.bool)
        broken[0] = True
        return self.inner.score(
            frames.masked_fill(broken.view(-1, 1, 1, 1, 1), float("nan")), **kwargs
        )


def test_a_clip_that_cannot_be_scored_is_left_out_and_counted(tmp_path):
    maximise_reward(
        tiny_config(num_steps=2),
        backbone=tiny_generator(),
        reward=HalfBlind(),
        judge=tiny_composite(100),
        prompts=PROMPTS,
        validation_prompts=VALIDATION_PROMPTS,
        out=tmp_path,
    )
    last = read_metrics(tmp_path)[-1]
    assert last["valid_fraction"] == 0.75
    assert last["validation/valid_fraction"] == pytest.approx(2 / 3)
    assert last["grad_norm"] > 0
    assert last["skipped"] == 0


def test_an_alarm_that_lasts_stops_the_run_and_a_restart_does_not_go_on(tmp_path):
    never_moving_enough = {"min_motion_ratio": 1.0, "patience": 1, "max_saturation_rise": 0.0}
    for _ in range(2):
        run_tiny(
            tmp_path,
            num_steps=6,
            validate_every=1,
            hacking=never_moving_enough,
            optimizer={"lr": 1e-2},
        )
        rows = read_metrics(tmp_path)
        assert len(rows) < 7
        assert rows[-1]["hacking/alarms"] >= 1
        assert (tmp_path / "last" / "generator.json").is_file()


def test_a_run_refuses_to_go_on_with_another_reward(tmp_path):
    arguments = {
        "prompts": PROMPTS,
        "validation_prompts": VALIDATION_PROMPTS,
        "out": tmp_path,
        "judge": tiny_composite(100),
        "reward": tiny_composite(),
    }
    config = tiny_config(num_steps=1)
    maximise_reward(config, backbone=tiny_generator(), inputs={"rewards": "a"}, **arguments)
    with pytest.raises(UserError, match="began with another 'rewards'"):
        maximise_reward(config, backbone=tiny_generator(), inputs={"rewards": "b"}, **arguments)


# Keep-best


FIRST = {"validation/total": 0.0, "held_out/total": 0.0} | {
    f"{kind}_z/{name}": 0.0 for kind in ("validation", "held_out") for name in DIMENSIONS
}
WEIGHTS = dict.fromkeys(DIMENSIONS, 1.0)


def test_the_start_scores_zero_under_both_rules():
    for rule in ("balanced_gain", "every_dimension"):
        assert keep_best_score(rule, FIRST, FIRST, WEIGHTS, []) == 0.0


def test_balanced_gain_is_the_smaller_of_both_gains():
    now = FIRST | {"validation/total": 3.0, "held_out/total": 0.5}
    assert keep_best_score("balanced_gain", now, FIRST, WEIGHTS, []) == 0.5


def test_every_dimension_is_ruled_by_the_weakest_weighted_one():
    now = FIRST | {
        f"{kind}_z/{name}": 1.0 for kind in ("validation", "held_out") for name in DIMENSIONS
    }
    now |= {"validation_z/motion_quality": -0.4, "held_out_z/motion_quality": 0.0}
    assert keep_best_score("every_dimension", now, FIRST, WEIGHTS, []) == -0.2
    assert (
        keep_best_score("every_dimension", now, FIRST, WEIGHTS | {"motion_quality": 0.0}, []) == 1.0
    )


@pytest.mark.parametrize("rule", ["balanced_gain", "every_dimension"])
def test_nothing_is_kept_with_an_alarm_or_a_held_out_loss(rule):
    now = FIRST | {"validation/total": 3.0, "held_out/total": 0.5}
    assert keep_best_score(rule, now, FIRST, WEIGHTS, ["saturation"]) is None
    assert keep_best_score(rule, now | {"held_out/total": -0.01}, FIRST, WEIGHTS, []) is None


# Draws


def test_every_prompt_comes_once_per_epoch_in_a_new_order():
    rows = prompt_rows(0, 30, 10, seed=3)
    assert [Counter(rows[i : i + 10]) for i in (0, 10, 20)] == [Counter(range(10))] * 3
    assert rows[:10] != rows[10:20]
    assert prompt_rows(7, 11, 10, seed=3) == rows[7:18]


def test_draw_seeds_do_not_repeat():
    seeds = {
        draw_seed(s, p, t, i)
        for s in range(3)
        for p in ("clip", "step")
        for t in range(20)
        for i in range(8)
    }
    assert len(seeds) == 3 * 2 * 20 * 8


# Bad input


@pytest.mark.parametrize(
    ("role", "base", "prompts", "message"),
    [
        ("base", None, [], "at least one training prompt"),
        ("base", None, VALIDATION_PROMPTS[:1], "validation prompts are also training prompts"),
        ("refiner", None, PROMPTS, "needs low_res_generator"),
        ("base", "base", PROMPTS, "is for a refiner"),
    ],
)
def test_bad_input_is_refused_in_one_line(role, base, prompts, message):
    low_res = None if base is None else tiny_generator(base)
    with pytest.raises(UserError, match=message):
        check_inputs(
            tiny_config(), tiny_generator(role), prompts, VALIDATION_PROMPTS, low_res, None
        )


def test_a_sampler_that_looks_back_is_refused_before_any_work():
    backbone = tiny_generator()
    backbone.sampler = replace(backbone.sampler, kind="adams")
    with pytest.raises(UserError, match="samples with 'adams', whose steps look back"):
        check_inputs(tiny_config(), backbone, PROMPTS, VALIDATION_PROMPTS, None, None)


def test_flow_matching_needs_clips():
    with pytest.raises(UserError, match="flow_matching_weight and clips go together"):
        check_inputs(
            tiny_config(flow_matching_weight=1.0),
            tiny_generator(),
            PROMPTS,
            VALIDATION_PROMPTS,
            None,
            None,
        )


def test_a_missing_or_empty_prompt_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no prompt file at"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt")


def test_a_band_upside_down_is_refused():
    with pytest.raises(ValueError, match="0 <= lowest < highest <= 1"):
        DirectConfig(gradient_band=(0.8, 0.2))


def test_flow_matching_on_real_clips_runs_beside_the_reward(tmp_path):
    from generator.toyworld import ToyDatasetConfig, render_dataset

    clips = render_dataset(
        ToyDatasetConfig(num_clips=3, num_frames=5, fps=8.0, size=32, seed=0, zh_fraction=0.0),
        tmp_path / "clips",
    )
    maximise_reward(
        tiny_config(num_steps=2, flow_matching_weight=1.0),
        backbone=tiny_generator(),
        reward=tiny_composite(),
        judge=tiny_composite(100),
        prompts=PROMPTS,
        validation_prompts=VALIDATION_PROMPTS,
        clips=clips,
        out=tmp_path / "run",
    )
    assert read_metrics(tmp_path / "run")[-1]["grad_norm"] > 0


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("configs/rlhf/*.yaml")), ids=lambda p: p.stem
)
def test_every_yaml_loads(path):
    assert load_config(DirectRun, path).num_steps > 0


def test_the_resolved_config_lies_in_the_run_folder(refined):
    assert load_config(DirectConfig, refined / "config.yaml").num_low_res_clips == 6
    assert json.loads((refined / "environment.json").read_text())

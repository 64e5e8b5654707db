from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.consistency import (
    ConsistencyConfig,
    CountedDenoiser,
    Trajectories,
    distill_refiner,
    draw_batch,
    ema_target,
    record_trajectories,
    split_prompts,
    student_edges,
)
from generator.base import SamplerSpec
from generator.checkpoint import DiTGenerator, load_generator
from generator.flow import sigma_schedule
from generator.sampling import noise_like, sample_latents
from reelhf.engine import OptimizerConfig
from reelhf.errors import UserError
from reelhf.run import read_metrics
from tests.generator.tiny_parts import make_generator, make_vae_and_text, render_clips

TINY = ConsistencyConfig(
    num_segments=2,
    num_trajectories=12,
    num_held_out=8,
    num_steps=6,
    batch_size=4,
    optimizer=OptimizerConfig(lr=1e-3),
    ema_decay=0.5,
    save_every=3,
    num_samples=1,
)
TEACHER_SAMPLER = SamplerSpec("euler", sigma_schedule(4), guidance_scale=1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("distill")
    make = partial(make_generator, *make_vae_and_text(), sampler=TEACHER_SAMPLER, std=0.3)
    make("base", 32).save(root / "base")
    make("refiner", 64).save(root / "teacher")
    clips = render_clips(root / "clips")
    return {"teacher": root / "teacher", "base": root / "base", "clips": clips}


@pytest.fixture(scope="module")
def student(folders, tmp_path_factory) -> Path:
    return distill_refiner(TINY, **folders, out=tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def recorded(folders) -> tuple[DiTGenerator, Trajectories]:
    refiner, base = load_generator(folders["teacher"]), load_generator(folders["base"])
    prompts = split_prompts(TINY, folders["clips"])[0]
    return refiner, record_trajectories(TINY, refiner, base, prompts, first_seed=0, label="test")


def test_a_recorded_trajectory_is_the_teachers_own_sampling(recorded):
    refiner, trajectories = recorded
    assert trajectories.states.shape == (5, 12, 8, 2, 4, 4)
    noise = noise_like(range(12), (8, 2, 4, 4))
    assert torch.equal(trajectories.states[0], noise)
    with torch.no_grad():
        final = sample_latents(refiner, trajectories.condition, trajectories.task, noise)
    torch.testing.assert_close(trajectories.states[-1], final, rtol=1e-4, atol=1e-5)


def test_a_batch_holds_points_of_every_segment_with_their_own_edge(recorded):
    _, trajectories = recorded
    sigmas = sigma_schedule(4)
    edge_only = TINY.model_copy(update={"edge_fraction": 1.0})
    batch = draw_batch(edge_only, trajectories, sigmas, range(4))
    assert batch.sigma.tolist() == [1.0, 0.5, 1.0, 0.5]
    assert batch.edge.tolist() == [0.5, 0.0, 0.5, 0.0]
    assert batch.next_sigma.tolist() == [0.75, 0.25, 0.75, 0.25]
    inside = TINY.model_copy(update={"edge_fraction": 0.0, "batch_size": 64})
    batch = draw_batch(inside, trajectories, sigmas, range(64))
    assert set(batch.sigma.tolist()) == {1.0, 0.75, 0.5, 0.25}
    assert (batch.edge <= batch.next_sigma).all()
    states = trajectories.states
    found = (states[2].flatten(1)[:, None] == batch.at_edge[0].flatten()).all(-1)
    assert found.sum() == 1  # sample 0 belongs to segment 0, whose lower edge is state 2


def test_the_averaged_target_of_a_last_step_is_the_teachers_step_itself(recorded):
    refiner, trajectories = recorded
    config = TINY.model_copy(update={"edge_fraction": 0.0, "batch_size": 64})
    batch = draw_batch(config, trajectories, sigma_schedule(4), range(64))
    target = ema_target(refiner, refiner.denoiser, batch)
    last = batch.next_sigma == batch.edge
    assert last.any()
    assert torch.equal(target[last], batch.next_noisy[last])
    assert not torch.equal(target[~last], batch.next_noisy[~last])


def test_the_student_has_its_own_weights_and_a_sampler_of_the_segment_edges(student, folders):
    teacher, distilled = load_generator(folders["teacher"]), load_generator(student)
    assert distilled.role == "refiner"
    assert distilled.sampler == SamplerSpec("euler", (1.0, 0.5, 0.0), guidance_scale=1.0)
    pairs = zip(teacher.denoiser.parameters(), distilled.denoiser.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    counted = CountedDenoiser(distilled.denoiser)
    task = distilled.low_res_task(torch.rand(1, 3, 5, 32, 32), 64, 64)
    noise = noise_like([0], (8, 2, 4, 4))
    with torch.no_grad():
        sample_latents(distilled, distilled.encode_prompts(["x"]), task, noise, denoiser=counted)
    assert counted.num_samples == 2


def test_the_comparison_is_at_the_stated_number_of_evaluations(student):
    report = json.loads((student.parent / "distill.json").read_text())
    assert report["nfe"] == {"teacher": 4.0, "teacher_few_steps": 2.0, "student": 2.0}
    assert report["num_prompts"] == 8
    low, high = report["interval"]
    assert low <= report["difference"] <= high
    assert report["student_is_closer"] == (low > 0)
    for name in ("teacher", "teacher_few_steps", "student"):
        assert (student.parent / f"samples/step_000006/00_{name}.mp4").is_file()


@pytest.mark.parametrize("target", ["trajectory", "ema"])
def test_distillation_brings_the_student_closer_than_the_teacher_at_equal_cost(
    target, folders, tmp_path
):
    config = TINY.model_copy(
        update={
            "num_steps": 100,
            "ema_decay": 0.8,
            "target": target,
            "num_samples": 0,
            "save_every": 100,
        }
    )
    distill_refiner(config, **folders, out=tmp_path / "run")
    report = json.loads((tmp_path / "run" / "distill.json").read_text())
    distance = report["distance_to_teacher"]
    assert distance["student"] < distance["teacher_few_steps"]


def test_a_stopped_distillation_continues_bit_for_bit(student, folders, tmp_path):
    distill_refiner(TINY.model_copy(update={"num_steps": 3}), **folders, out=tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "generator")
    resumed = distill_refiner(TINY, **folders, out=tmp_path / "run")
    expected, actual = (load_file(path / "denoiser.safetensors") for path in (student, resumed))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    losses = [[row["loss"] for row in read_metrics(path.parent)] for path in (student, resumed)]
    assert losses[0] == losses[1]


def test_training_and_held_out_prompts_share_nothing(folders):
    train, held_out = split_prompts(TINY, folders["clips"])
    assert len(train) == 12
    assert len(held_out) == 8
    assert not set(train) & set(held_out)


def test_bad_input_is_refused_in_words(folders, tmp_path):
    with pytest.raises(UserError, match="expected a refiner to distil"):
        distill_refiner(TINY, folders["base"], folders["base"], folders["clips"], tmp_path / "a")
    uneven = TINY.model_copy(update={"num_segments": 3})
    with pytest.raises(UserError, match="4 teacher steps cannot be cut into 3"):
        distill_refiner(uneven, **folders, out=tmp_path / "b")
    looking_back = load_generator(folders["teacher"])
    looking_back.sampler = replace(looking_back.sampler, kind="adams")
    with pytest.raises(UserError, match="samples with 'adams'; distillation follows Euler steps"):
        student_edges(TINY, looking_back)

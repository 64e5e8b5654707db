"""Refiners in stages: low-resolution pairs made once, 2x and 4x, degraded and redrawn; whether refined clips show what they came from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from generator.checkpoint import load_generator, upsample_frames
from generator.data.low_res import low_res_key
from generator.refiner import (
    LowResConfig,
    degrade,
    downsample_frames,
    low_res_consistency,
    low_res_latents,
    low_res_size,
)
from generator.sampling import sample_batches
from generator.training.progressive import encode_stages, open_store, train_stages
from reelhf.cli import main
from reelhf.errors import UserError
from reelhf.run import read_metrics
from tests.generator.staged_parts import SMALL, staged, write_manifest

BIG = {**SMALL, "area": 4096}
REFINED = {
    "stage": "refiner",
    "architecture": {"checkpointing": True},
    "stages": [
        {"name": "twice", "buckets": SMALL, "num_steps": 2, "micro_batch_tokens": 16},
        {
            "name": "four times",
            "buckets": {**BIG, "max_enlargement": 3.0},
            "num_steps": 3,
            "micro_batch_tokens": 48,
            "low_res": {"factor": 4, "base_fraction": 1.0, "num_steps": 2, "noise": 0.05},
            "tasks": {"text_to_image": 0.3, "image_to_video": 0.0},
        },
    ],
    "low_res": {"blur": 1.0, "base_fraction": 0.5, "num_steps": 2},
    "num_samples": 1,
    "height": 64,
    "width": 64,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_parts) -> Path:
    from tests.generator.tiny_parts import make_generator

    folder = tmp_path_factory.mktemp("base") / "generator"
    replace(make_generator(*tiny_parts), frame_shape=(9, 16, 16)).save(folder)
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return write_manifest(tmp_path_factory.mktemp("footage"))


@pytest.fixture(scope="module")
def data(base, manifest, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pairs") / "latents"
    return encode_stages(staged(**REFINED), manifest, out, base=base)


@pytest.fixture(scope="module")
def refined(base, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "refined"
    return train_stages(staged(**REFINED), data, out, base=base)


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [
        ((704, 1280), 2, (352, 640)),
        ((1088, 1920), 4, (272, 480)),
        ((64, 64), 4, (16, 16)),
        ((48, 80), 2, (32, 48)),  # whole latents, halves upwards
        ((16, 32), 4, (16, 16)),
    ],
)
def test_the_low_resolution_clip_has_whole_latents(size, factor, expected):
    assert low_res_size(*size, factor, 16) == expected


def test_degraded_clips_are_blurred_and_noisy_as_their_seeds_say():
    torch.manual_seed(0)
    frames = torch.rand(2, 3, 2, 16, 24)
    assert degrade(frames, LowResConfig(), [1, 2]) is frames
    noisy = degrade(frames, LowResConfig(noise=0.1), [1, 2])
    blurred = degrade(frames, LowResConfig(blur=2.0), [1, 2])
    assert torch.equal(noisy[1:], degrade(frames[1:], LowResConfig(noise=0.1), [2]))
    assert 0.001 < (noisy - frames).std() < 0.1
    for clip, original in zip(blurred, frames, strict=True):
        assert clip.std() < 0.7 * original.std()
        torch.testing.assert_close(clip.mean(), original.mean(), rtol=0, atol=0.02)
    flat = torch.full((1, 3, 1, 16, 16), 0.3)
    torch.testing.assert_close(degrade(flat, LowResConfig(blur=3.0), [0]), flat)


def test_consistency_is_the_error_at_the_low_resolution():
    low_res = torch.rand(2, 3, 2, 1, 1).expand(2, 3, 2, 16, 16).contiguous()  # plain pictures
    refined = upsample_frames(low_res, 32, 32)
    assert (low_res_consistency(refined, low_res) > 90).all()
    off = low_res_consistency((refined + 0.1).clamp(max=2), low_res + 0.0)
    assert off.shape == (2,) and (off < 21).all()
    detail = torch.rand(2, 3, 2, 32, 32)  # whatever lies above the low resolution does not count
    assert (low_res_consistency(detail, downsample_frames(detail, 16, 16)) > 90).all()
    with pytest.raises(ValueError, match="were not made from"):
        low_res_consistency(refined, low_res[:1])


def test_half_of_the_clips_are_redrawn_by_the_base_and_seeds_say_which(base):
    generator = load_generator(base)
    frames = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0))
    condition = generator.encode_prompts(["a red circle"])
    plain = low_res_latents(generator, frames, condition, LowResConfig(base_fraction=0), 0)
    assert plain.shape == (1, 8, 2, 2, 2)
    config = LowResConfig(base_fraction=0.5, num_steps=1)
    made = [low_res_latents(generator, frames, condition, config, seed) for seed in range(24)]
    redrawn = [not torch.equal(one, plain) for one in made]
    assert 6 <= sum(redrawn) <= 18
    again = low_res_latents(generator, frames, condition, config, redrawn.index(True))
    assert torch.equal(again, made[redrawn.index(True)])


def test_inputs_are_made_once_and_their_absence_is_one_line(base, data, manifest, tmp_path):
    config = staged(**REFINED)
    store = open_store(data, base / "vae", base / "text")
    stage = config.stages[1]
    windows = store.read_set(stage.buckets, what="x")
    key = low_res_key(base, stage.low_res, config.seed)
    files = [store.low_res_file(window.key, key) for window in windows]
    before = [file.stat().st_mtime_ns for file in files]
    shape = store.latents(windows[0]).shape
    assert store.low_res(windows[0], key).shape == shape == (8, 2, 4, 4)
    held = files[0].read_bytes()
    files[0].unlink()
    with pytest.raises(
        UserError, match=r"four times: the low-resolution inputs of 1 of \d+ windows"
    ):
        train_stages(config, data, tmp_path / "run", base=base)
    encode_stages(config, manifest, data, base=base)
    assert files[0].read_bytes() == held  # what is random follows from the content
    assert [file.stat().st_mtime_ns for file in files[1:]] == before[1:]
    other = staged(**{**REFINED, "low_res": {"blur": 2.0}})
    with pytest.raises(UserError, match="low-resolution inputs of"):
        train_stages(other, data, tmp_path / "run", base=base)


def test_a_refiner_goes_through_its_stages(refined, base):
    generator = load_generator(refined)
    assert (generator.role, generator.frame_shape) == ("refiner", (9, 64, 64))
    assert generator.denoiser.low_res_input.weight.any()
    rows = read_metrics(refined.parent)
    assert [row["stage"] for row in rows] == [0, 0, 1, 1, 1]
    scored = [row["step"] for row in rows if "samples/low_res_psnr" in row]
    assert scored == [2, 5]
    assert all(0 < row["samples/low_res_psnr"] < 60 for row in rows if row["step"] in scored)
    # a base of 16 x 16 and a refiner of 64 x 64 in one call
    clips = load_generator(base).sample(["a red circle"], refiner=generator)
    assert clips.shape == (1, 3, 9, 64, 64)
    shapes = {
        tuple(latents.shape[2:])
        for latents in sample_batches(
            generator, ["x"], [0], task=generator.low_res_task(torch.rand(1, 3, 9, 16, 16), 64, 64)
        )
    }
    assert shapes == {(3, 4, 4)}


def test_a_refiner_stopped_and_begun_again_ends_bit_equal(refined, base, data, tmp_path):
    import shutil

    run = shutil.copytree(refined.parent, tmp_path / "run")
    shutil.rmtree(run / "generator")
    shutil.rmtree(run / "checkpoints" / "step_000005")
    again = train_stages(staged(**REFINED), data, run, base=base)
    expected, found = (load_file(path / "denoiser.safetensors") for path in (refined, again))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_refiner_is_trained_on(refined, base, data, tmp_path):
    on = train_stages(
        staged(**{**REFINED, "stages": REFINED["stages"][1:]}),
        data,
        tmp_path / "run",
        base=base,
        init=refined,
    )
    assert load_generator(on).role == "refiner"
    with pytest.raises(UserError, match="is not a refiner generator"):
        train_stages(staged(**REFINED), data, tmp_path / "other", base=base, init=base)


def test_commands_of_a_staged_refiner(base, manifest, tmp_path, capsys):
    config = tmp_path / "refiner.yaml"
    values = {**staged(**REFINED).model_dump(mode="json"), "stages": REFINED["stages"][:1]}
    values |= {"height": 32, "width": 32}
    config.write_text(json.dumps(values))
    latents, out = tmp_path / "latents", tmp_path / "run"
    with pytest.raises(SystemExit):
        main(["generator", "data", "encode", str(config), "--clips", str(manifest), "--out", "x"])
    assert "missing --base for stage 'refiner'" in capsys.readouterr().err
    words = ["--clips", str(manifest), "--base", str(base), "--out", str(latents)]
    main(["generator", "data", "encode", str(config), *words])
    assert f"--base {base}" in capsys.readouterr().out
    words = ["--data", str(latents), "--base", str(base), "--out", str(out)]
    main(["generator", "train", str(config), *words])
    assert load_generator(out / "generator").frame_shape == (9, 32, 32)


def test_eval_measures_a_base_and_a_refiner(refined, base, tmp_path, capsys, tiny_clips):
    from generator.toyworld import ToyDatasetConfig, render_dataset

    clips = render_dataset(ToyDatasetConfig(num_clips=3, size=64), tmp_path / "clips")
    measured = {}
    for name, folder in (("base", base), ("refiner", refined)):
        out = tmp_path / f"{name}.json"
        words = ["--clips", str(clips), "--out", str(out), "--factor", "4"]
        main(["generator", "eval", str(folder), *words])
        measured[name] = {f["name"]: f["value"] for f in json.loads(out.read_text())["figures"]}
    said = capsys.readouterr().out
    assert "refined clips brought back to 16 x 16, against what they were made from" in said
    assert set(measured["base"]) == {
        *("velocity_error", "first_frame_psnr", "first_frame_psnr_of_vae"),
    }
    found = measured["refiner"]
    assert set(found) >= {"low_res_psnr", "low_res_psnr_of_vae", "psnr", "ssim_of_enlargement"}
    assert found["psnr_of_enlargement"] > 10 > found["psnr"]  # an untrained VAE draws nothing
    with pytest.raises(SystemExit):
        main(["generator", "eval", str(refined), "--clips", str(clips), "--factor", "1"])
    assert "--factor 1; expected more than 1" in capsys.readouterr().err

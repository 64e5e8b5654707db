from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from generator.checkpoint import load_generator
from generator.dit import DiTConfig
from generator.refiner import downsample_frames, refiner_from_base
from generator.sampling import sample_frames
from generator.training.denoiser import (
    DenoiserTrainConfig,
    channel_weights,
    train_base,
    train_refiner,
)
from reelhf.engine import OptimizerConfig
from reelhf.errors import UserError
from reelhf.run import read_metrics

TINY = DenoiserTrainConfig(
    architecture=DiTConfig(width=24, num_heads=2, num_pairs=1),
    num_frames=5,
    height=32,
    width=32,
    max_clips=16,
    num_validation=4,
    num_steps=6,
    batch_size=4,
    optimizer=OptimizerConfig(lr=2e-3),
    ema_decay=0.5,
    sampler_steps=2,
    save_every=3,
    validate_every=3,
    sample_every=6,
    num_samples=1,
)


def config(**changes: object) -> DenoiserTrainConfig:
    return DenoiserTrainConfig.model_validate(TINY.model_dump() | changes)


@pytest.fixture(scope="module")
def tiny_base(tiny_clips, tiny_folders, tmp_path_factory) -> Path:
    return train_base(TINY, tiny_clips, *tiny_folders, tmp_path_factory.mktemp("runs") / "base")


def test_training_lowers_the_loss_on_clips_never_seen(tiny_clips, tiny_folders, tmp_path):
    changes = {
        "num_steps": 80,
        "ema_decay": 0.8,
        "save_every": 80,
        "validate_every": 20,
        "num_samples": 0,
    }
    train_base(config(**changes), tiny_clips, *tiny_folders, tmp_path / "run")
    losses = [
        row["validation/loss"] for row in read_metrics(tmp_path / "run") if "validation/loss" in row
    ]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


def test_a_run_leaves_a_generator_samples_and_metrics(tiny_base):
    run = tiny_base.parent
    generator = load_generator(tiny_base)
    assert (generator.role, generator.frame_shape, generator.sampler.num_steps) == (
        "base",
        (5, 32, 32),
        2,
    )
    assert sample_frames(generator, ["a red circle"], [0]).shape == (1, 3, 5, 32, 32)
    assert (run / "samples/step_000006/00.mp4").is_file()
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert {"loss", "grad_norm", "lr", "skipped"} <= rows[0].keys()
    assert [row["step"] for row in rows if "validation/loss" in row] == [3, 6]


def test_a_killed_run_continues_bit_for_bit(tiny_base, tiny_clips, tiny_folders, tmp_path):
    """Stop after step 3 of 6 and go on, against the run that never stopped."""
    train_base(config(num_steps=3), tiny_clips, *tiny_folders, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "generator")
    resumed = train_base(TINY, tiny_clips, *tiny_folders, tmp_path / "run")
    expected, actual = (load_file(path / "denoiser.safetensors") for path in (tiny_base, resumed))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    losses = [[row["loss"] for row in read_metrics(path.parent)] for path in (tiny_base, resumed)]
    assert losses[0] == losses[1]
    assert [row["attempt"] for row in read_metrics(tmp_path / "run")] == [1, 1, 1, 2, 2, 2]


def test_bfloat16_trains_as_float32_but_for_rounding_and_keeps_float32(
    tiny_base, tiny_clips, tiny_folders, tmp_path
):
    run = train_base(config(bf16=True), tiny_clips, *tiny_folders, tmp_path / "run")
    losses = [[row["loss"] for row in read_metrics(path.parent)] for path in (tiny_base, run)]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[1] != losses[0]
    kept = load_file(run / "denoiser.safetensors")
    assert {value.dtype for value in kept.values()} == {torch.float32}
    for name, value in load_file(tiny_base / "denoiser.safetensors").items():
        assert (kept[name] - value).abs().max() < 0.01 * value.abs().max() + 0.01, name


def test_resuming_with_other_settings_is_refused(tiny_base, tiny_clips, tiny_folders):
    with pytest.raises(UserError, match="other settings or other clips"):
        train_base(config(batch_size=8), tiny_clips, *tiny_folders, tiny_base.parent)


def test_a_refiner_is_trained_from_its_base(tiny_base, tiny_clips, tmp_path):
    changes = {"height": 64, "width": 64, "num_steps": 2, "guidance_scale": 1.0}
    folder = train_refiner(config(**changes), tiny_clips, tiny_base, tmp_path / "refiner")
    refiner = load_generator(folder)
    assert (refiner.role, refiner.frame_shape) == ("refiner", (5, 64, 64))
    assert refiner.denoiser.low_res_input.weight.any()
    assert (tmp_path / "refiner/samples/step_000002/00.mp4").is_file()
    assert 3 < read_metrics(tmp_path / "refiner")[-1]["samples/low_res_psnr"] < 60
    with pytest.raises(UserError, match="expected as many frames and no smaller a picture"):
        train_refiner(config(height=16, width=16), tiny_clips, tiny_base, tmp_path / "small")


def test_a_refiner_starts_as_its_base_bit_for_bit(tiny_base):
    base = load_generator(tiny_base)
    refiner = refiner_from_base(base, (5, 32, 32), base.sampler)
    task = base.text_to_video_task(2, 5, 32, 32)
    low_res = refiner.low_res_task(torch.rand(2, 3, 5, 32, 32), 32, 32)
    condition = base.encode_prompts(["a red circle", "a blue star"])
    noisy, sigma = torch.randn(2, 8, 2, 2, 2), torch.tensor([0.3, 1.0])
    with torch.no_grad():
        expected = base.velocity(base.denoiser, noisy, sigma, condition, task)
        actual = refiner.velocity(refiner.denoiser, noisy, sigma, condition, low_res)
    assert torch.equal(expected, actual)


def test_downsampling_keeps_a_plain_picture_plain():
    frames = torch.full((1, 3, 2, 32, 32), 0.4)
    torch.testing.assert_close(
        downsample_frames(frames, 16, 16), torch.full((1, 3, 2, 16, 16), 0.4)
    )


def test_a_channel_weighs_as_much_as_the_pixels_it_moves(tiny_generator):
    backbone = tiny_generator()
    latents = torch.randn(1, 8, 2, 2, 2)
    weights = channel_weights(backbone, latents, 1.0)
    assert weights.mean().item() == pytest.approx(1.0)
    moved = [latents.clone() for _ in range(2)]
    for channel in range(2):
        moved[channel][:, channel] += 1.0
    rms = [
        (backbone.decode(m)[0] - backbone.decode(latents)[0]).square().mean().sqrt() for m in moved
    ]
    assert (weights[0] / weights[1]).item() == pytest.approx((rms[0] / rms[1]).item(), rel=1e-4)
    assert torch.equal(channel_weights(backbone, latents, 0.0), torch.ones(8))


TWO_PROCESSES = """
import sys
from pathlib import Path
from generator.training.denoiser import train_base, DenoiserTrainConfig
config = DenoiserTrainConfig.model_validate_json(Path(sys.argv[1]).read_text())
train_base(config, *map(Path, sys.argv[2:]))
"""


@pytest.mark.slow
def test_two_processes_equal_one(tiny_clips, tiny_folders, tmp_path):
    """Same global batch: losses within 1e-4 over 20 steps, the first gradient norm within 1e-5."""
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    settings = config(num_steps=20, save_every=20, validate_every=20, num_samples=0, batch_size=8)
    (tmp_path / "config.json").write_text(settings.model_dump_json())
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    for processes in (1, 2):
        arguments = [
            tmp_path / "config.json",
            tiny_clips,
            *tiny_folders,
            tmp_path / f"run{processes}",
        ]
        subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={processes}",
            ]
            + [str(argument) for argument in (tmp_path / "run.py", *arguments)],
            env=environment,
            check=True,
            timeout=300,
        )
    one, two = (read_metrics(tmp_path / f"run{processes}") for processes in (1, 2))
    assert len(one) == 20
    assert one[0]["grad_norm"] == pytest.approx(two[0]["grad_norm"], rel=1e-5)
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=1e-4)
    weights = [load_file(tmp_path / f"run{p}/generator/denoiser.safetensors") for p in (1, 2)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)

"""Copies of real clips that a generator partly makes anew: graded by how much was left to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import PROMPTS, tiny_generator

from generator.checkpoint import load_generator
from reelhf.clips import load_clip_folder, load_windows
from reelhf.graded import GradedClips
from reelhf.video import write_video
from rlhf.regenerated import RegenerateConfig, regenerate

CONFIG = RegenerateConfig(max_clips=4, copies=2, batch_size=3)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("regenerated")
    (folder / "clips").mkdir()
    rows = []
    for index, caption in enumerate(PROMPTS[:4]):
        noise = torch.rand(1, 3, 5, 6, 6, generator=torch.Generator().manual_seed(index))
        write_video(
            folder / "clips" / f"{index}.mp4",
            F.interpolate(noise, (5, 48, 48), mode="trilinear")[0],
            8.0,
        )
        rows.append(json.dumps({"path": f"{index}.mp4", "caption": caption}))
    (folder / "clips/captions.jsonl").write_text("\n".join(rows))
    tiny_generator("base").save(folder / "base_model")
    tiny_generator("refiner").save(folder / "refiner_model")
    return {
        "clips": folder / "clips",
        "base": folder / "base_model",
        "refiner": folder / "refiner_model",
    }


@pytest.fixture(scope="module")
def made(given, tmp_path_factory) -> Path:
    return regenerate(CONFIG, **given, out=tmp_path_factory.mktemp("made"))


def test_versions_ascend_from_the_clip_that_only_went_through_the_vae(given, made):
    clips = GradedClips.load(made / "base")
    assert clips.frames.shape == (4, 3, 3, 5, 32, 32)
    assert (clips.grades[:, 0] == 0).all()
    assert (clips.grades[:, 1] > 0).all()
    assert (clips.grades.diff(dim=1) >= 0).all()
    base = load_generator(given["base"])
    windows = load_windows(
        load_clip_folder(given["clips"]),
        num_frames=5,
        fps=8.0,
        size=(48, 48),
        max_windows=4,
        seed=0,
    )
    assert clips.captions == windows.captions
    small = F.interpolate(windows.frames.float() / 255, size=(5, 32, 32), mode="area")
    with torch.no_grad():
        rebuilt = base.decode(base.encode(small))[0].clamp(0, 1)
    assert (clips.frames[:, 0].float() / 255 - rebuilt).abs().max() < 0.5 / 255 + 1e-4


def test_more_steps_left_to_the_generator_take_the_copy_further_away(made):
    clips = GradedClips.load(made / "base")
    original = clips.frames[:, :1].float()
    distance = (clips.frames.float() - original).square().flatten(2).mean(2)
    assert (distance[:, 1:] > 0).all()
    by_grade = distance[:, 1:].flatten()[clips.grades[:, 1:].flatten().argsort()]
    half = len(by_grade) // 2
    assert by_grade[half:].mean() > by_grade[:half].mean()


def test_the_refiner_refines_every_copy(made):
    base, refined = GradedClips.load(made / "base"), GradedClips.load(made / "refiner")
    assert refined.frames.shape == (4, 3, 3, 5, 48, 48)
    assert torch.equal(base.grades, refined.grades)
    assert base.captions == refined.captions


def test_the_seed_decides_everything(given, made, tmp_path):
    again = regenerate(CONFIG, **given, out=tmp_path)
    for part in ("base", "refiner"):
        first, second = GradedClips.load(made / part), GradedClips.load(again / part)
        assert torch.equal(first.frames, second.frames)
        assert torch.equal(first.grades, second.grades)

"""Folders, hub ids and the command line."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import generator.adapters
from generator import load_generator
from generator.adapters import is_diffusers
from generator.adapters.ltx import LTXBackbone
from reelhf.cli import main
from reelhf.clips import load_clip_folder
from reelhf.video import probe_video, write_video

ROOT = Path(__file__).parents[3]
TINY = ["--frames", "9", "--height", "32", "--width", "48", "--steps", "2", "--prompt", "two stars"]


def fails(capsys, *words: object) -> str:
    """Run a command that must end with exit code 2 and one line; that line."""
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    error = capsys.readouterr().err.strip()
    assert exit_.value.code == 2
    assert error.startswith("error: ")
    assert "\n" not in error
    return error


def test_a_folder_is_known_by_its_index_and_a_hub_id_by_having_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_diffusers("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert not is_diffusers("nowhere")
    assert not is_diffusers(tmp_path / "nowhere")
    (tmp_path / "runs").mkdir()
    assert not is_diffusers("runs/nowhere")
    (tmp_path / "runs" / "model_index.json").write_text("{}")
    assert is_diffusers("runs")


def test_sample_writes_clips_of_a_diffusers_folder_and_nothing_to_stderr(pipe_folder, tmp_path):
    """In a process of its own: neither diffusers nor transformers draws a bar or asks for torchvision."""
    code = "import sys; from reelhf.cli import main; main(sys.argv[1:]); assert 'torchvision' not in sys.modules"
    words = ["generator", "sample", "--model", str(pipe_folder("wan21")), *TINY, "--seeds", "2"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--out", str(tmp_path / "clips")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "torchvision" not in done.stderr
    assert "diffusers" not in done.stderr
    entries = load_clip_folder(tmp_path / "clips")
    assert [entry.caption for entry in entries] == ["two stars"] * 2
    info = probe_video(entries[0].path)
    assert (info.frames, info.fps, info.height, info.width) == (9, 16.0, 32, 48)


@pytest.mark.parametrize("name", ["wan22", "ltx", "cogvideox_5b"])
def test_sample_works_for_every_family(name, pipe_folder, tmp_path):
    write_video(tmp_path / "first.mp4", torch.rand(3, 2, 64, 64), 8.0)
    image = [] if name == "cogvideox_5b" else ["--image", str(tmp_path / "first.mp4")]
    main(
        ["generator", "sample", "--model", str(pipe_folder(name)), "--prompt", "two stars", *image]
        + ["--frames", "9", "--height", "64", "--width", "64", "--steps", "2", "--guidance", "2"]
        + ["--out", str(tmp_path / "clips")]
    )
    (entry,) = load_clip_folder(tmp_path / "clips")
    info = probe_video(entry.path)
    assert (info.frames, info.height, info.width) == (9, 64, 64)


def test_without_diffusers_the_error_names_the_extra(pipe_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generator.adapters, "find_spec", lambda name: None)
    words = ["generator", "sample", *TINY, "--out", tmp_path / "out"]
    for model in (pipe_folder("wan21"), "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"):
        error = fails(capsys, *words, "--model", model)
        assert "pip install 'reelhf[diffusers]'" in error
    assert not (tmp_path / "out").exists()


def test_bad_models_are_one_line_and_exit_code_two(pipe_folder, tmp_path, capsys, tiny_generator):
    out = ["--out", tmp_path / "out"]
    sample = ["generator", "sample", *out]
    assert "name one generator" in fails(capsys, *sample, *TINY)
    wan = pipe_folder("wan21")
    assert "name one generator" in fails(capsys, *sample, wan, "--model", wan, *TINY)
    assert "use 9 or 13" in fails(capsys, *sample, "--model", wan, *TINY, "--frames", "10")
    error = fails(capsys, *sample, "--model", "nobody/no-such-model", *TINY)
    assert "nobody/no-such-model: there is no such folder" in error
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "model_index.json").write_text(json.dumps({"_class_name": "WanVACEPipeline"}))
    assert "Did you mean 'WanPipeline'?" in fails(capsys, *sample, "--model", strange, *TINY)
    (strange / "model_index.json").write_text("{")
    assert "strange" in fails(capsys, *sample, "--model", strange, *TINY)
    tiny_generator("base", 32).save(tmp_path / "ours")
    capsys.readouterr()
    assert "only diffusers models take other sizes" in fails(
        capsys, *sample, tmp_path / "ours", *TINY
    )
    assert not (tmp_path / "out").exists()


def test_a_broken_folder_is_one_line(pipe_folder, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(pipe_folder("wan21"), broken)
    shutil.rmtree(broken / "vae")
    error = fails(
        capsys, "generator", "sample", "--model", broken, *TINY, "--out", tmp_path / "out"
    )
    assert "diffusers cannot load it" in error


@pytest.mark.parametrize("relative", ["LTXConditionPipeline", "LTXImageToVideoPipeline"])
def test_relatives_made_of_the_same_modules_load_too(relative, pipe_folder, tmp_path):
    folder = shutil.copytree(pipe_folder("ltx"), tmp_path / relative)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": relative}))
    assert isinstance(load_generator(folder), LTXBackbone)


def test_asking_for_an_adapter_imports_no_diffusers():
    assert importlib.util.find_spec("diffusers")
    code = "import sys, generator.adapters; assert 'diffusers' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

"""What a user can get wrong, as a whole program: one clear line, exit code 2, nothing lost."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reelhf.video import write_video


def reelhf(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.run(
        [sys.executable, "-m", "reelhf", *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def refused(*words: str, cwd: Path) -> str:
    """The one line that the program says."""
    done = reelhf(*words, cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_unknown_config_key_suggests_the_nearest_name(tmp_path):
    line = refused(
        "demo",
        "--no-serve",
        "--preset",
        "smoke",
        "rlhf_base.num_stesp=3",
        "--dry-run",
        cwd=tmp_path,
    )
    assert "rlhf_base.num_stesp" in line
    assert "Did you mean 'num_steps'?" in line


def test_unknown_preset_suggests_the_nearest_name(tmp_path):
    assert "Did you mean 'smoke'?" in refused("demo", "--preset", "smok", cwd=tmp_path)


def test_port_in_use_is_found_before_any_work(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused("demo", "--preset", "smoke", "--port", str(port), cwd=tmp_path)
    assert str(port) in line
    assert "--port" in line


def test_a_folder_that_cannot_be_written_is_found_before_any_work(tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = refused("demo", "--no-serve", "--out", "file/demo", cwd=tmp_path)
    assert "file/demo" in line
    assert "--out" in line


def test_clips_without_captions_are_named(tmp_path):
    write_video(tmp_path / "clips" / "first.mp4", torch.zeros(3, 9, 32, 32), 8.0)
    write_video(tmp_path / "clips" / "second.mp4", torch.ones(3, 9, 32, 32), 8.0)
    (tmp_path / "clips" / "first.txt").write_text("A black square.")
    line = refused("demo", "--no-serve", "--clips", "clips", cwd=tmp_path)
    assert "second.mp4" in line
    assert "first.mp4" not in line


def test_a_corrupt_video_is_named(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "broken.mp4").write_bytes(b"not a video at all")
    (tmp_path / "clips" / "broken.txt").write_text("Nothing.")
    assert "broken.mp4" in refused("demo", "--no-serve", "--clips", "clips", cwd=tmp_path)


def test_missing_clip_folder_is_named(tmp_path):
    assert "nowhere" in refused("demo", "--no-serve", "--clips", "nowhere", cwd=tmp_path)


def test_missing_config_file_is_named(tmp_path):
    assert "nowhere.yaml" in refused("rlhf", "loop", "nowhere.yaml", cwd=tmp_path)


def test_a_person_needs_the_page(tmp_path):
    assert "--no-serve" in refused("demo", "--annotator", "human", "--no-serve", cwd=tmp_path)


def test_review_of_a_folder_without_runs_says_what_it_looked_for(tmp_path):
    assert "metrics.jsonl" in refused("review", "serve", ".", cwd=tmp_path)


def test_a_checkpoint_that_was_cut_short_is_named_and_left_alone(tmp_path):
    from reelhf.run import seal

    folder = tmp_path / "generator"
    folder.mkdir()
    (folder / "generator.json").write_text("{}")
    (folder / "denoiser.safetensors").write_bytes(b"x" * 100)
    seal(folder)
    (folder / "denoiser.safetensors").write_bytes(b"x" * 40)
    (tmp_path / "prompts.txt").write_text("A red circle.\n")
    line = refused(
        "generator",
        "sample",
        "generator",
        "--prompts",
        "prompts.txt",
        "--out",
        "clips",
        cwd=tmp_path,
    )
    assert "denoiser.safetensors was cut short: 40 of 100 bytes" in line
    assert len((folder / "denoiser.safetensors").read_bytes()) == 40


@pytest.mark.parametrize("version", [0, 99])
def test_preferences_of_another_schema_version_are_refused(tmp_path, version):
    from annotation.records import PREFERENCE_SCHEMA, read_preferences
    from reelhf.errors import UserError

    (tmp_path / "manifest.json").write_text(
        json.dumps({"schema": PREFERENCE_SCHEMA, "schema_version": version})
    )
    with pytest.raises(UserError, match=f"version {version}"):
        read_preferences(tmp_path)

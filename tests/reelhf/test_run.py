"""Run folders: nothing written is lost, nothing damaged is trusted."""

from __future__ import annotations

import json
import os

import pytest

from reelhf.config import Config, load_config
from reelhf.errors import UserError
from reelhf.run import RunFolder, read_metrics, seal, verify


class TinyConfig(Config):
    num_steps: int = 3


def write_state(value):
    return lambda folder: (folder / "state.txt").write_text(value)


def test_opening_records_config_and_environment(tmp_path):
    run = RunFolder.open(tmp_path / "run", TinyConfig(num_steps=5))
    assert run.attempt == 1
    assert load_config(TinyConfig, tmp_path / "run" / "config.yaml") == TinyConfig(num_steps=5)
    (attempt,) = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert attempt["attempt"] == 1
    assert attempt["versions"]["torch"]
    assert {"python", "commit", "diff", "platform"} <= attempt.keys()


def test_each_opening_is_a_new_attempt_and_no_resume_refuses(tmp_path):
    assert [RunFolder.open(tmp_path, TinyConfig()).attempt for _ in range(3)] == [1, 2, 3]
    with pytest.raises(UserError, match="already holds a run"):
        RunFolder.open(tmp_path, TinyConfig(), resume=False)


def test_metrics_keep_the_last_attempt_of_a_repeated_step(tmp_path):
    first = RunFolder.open(tmp_path, TinyConfig())
    for step in (1, 2, 3):
        first.log(step, {"reward/total": step})
    second = RunFolder.open(tmp_path, TinyConfig())
    second.log(3, {"reward/total": 30})
    second.log(4, {"reward/total": 40})
    rows = read_metrics(tmp_path)
    assert [(r["step"], r["attempt"], r["reward/total"]) for r in rows] == [
        (1, 1, 1.0),
        (2, 1, 2.0),
        (3, 2, 30.0),
        (4, 2, 40.0),
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5  # append-only


def test_a_line_cut_by_a_kill_costs_only_itself(tmp_path):
    run = RunFolder.open(tmp_path, TinyConfig())
    run.log(1, {"loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "attempt": 1, "lo')
    again = RunFolder.open(tmp_path, TinyConfig())
    again.log(2, {"loss": 2.0})
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0, 2.0]


def test_metrics_keep_nan_as_nan(tmp_path):
    run = RunFolder.open(tmp_path, TinyConfig())
    run.log(1, {"grad_norm": float("nan")})
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["grad_norm"] != row["grad_norm"]


def test_checkpoints_appear_whole_newest_last_and_old_ones_go(tmp_path):
    run = RunFolder.open(tmp_path, TinyConfig())
    assert run.latest_checkpoint() is None
    for step in (1, 2, 10):
        run.save_checkpoint(step, write_state(str(step)), keep=2)
    step, folder = run.latest_checkpoint()
    assert (step, (folder / "state.txt").read_text()) == (10, "10")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step_000002", "step_000010"]


def test_a_checkpoint_that_was_being_written_does_not_count(tmp_path):
    run = RunFolder.open(tmp_path, TinyConfig())
    run.save_checkpoint(1, write_state("one"))

    def killed(folder):
        (folder / "state.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(2, killed)
    assert run.latest_checkpoint()[0] == 1
    run.save_checkpoint(2, write_state("two"))
    assert (run.latest_checkpoint()[1] / "state.txt").read_text() == "two"


def test_a_step_may_be_saved_again(tmp_path):
    run = RunFolder.open(tmp_path, TinyConfig())
    run.save_checkpoint(1, write_state("old"))
    run.save_checkpoint(1, write_state("new"))
    assert (run.latest_checkpoint()[1] / "state.txt").read_text() == "new"


def damage_cut(folder):
    os.truncate(folder / "weights.bin", 10)


def damage_change(folder):
    (folder / "weights.bin").write_bytes(b"y" * 100)


def damage_remove(folder):
    (folder / "weights.bin").unlink()


def damage_manifest(folder):
    (folder / "manifest.json").write_text("{")


def damage_no_manifest(folder):
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_cut, "weights.bin was cut short: 10 of 100 bytes"),
        (damage_change, "weights.bin has changed"),
        (damage_remove, "weights.bin is missing"),
        (damage_manifest, "manifest.json is damaged"),
        (damage_no_manifest, "has no manifest.json"),
    ],
)
def test_verify_names_the_damage(tmp_path, damage, words):
    (tmp_path / "weights.bin").write_bytes(b"x" * 100)
    seal(tmp_path)
    verify(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=words):
        verify(tmp_path)


def test_a_damaged_checkpoint_is_named_not_skipped(tmp_path):
    run = RunFolder.open(tmp_path, TinyConfig())
    run.save_checkpoint(1, write_state("one"))
    folder = run.save_checkpoint(2, write_state("two two two"))
    os.truncate(folder / "state.txt", 3)
    with pytest.raises(UserError, match=r"step_000002/state.txt was cut short"):
        run.latest_checkpoint()


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write to the run folder"):
        RunFolder.open(tmp_path / "file" / "run", TinyConfig())


def test_other_ranks_leave_the_files_to_rank_0(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = RunFolder.open(tmp_path / "run", TinyConfig())
    run.log(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_reading_metrics_of_nothing_says_what_was_expected(tmp_path):
    with pytest.raises(UserError, match="expected a run folder"):
        read_metrics(tmp_path)

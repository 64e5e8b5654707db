"""Stages run once, follow what they depend on, and say how to resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reelhf.errors import UserError
from rlhf.stages import (
    PeakMemory,
    StageFailed,
    StageRunner,
    _imports,
    resident_bytes,
    source_digest,
)


@pytest.fixture
def runner(tmp_path):
    def make(**kwargs):
        return StageRunner(cache=tmp_path / "cache", echo=lambda line: None, **kwargs)

    return make


def _writer(calls: list, text: str = "x"):
    def write(out: Path) -> Path:
        out.mkdir(parents=True, exist_ok=True)
        (out / "file").write_text(text)
        calls.append(out)
        return out

    return write


def test_a_finished_stage_is_not_run_again(runner):
    calls: list = []
    first = runner().run("a", _writer(calls), config={"x": 1}, source="reelhf.errors")
    second = runner().run("a", _writer(calls), config={"x": 1}, source="reelhf.errors")
    assert len(calls) == 1
    assert (first.cached, second.cached) == (False, True)
    assert second.path == first.path.resolve()
    assert second.seconds == first.seconds


def test_another_config_or_another_input_runs_again(runner, tmp_path):
    calls: list = []
    data = tmp_path / "data.txt"
    data.write_text("one")
    for config in ({"x": 1}, {"x": 2}):
        runner().run(
            "a", _writer(calls), config=config, inputs={"data": data}, source="reelhf.errors"
        )
    data.write_text("two")
    runner().run(
        "a", _writer(calls), config={"x": 1}, inputs={"data": data}, source="reelhf.errors"
    )
    assert len(calls) == 3


def test_a_changed_stage_changes_the_key_of_what_reads_it(runner):
    keys = []
    for value in (1, 2):
        own = runner()
        first = own.run("a", _writer([]), config={"x": value}, source="reelhf.errors")
        keys.append(own.run("b", _writer([]), inputs={"a": first}, source="reelhf.errors").key)
    assert keys[0] != keys[1]


def test_a_failed_stage_names_itself_and_resumes_in_its_folder(runner):
    def fail(out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "half").write_text("done")
        raise ValueError("shapes differ\nand more")

    with pytest.raises(
        StageFailed,
        match=r"stage 'a' failed: ValueError: shapes differ \(traceback in .*run the same command again",
    ):
        runner().run("a", fail, source="reelhf.errors")
    seen = []

    def finish(out: Path) -> None:
        seen.append((out / "half").read_text())

    stage = runner().run("a", finish, source="reelhf.errors")
    assert seen == ["done"]
    assert stage.attempts == 2


def test_bad_input_stays_a_user_error(runner):
    def fail(out: Path) -> None:
        raise UserError("no such prompt file")

    with pytest.raises(UserError, match="stage 'a': no such prompt file"):
        runner().run("a", fail, source="reelhf.errors")


def test_a_result_deleted_by_hand_is_made_again(runner):
    calls: list = []
    stage = runner().run("a", _writer(calls), source="reelhf.errors")
    (stage.path / "file").unlink()
    stage.path.rmdir()
    runner().run("a", _writer(calls), source="reelhf.errors")
    assert len(calls) == 2


def test_the_run_folder_links_to_what_it_used(runner, tmp_path):
    stage = runner(links=tmp_path / "run").run("a", _writer([]), source="reelhf.errors")
    assert (tmp_path / "run" / "a").resolve() == stage.path.resolve()
    assert json.loads((stage.folder / "stage.json").read_text())["path"] == "result"


def test_source_follows_imports_but_not_the_whole_package():
    assert "rlhf.charts" in _imports("rlhf.report")
    assert "generator.checkpoint" in _imports("rlhf.candidates")
    reached = source_digest("generator.toyworld")
    assert reached != source_digest("rlhf.report")
    assert not any(name.startswith("generator.dit") for name in _imports("generator.toyworld"))


def test_memory_is_measured():
    with PeakMemory() as memory:
        block = bytearray(50_000_000)
    assert memory.peak_bytes >= resident_bytes() * 0.2
    assert len(block) == 50_000_000

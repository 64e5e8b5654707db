"""Stages run once, follow what they depend on, and say how to resume."""

from __future__ import annotations

import json
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from reelhf.errors import UserError
from reelhf.side_by_side import in_background, run_jobs
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
    assert "reelhf.charts" in _imports("rlhf.report")
    assert "generator.checkpoint" in _imports("rlhf.candidates")
    reached = source_digest("generator.toyworld")
    assert reached != source_digest("rlhf.report")
    assert not any(name.startswith("generator.dit") for name in _imports("generator.toyworld"))


def test_memory_is_measured():
    with PeakMemory() as memory:
        block = bytearray(50_000_000)
    assert memory.peak_bytes >= resident_bytes() * 0.2
    assert len(block) == 50_000_000


def test_seconds_of_two_stages_side_by_side_count_once(runner):
    own, both = runner(), threading.Barrier(2)

    def slow(out: Path) -> None:
        both.wait()  # neither is over before the other has begun
        time.sleep(0.3)
        out.mkdir(parents=True)

    with in_background(lambda: own.run("a", slow, source="reelhf.errors")) as finished:
        here = own.run("b", slow, source="reelhf.errors")
        there = finished()
    alone = own.run("c", _writer([]), source="reelhf.errors")
    first, last = sorted((here, there), key=lambda stage: stage.beside_seconds)
    assert first.beside_seconds == alone.beside_seconds == 0
    assert 0.3 <= last.beside_seconds <= min(first.seconds, last.seconds)
    assert own.seconds == pytest.approx(
        here.seconds + there.seconds + alone.seconds - last.beside_seconds
    )
    again = runner().run("a", slow, source="reelhf.errors")
    assert again.cached
    assert again.beside_seconds == there.beside_seconds


def test_what_fails_in_front_stops_what_runs_behind(runner):
    own, begun = runner(), threading.Event()

    def behind(out: Path) -> None:
        begun.set()
        run_jobs({"long": partial(time.sleep, 300)}, at_once=2)

    def fail(out: Path) -> None:
        assert begun.wait(60)
        raise UserError("no such clips")

    start = time.monotonic()
    with (
        pytest.raises(UserError, match="stage 'front': no such clips"),
        in_background(lambda: own.run("behind", behind, source="reelhf.errors")),
    ):
        own.run("front", fail, source="reelhf.errors")
    assert time.monotonic() - start < 120
    assert run_jobs({"next": partial(int, "7")}, at_once=2) == {
        "next": 7
    }  # later jobs are not stopped

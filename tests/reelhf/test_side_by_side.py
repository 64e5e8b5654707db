from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial

import pytest
import torch

from reelhf.errors import UserError
from reelhf.side_by_side import run_jobs


def whereabouts(value: int) -> tuple[int, int, int]:
    return value, os.getpid(), torch.get_num_threads()


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def refuse() -> None:
    raise UserError("no clips here; expected a folder of videos")


def fail() -> None:
    raise ZeroDivisionError("by nothing")


def vanish() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def test_results_come_back_by_name_from_processes_of_their_own():
    jobs = {name: partial(whereabouts, i) for i, name in enumerate("abc")}
    results = run_jobs(jobs, at_once=2)
    assert list(results) == ["a", "b", "c"]
    assert [value for value, _, _ in results.values()] == [0, 1, 2]
    pids = {pid for _, pid, _ in results.values()}
    assert len(pids) == 3
    assert os.getpid() not in pids
    share = max(1, torch.get_num_threads() // 2)
    assert {threads for *_, threads in results.values()} == {share}


def test_later_jobs_give_way_to_the_first():
    first, second, third = run_jobs(dict.fromkeys("abc", priority), at_once=2).values()
    assert first == priority()
    assert second == third > first


def test_one_at_once_stays_in_this_process():
    assert run_jobs({"a": partial(whereabouts, 7)}, at_once=1)["a"][:2] == (7, os.getpid())


def test_bad_input_stays_bad_input_and_other_errors_name_the_job():
    with pytest.raises(UserError, match="no clips here"):
        run_jobs({"a": refuse}, at_once=2)
    with pytest.raises(RuntimeError, match="look: ZeroDivisionError: by nothing"):
        run_jobs({"look": fail}, at_once=2)
    with pytest.raises(RuntimeError, match="process of motion ended with exit code -9"):
        run_jobs({"motion": vanish}, at_once=2)


def launcher() -> list[str]:
    return sorted({"RANK", "LOCAL_RANK", "WORLD_SIZE"} & {*os.environ})


def test_a_job_belongs_to_no_process_group(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # left by a trainer that ran before
    assert run_jobs({"a": launcher}, at_once=2) == {"a": []}
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="side_by_side is 2 in each of 2 processes; expected 1"):
        run_jobs({"a": launcher}, at_once=2)


def test_a_failure_stops_the_others():
    begun = time.monotonic()
    with pytest.raises(UserError):
        run_jobs({"long": partial(sleep, 300), "bad": refuse}, at_once=2)
    assert time.monotonic() - begun < 120


def test_a_killed_parent_leaves_nobody_behind(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, pathlib, sys, time
            from functools import partial
            from reelhf.side_by_side import run_jobs

            def work(path):
                pathlib.Path(path).write_text(str(os.getpid()))
                time.sleep(300)

            if __name__ == "__main__":
                run_jobs({n: partial(work, f"{sys.argv[1]}/{n}.pid") for n in "ab"}, at_once=2)
            """
        )
    )
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)])
    files = [tmp_path / f"{name}.pid" for name in "ab"]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    children = [int(file.read_text()) for file in files]
    assert all(alive(pid) for pid in children)
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(alive(pid) for pid in children))
    assert not any(alive(pid) for pid in children)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in a minute"
        time.sleep(0.1)

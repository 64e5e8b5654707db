from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from annotation import claims
from annotation.api.server import bind
from annotation.commands import tunnel_line
from annotation.records import Choice, Verdict, read_preferences
from annotation.store import Store
from reelhf.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(tmp_path: Path, clip_files: list[Path]) -> Path:
    files = iter(clip_files)
    for model in ("alpha", "beta"):
        (tmp_path / "clips" / model).mkdir(parents=True)
        for prompt in ("a red ball", "a blue cube"):
            shutil.copy(next(files), tmp_path / "clips" / model / f"{prompt}.mp4")
    return tmp_path / "clips"


def test_from_a_folder_to_preference_data_by_commands_alone(source, tmp_path, capsys):
    project = str(tmp_path / "project")
    main(["annotate", "quickstart", str(source), "--out", project])
    said = capsys.readouterr().out
    assert "4 clips fit of 2 clips in 2 tasks; 0 mismatches" in said
    assert f"next: reelhf annotate serve {project}" in said
    main(["annotate", "user", "add", "ann", "--project", project])
    assert "password: " in capsys.readouterr().out
    main(["annotate", "export", project, "--format", "jsonl"])
    assert "next: reelhf rewards train" in capsys.readouterr().out
    assert read_preferences(tmp_path / "project" / "preferences").judgments == []
    main(["annotate", "backup", project, "--out", str(tmp_path / "copy.db")])
    assert (tmp_path / "copy.db").stat().st_size > 0


def test_a_project_can_be_made_step_by_step(source, tmp_path, capsys):
    project = str(tmp_path / "project")
    main(["annotate", "init", project])
    main(["annotate", "clips", "import", str(source), "--project", project, "--dry-run"])
    assert "nothing was written" in capsys.readouterr().out
    main(["annotate", "clips", "import", str(source), "--project", project])
    main(["annotate", "tasks", "create", project, "--dry-run"])
    assert "2 tasks would be made" in capsys.readouterr().out
    main(["annotate", "tasks", "create", project])
    assert "2 new tasks" in capsys.readouterr().out
    main(["annotate", "tasks", "create", project])
    assert "0 new tasks" in capsys.readouterr().out, "clips already shown are not shown again"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["quickstart", "{source}", "--out", "{tmp}/p", "--k", "1"],
            "k is 1; best and worst need 2",
        ),
        (["quickstart", "{tmp}/nowhere"], "no folder or manifest at"),
        (["serve", "{tmp}/nowhere"], "no annotation project at"),
        (["export", "{tmp}/nowhere"], "no annotation project at"),
        (["agreement", "{tmp}"], "is neither preference data"),
        (["serv"], "serv"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(source, tmp_path, capsys, words, message):
    filled = [word.format(source=source, tmp=tmp_path) for word in words]
    with pytest.raises(SystemExit) as ended:
        main(["annotate", *filled])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error


def test_a_taken_port_is_found_before_the_project_is_opened(tmp_path, capsys):
    listener = bind("127.0.0.1", 0)
    port = str(listener.getsockname()[1])
    with pytest.raises(SystemExit) as ended:
        main(["annotate", "serve", str(tmp_path / "nowhere"), "--port", port])
    listener.close()
    assert ended.value.code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_the_tunnel_line_is_printed_over_ssh_only(monkeypatch):
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    assert tunnel_line(7860) is None
    monkeypatch.setenv("SSH_CONNECTION", "192.0.2.7 50000 192.0.2.1 22")
    monkeypatch.setenv("USER", "ann")
    assert "ssh -N -L 7860:127.0.0.1:7860 ann@192.0.2.1" in tunnel_line(7860)


def test_serve_demo_prints_a_link_that_signs_in(source, tmp_path, capsys):
    project = str(tmp_path / "project")
    main(["annotate", "quickstart", str(source), "--out", project])
    process = subprocess.Popen(
        [
            sys.executable,
            "-u",
            "-m",
            "reelhf",
            "annotate",
            "serve",
            project,
            "--demo",
            "--port",
            "0",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "SSH_CONNECTION": "192.0.2.7 50000 192.0.2.1 22"},
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        said = [process.stdout.readline() for _ in range(5)]
        link = next(line.split()[1] for line in said if line.startswith("annotation: "))
        with httpx.Client(trust_env=False, follow_redirects=True) as http:
            page = http.get(link, headers={"Accept": "text/html"})
            assert page.status_code == 200
            assert "window.gradio_config" in page.text
        assert any("ssh -N -L" in line for line in said)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0, process.stderr.read()
        assert time.monotonic() - started < 15
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()


def test_known_tasks_experts_and_flags_from_the_command_line(source, tmp_path, capsys, clip_files):
    folder = tmp_path / "project"
    project = ["--project", str(folder)]
    main(["annotate", "quickstart", str(source), "--out", str(folder)])
    clips = [{"path": str(path), "model": "m"} for path in clip_files[4:6]]
    row = {"prompt": "a known thing", "clips": clips, "answers": {"motion_quality": {"best": 0}}}
    known = tmp_path / "known.jsonl"
    known.write_text(json.dumps(row) + "\n")
    main(["annotate", "tasks", "known", str(known), *project, "--dry-run"])
    assert "1 tasks for gold would be made" in capsys.readouterr().out
    main(["annotate", "tasks", "known", str(known), *project, "--purpose", "exam"])
    assert "1 new tasks for exam" in capsys.readouterr().out
    main(["annotate", "user", "add", "eve", *project, "--expert"])
    with Store.open(folder) as store:
        eve = store.find_user("eve")
        task = claims.claim(store, eve, lease_seconds=60)
        assert (task.purpose, task.prompt) == ("exam", "a known thing")
        verdict = Verdict(tuple(Choice(d, 0, 1) for d in task.dimensions))
        claims.submit(store, eve, task.presentation, "key-0123", verdict)
        with store.write() as connection:  # passed, whichever was best
            connection.exec_driver_sql("UPDATE task SET state = 'removed' WHERE purpose = 'exam'")
        task = claims.claim(store, eve, lease_seconds=60)
        claims.flag(store, eve, task.presentation, "unsafe", "look")
    capsys.readouterr()
    main(["annotate", "flags", str(folder)])
    said = capsys.readouterr().out
    assert "flag: unsafe: look" in said
    number = said.partition("task ")[2].partition(" ")[0]
    main(["annotate", "flags", str(folder), "--decide", f"{number}=reopen", "--by", "eve"])
    assert "0 tasks wait for a decision" in capsys.readouterr().out

    row["answers"]["motion_quality"]["best"] = 2
    known.write_text(json.dumps(row) + "\n")
    for words, message in (
        (["tasks", "known", str(known), *project], "line 1: motion_quality: best is 2"),
        (["flags", str(folder), "--decide", "nine"], "expected TASK=reopen or TASK=remove"),
        (["flags", str(folder), "--decide", "1=burn"], "decision 'burn' is not one of"),
        (["flags", str(folder), "--decide", "1=remove", "--by", "x"], "no user named 'x'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["annotate", *words])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

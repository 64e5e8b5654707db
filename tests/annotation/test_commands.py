from __future__ import annotations

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

from annotation.api.server import bind
from annotation.commands import tunnel_line
from annotation.records import read_preferences
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

"""`scripts/setup.sh`: what is wrong is found before anything is downloaded, with the line that mends it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def setup(tmp_path):
    """Run the script in a bare copy of the repository, with interpreters that lie about themselves."""
    clone = tmp_path / "clone"
    (clone / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup.sh", clone / "scripts")
    for name in ("pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, clone)

    def interpreter(when="", then=""):
        """A python that answers `then` (shell) when its arguments contain `when`, else is the real one."""
        path = tmp_path / "python"
        lie = f'case "$*" in *"{when}"*) {then};; esac\n' if when else ""
        path.write_text(f'#!/bin/sh\n{lie}exec "{sys.executable}" "$@"\n')
        path.chmod(0o755)
        return str(path)

    def run(**environment):
        return subprocess.run(
            ["sh", str(clone / "scripts" / "setup.sh"), "demo"],
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    run.clone, run.interpreter = clone, interpreter
    return run


def assert_refused(done, *words):
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "\n  -> " in done.stderr
    for word in words:
        assert word in done.stderr


def test_an_old_interpreter(setup):
    old = setup.interpreter("version_info < (3, 10)", "exit 1")
    assert_refused(setup(PYTHON=old), "is too old; Python 3.10 or newer", "make demo PYTHON=")


def test_no_interpreter(setup):
    assert_refused(setup(PYTHON="python9"), "no interpreter 'python9'", "apt-get install python3")


def test_no_venv_module(setup):
    bare = setup.interpreter("import venv, ensurepip", "exit 1")
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    assert_refused(setup(PYTHON=bare), "cannot make environments", f"apt-get install {version}")
    assert not (setup.clone / ".venv").exists()


def test_a_full_disk(setup):
    full = setup.interpreter("disk_usage", "echo 1; exit 0")
    assert_refused(setup(PYTHON=full), "1 GB free", "needs 10 GB", "TORCH_INDEX=")
    assert_refused(setup(PYTHON=full, TORCH_INDEX="https://example.org"), "needs 5 GB")


def test_a_taken_port_comes_before_everything_that_takes_long(setup):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = setup(PYTHON=sys.executable, PORT=str(port))
    assert_refused(done, f"port {port} is in use", f"--port {port + 10}", "--no-serve")


def test_keeping_the_installed_torch_demands_one(setup):
    done = setup(PYTHON=sys.executable, SYSTEM_SITE="1", PIP_NO_INDEX="1")
    if done.returncode == 0 or "no torch in the range" not in done.stderr:
        pytest.skip("the interpreter behind this environment has a torch of its own")
    assert done.returncode == 2
    assert "leave SYSTEM_SITE out" in done.stderr
    assert not (setup.clone / ".venv").exists()


def test_the_second_time_is_a_checksum(setup):
    tools = setup.clone / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "reelhf").write_text("#!/bin/sh\n")
    (tools / "reelhf").chmod(0o755)
    stamp = subprocess.run(
        "cksum < pyproject.toml", shell=True, cwd=setup.clone, capture_output=True, text=True
    )
    (setup.clone / ".venv" / ".reelhf").write_text(stamp.stdout)
    broken = setup.interpreter("disk_usage", "exit 9")  # would fail if it went on
    done = setup(PYTHON=broken)
    assert (done.returncode, done.stderr) == (0, "")
    with open(setup.clone / "pyproject.toml", "a") as file:
        file.write("\n# a new dependency\n")
    assert setup(PYTHON=broken).returncode != 0


@pytest.mark.parametrize(
    ("arguments", "port"),
    [
        ("", "7860"),
        ("--port 8123", "8123"),
        ("--preset smoke --port=8124", "8124"),
        ("--no-serve", ""),
        ("--no-serve --port 8125", ""),
    ],
)
def test_make_checks_the_port_the_demo_will_use(setup, arguments, port):
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    (setup.clone / "scripts" / "setup.sh").write_text('echo "port=$PORT target=$1"; exit 1\n')
    done = subprocess.run(
        ["make", "demo", f"ARGS={arguments}"], cwd=setup.clone, capture_output=True, text=True
    )
    assert f"port={port} target=demo" in done.stdout

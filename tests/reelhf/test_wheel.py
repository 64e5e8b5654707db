"""The wheel carries what the checkout has, and runs the smoke demo from an empty environment elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("reelhf", "annotation", "generator", "rewards", "rlhf", "distill")

pytestmark = pytest.mark.slow


def run(*command, cwd=ROOT, timeout=300, **environment):
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    run(sys.executable, "-m", "pip", *build)
    return next(folder.glob("reelhf-*.whl"))


def test_the_wheel_holds_every_file_of_the_packages_and_configs_and_nothing_else(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = run("git", "ls-files", *PACKAGES, "configs").splitlines()
    expected = {
        name.replace("configs/", "reelhf/_configs/", 1) if name.startswith("configs/") else name
        for name in tracked
    }
    assert expected <= held
    assert {name.partition("/")[0] for name in held} == set(PACKAGES)


def test_an_empty_environment_with_the_wheel_passes_the_smoke_demo_elsewhere(wheel, tmp_path):
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel
    )
    # the dependencies of this environment, not downloaded again; its own editable reelhf stays out of sight
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    origin = run(python, "-c", "import rlhf; print(rlhf.__file__)", cwd=elsewhere)
    assert str(environment) in origin
    run(
        environment / "bin" / "reelhf",
        *("demo", "--preset", "smoke", "--no-serve", "--out", "runs/demo"),
        cwd=elsewhere,
        timeout=1200,
        REELHF_CACHE=str(tmp_path / "cache"),
    )
    report = elsewhere / "runs" / "demo" / "report.html"
    assert report.stat().st_size > 10_000

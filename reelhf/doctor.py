"""`reelhf doctor`: what works on this machine, what is missing, and the line that mends it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer

app = typer.Typer(help="What works on this machine, what is missing, the line that mends it.")

MIN_PYTHON = (3, 10)
MIN_FREE_GB = 3.0  # a standard demo writes under 1 GB; the rest is air for checkpoints
MIN_MEMORY_GB = 6.0  # what the standard demo stays under
MIN_SQLITE = (3, 35, 0)  # RETURNING
PAGE_PORT = 7860
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MARKS = {"ok": "ok      ", "optional": "optional", "missing": "MISSING "}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    state: Literal["ok", "optional", "missing"]
    name: str
    detail: str
    mend: str | None = None


@app.command()
def doctor() -> None:
    """Check this machine; exit code 1 if something that is needed is missing."""
    findings = list(examine())
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{MARKS[finding.state]}  {finding.name:<{width}}  {finding.detail}")
        if finding.mend:
            print(f"{'':<{width + 10}}  -> {finding.mend}")
    missing = [finding.name for finding in findings if finding.state == "missing"]
    print()
    if missing:
        print(f"{len(missing)} needed: {', '.join(missing)}")
        raise typer.Exit(1)
    print("everything that is needed works; next: reelhf demo --preset smoke")


def examine() -> Iterator[Finding]:
    """Every finding, cheap ones first."""
    checks: list[Callable[[], Finding]] = [
        check_python,
        check_packages,
        check_torch,
        check_accelerator,
        check_torchvision,
        check_training,
        check_video,
        check_memory,
        check_disk,
        check_database,
        check_port,
        check_browser,
    ]
    for check in checks:
        yield check()


def check_python() -> Finding:
    """The interpreter."""
    detail = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info >= MIN_PYTHON:
        return Finding("ok", "python", detail)
    return Finding(
        "missing",
        "python",
        detail,
        "install Python 3.10 or newer, then: make demo PYTHON=python3.12",
    )


def check_packages() -> Finding:
    """Every dependency, by its recorded version range."""
    from packaging.requirements import Requirement

    wrong = []
    requirements = [Requirement(line) for line in importlib.metadata.requires("reelhf") or []]
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in needed:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is outside {requirement.specifier}")
    if wrong:
        lines = " ".join(f"'{r}'" for r in needed if any(w.startswith(f"{r.name} ") for w in wrong))
        return Finding(
            "missing", "packages", "; ".join(wrong), f"{sys.executable} -m pip install {lines}"
        )
    return Finding("ok", "packages", f"all {len(needed)} dependencies in range")


def check_torch() -> Finding:
    """The torch build: CPU, CUDA or another."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding(
            "missing",
            "torch",
            _first_line(error),
            "make demo TORCH_INDEX=<index of a build for this machine>",
        )
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Finding(
        "ok", "torch", f"{torch.__version__}, {build}, {torch.get_num_threads()} threads"
    )


def check_accelerator() -> Finding:
    """A GPU that torch can use; nothing here needs one."""
    try:
        import torch
    except (ImportError, OSError):
        return Finding("optional", "accelerator", "unknown without torch")
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        name = torch.cuda.get_device_name(0)
        return Finding(
            "ok", "accelerator", f"{torch.cuda.device_count()} x {name}, {memory:.0f} GB each"
        )
    if shutil.which("nvidia-smi"):
        return Finding(
            "optional",
            "accelerator",
            "an NVIDIA driver is here, but this torch cannot use it",
            "rm -rf .venv && make demo TORCH_INDEX=<a CUDA wheel index of PyTorch>",
        )
    return Finding("ok", "accelerator", f"none; the demo runs on the CPU ({os.cpu_count()} cores)")


def check_torchvision() -> Finding:
    """We do not use it, but a build that does not match torch breaks transformers."""
    if importlib.util.find_spec("torchvision") is None:
        return Finding("ok", "torchvision", "absent, and not needed")
    done = subprocess.run(
        [sys.executable, "-c", "import torchvision"], capture_output=True, text=True, timeout=120
    )
    if done.returncode == 0:
        return Finding("ok", "torchvision", "present and working; not needed")
    reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "does not import"
    return Finding(
        "missing",
        "torchvision",
        f"broken: {reason}",
        f"{sys.executable} -m pip uninstall -y torchvision",
    )


def check_training() -> Finding:
    """One optimizer step through DeepSpeed."""
    try:
        import torch
        from torch import nn

        from reelhf.engine import Engine, EngineConfig, OptimizerConfig

        engine = Engine(nn.Linear(2, 1), OptimizerConfig(lr=1e-3), EngineConfig(micro_batch_size=1))
        engine.backward(
            engine(torch.ones(1, 2, device=next(engine.module.parameters()).device)).sum()
        )
        engine.step()
    except Exception as error:  # whatever it is, it is the finding
        return Finding(
            "missing",
            "training",
            _first_line(error),
            "DS_BUILD_OPS=0 pip install --force-reinstall deepspeed",
        )
    version = importlib.metadata.version("deepspeed")
    return Finding("ok", "training", f"DeepSpeed {version} took a step")


def check_video() -> Finding:
    """H.264 and VP9, written and read back."""
    try:
        import torch

        from reelhf.video import probe_video, write_video

        with tempfile.TemporaryDirectory() as folder:
            for suffix in (".mp4", ".webm"):
                clip = Path(folder) / f"clip{suffix}"
                write_video(clip, torch.zeros(3, 4, 16, 16), 8)
                assert probe_video(clip).frames == 4
    except Exception as error:
        return Finding(
            "missing",
            "video",
            _first_line(error),
            f"{sys.executable} -m pip install --force-reinstall av",
        )
    return Finding("ok", "video", "H.264 and VP9 encode and decode")


def check_memory() -> Finding:
    """Memory the system says is available."""
    with contextlib.suppress(OSError):
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if match:
            available = int(match[1]) / 2**20
            state: Literal["ok", "optional"] = "ok" if available >= MIN_MEMORY_GB else "optional"
            mend = None if state == "ok" else "close other programs, or: reelhf demo --preset smoke"
            return Finding(state, "memory", f"{available:.1f} GB available", mend)
    return Finding("ok", "memory", "not reported by this system")


def check_disk() -> Finding:
    """Room for runs in the working directory."""
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if free >= MIN_FREE_GB:
        return Finding("ok", "disk", f"{free:.0f} GB free in {Path.cwd()}")
    return Finding(
        "missing",
        "disk",
        f"{free:.1f} GB free in {Path.cwd()}, {MIN_FREE_GB:g} GB needed",
        "free some, or use --out ON/ANOTHER/DISK",
    )


def check_database() -> Finding:
    """SQLite, with the journal mode the annotation store uses."""
    if sqlite3.sqlite_version_info < MIN_SQLITE:
        return Finding(
            "missing",
            "database",
            f"SQLite {sqlite3.sqlite_version} is too old",
            "use a Python built with SQLite 3.35 or newer",
        )
    with tempfile.TemporaryDirectory(
        dir=Path.cwd() if os.access(Path.cwd(), os.W_OK) else None
    ) as folder:
        connection = sqlite3.connect(Path(folder) / "check.db")
        mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        connection.close()
    if mode != "wal":
        return Finding(
            "missing",
            "database",
            f"SQLite cannot keep a write-ahead log in {Path.cwd()}",
            "work on a local disk, not a network share",
        )
    return Finding("ok", "database", f"SQLite {sqlite3.sqlite_version}, write-ahead log works here")


def check_port() -> Finding:
    """Whether the pages' usual port is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PAGE_PORT))
        except OSError:
            return Finding("optional", "port", f"{PAGE_PORT} is in use", "reelhf demo --port 7870")
    return Finding("ok", "port", f"{PAGE_PORT} is free")


def check_browser() -> Finding:
    """Chromium, for the browser tests only; people open the pages in their own."""
    for name in CHROMIUM_NAMES:
        if path := shutil.which(name):
            return Finding("ok", "browser", f"{path} (only the browser tests use it)")
    return Finding(
        "optional",
        "browser",
        "no Chromium; only the browser tests need it",
        "apt-get install chromium",
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"

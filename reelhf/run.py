"""A run folder: everything one training run leaves behind, written so that a crash loses nothing.

    runs/<name>/config.yaml                 the resolved config
                environment.json            per attempt: versions, commit, uncommitted changes
                metrics.jsonl               one line per step, append-only, with the attempt
                samples/step_000010/*.mp4
                checkpoints/step_000010/    written aside, sealed with sha256 sums, then renamed

On several processes every rank opens the folder; only rank 0 writes to it, except inside the
`write` callback of a checkpoint.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reelhf.config import Config, to_yaml
from reelhf.errors import UserError
from reelhf.hashing import sha256_file

MANIFEST = "manifest.json"
RECORDED_PACKAGES = ("reelhf", "torch", "deepspeed", "transformers", "trl", "peft", "gradio", "av")
MAX_DIFF_CHARACTERS = 200_000


class RunFolder:
    """The run folder, opened for one attempt at the run."""

    def __init__(self, path: Path, attempt: int) -> None:
        self.path = path
        self.attempt = attempt

    @classmethod
    def open(cls, path: str | Path, config: Config, *, resume: bool = True) -> RunFolder:
        """Create or reopen a run folder and record this attempt.

        Args:
            resume: False refuses a folder that already holds a run.
        Raises: UserError if the folder cannot be written, or holds a run and `resume` is False.
        """
        path = Path(path)
        earlier = _read_attempts(path)
        if earlier and not resume:
            raise UserError(
                f"{path} already holds a run; choose another folder, or resume the one that is there."
            )
        run = cls(path, len(earlier) + 1)
        _barrier()  # every rank counted the attempts before rank 0 adds one
        if _is_main():
            try:
                (path / "checkpoints").mkdir(parents=True, exist_ok=True)
                write_text_atomic(path / "config.yaml", to_yaml(config))
                write_text_atomic(
                    path / "environment.json",
                    json.dumps([*earlier, _environment(run.attempt)], indent=2) + "\n",
                )
                _end_torn_line(path / "metrics.jsonl")
            except OSError as error:
                raise UserError(
                    f"cannot write to the run folder {path}: {error.strerror}; "
                    "choose another with --out, or make it writable."
                ) from None
        _barrier()
        return run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line of metrics and flush it."""
        if not _is_main():
            return
        line = {"step": step, "attempt": self.attempt, "time": round(time.time(), 3)}
        line |= {name: float(value) for name, value in metrics.items()}
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def sample_path(self, step: int, name: str) -> Path:
        """Where a sample of this step goes; its folder is made."""
        folder = self.path / "samples" / f"step_{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def save_checkpoint(
        self, step: int, write: Callable[[Path], None], *, keep: int | None = None
    ) -> Path:
        """Write a checkpoint aside, seal it, and rename it into place.

        Args:
            write: called by every rank with the same temporary folder.
            keep: how many checkpoints remain afterwards, newest first; None keeps them all.
        """
        root = self.path / "checkpoints"
        final, aside = root / f"step_{step:06d}", root / f".writing_step_{step:06d}"
        if _is_main():
            shutil.rmtree(aside, ignore_errors=True)  # left behind by an attempt that was killed
            aside.mkdir(parents=True)
        _barrier()
        write(aside)
        _barrier()
        if _is_main():
            seal(aside)
            if final.exists():
                shutil.rmtree(final)
            os.replace(aside, final)
            _fsync_folder(root)
            if keep is not None:
                for _, old in self._checkpoints()[: -max(keep, 1)]:
                    shutil.rmtree(old)
        _barrier()
        return final

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """Step and folder of the newest checkpoint, verified, or None before the first.

        Raises: UserError naming the file if the checkpoint is damaged.
        """
        checkpoints = self._checkpoints()
        if not checkpoints:
            return None
        step, folder = checkpoints[-1]
        verify(folder)
        return step, folder

    def _checkpoints(self) -> list[tuple[int, Path]]:
        folders = (self.path / "checkpoints").glob("step_*")
        return sorted((int(folder.name.removeprefix("step_")), folder) for folder in folders)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The metrics of a run, one dict per step in step order; a repeated step keeps its last attempt.

    Args:
        path: a run folder or its metrics.jsonl. A line cut short by a crash is left out.
    """
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"no metrics at {file}; expected a run folder, such as runs/demo/rlhf_base."
        )
    by_step: dict[int, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line an attempt wrote before it was killed
        known = by_step.get(row["step"])
        if known is None or row["attempt"] >= known["attempt"]:
            by_step[row["step"]] = row
    return [by_step[step] for step in sorted(by_step)]


def seal(folder: str | Path) -> None:
    """Write `manifest.json`: size and sha256 of every file under the folder, all flushed to disk."""
    folder = Path(folder)
    files: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name != MANIFEST:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            files[name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    write_text_atomic(folder / MANIFEST, json.dumps({"files": files}, indent=2) + "\n")


def verify(folder: str | Path) -> None:
    """Check a sealed folder against its manifest.

    Raises: UserError naming the first file that is missing, cut short or changed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}; expected a saved model or checkpoint.")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {MANIFEST}: it was not written completely, or is not ours."
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(
            f"{folder / MANIFEST} is damaged; restore the folder, or delete it."
        ) from None
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(
                f"{file} is missing, though {MANIFEST} lists it; restore or delete {folder}."
            )
        size = file.stat().st_size
        if size < expected["bytes"]:
            raise UserError(
                f"{file} was cut short: {size} of {expected['bytes']} bytes; restore or delete {folder}."
            )
        if sha256_file(file) != expected["sha256"]:
            raise UserError(f"{file} has changed since it was saved; restore or delete {folder}.")


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a whole file or nothing: aside, flushed to disk, then renamed."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _read_attempts(path: Path) -> list[dict[str, Any]]:
    file = path / "environment.json"
    if not file.is_file():
        return []
    try:
        attempts = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        raise UserError(f"{file} is damaged; restore it, or choose another run folder.") from None
    return list(attempts)


def _end_torn_line(metrics: Path) -> None:
    """A kill can leave half a line; end it, so that the next line starts on its own."""
    if metrics.is_file() and metrics.stat().st_size:
        with open(metrics, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _environment(attempt: int) -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    diff = _git("diff", "HEAD")
    return {
        "attempt": attempt,
        "time": round(time.time(), 3),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "cpu_count": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "commit": _git("rev-parse", "HEAD"),
        "diff": None if diff is None else diff[:MAX_DIFF_CHARACTERS],
        "diff_cut": diff is not None and len(diff) > MAX_DIFF_CHARACTERS,
    }


def _git(*arguments: str) -> str | None:
    """Output of git in the source tree, or None outside a clone."""
    source = Path(__file__).resolve().parent.parent
    if not (source / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(source), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _barrier() -> None:
    """Wait for the other ranks, if there are any; torch is not imported for a single process."""
    if "torch" in sys.modules and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.barrier()


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

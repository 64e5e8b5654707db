"""Stages that are run once: a result is kept under a hash of everything it came from.

A stage is one function call that fills one folder. Its key covers its config, the keys of the stages it reads, the content of the
files it reads, and the source of every module its function can reach by imports. So a second run skips what is already there, an
edit to one file redoes exactly what depends on it, and an interrupted stage finds its own folder again and resumes in it.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import functools
import json
import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reelhf.errors import UserError
from reelhf.hashing import content_hash

PACKAGES = ("reelhf", "annotation", "generator", "rewards", "distill", "rlhf")
_MODULE_NAME = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+(?::\w+)?")
_SAMPLE_SECONDS = 0.25  # how often the memory of this process and its children is read


class StageFailed(RuntimeError):
    """A stage stopped with an error that is not the user's input; `str` says which, what and how to resume."""


@dataclass(frozen=True)
class Stage:
    """What a finished stage left behind."""

    name: str
    key: str
    folder: Path
    """The stage's folder in the cache; `path` lies in it."""
    path: Path
    """What the stage's function returned: the folder or file that later stages read."""
    seconds: float
    """Wall time of the attempt that finished it."""
    peak_bytes: int
    """Largest resident memory of this process and its children during that attempt."""
    attempts: int = 1
    """How often it was started; above 1 it was interrupted and resumed."""
    beside_seconds: float = 0.0
    """How many of its seconds an earlier finished stage was at work too: the whole took the sum of `seconds` less these."""
    cached: bool = False
    """True when this run found it finished."""


@dataclass
class StageRunner:
    """Runs stages in order, skips the finished ones, and keeps the time and memory of each."""

    cache: Path
    budget: Mapping[str, float] = field(default_factory=dict)
    """Seconds each stage may take, by name; only printed and reported, never enforced."""
    echo: Callable[[str], None] = print
    links: Path | None = None
    """A folder that gets a symbolic link per stage, so that a run's folder shows everything it used."""
    stages: dict[str, Stage] = field(default_factory=dict)
    _numbers: dict[str, int] = field(default_factory=dict, repr=False)
    _worked: list[tuple[float, float]] = field(default_factory=list, repr=False)
    """When each stage of this run began and ended."""

    @property
    def seconds(self) -> float:
        """How long all stages took, those side by side counted once."""
        return sum(stage.seconds - stage.beside_seconds for stage in self.stages.values())

    def run(
        self,
        name: str,
        function: Callable[[Path], Path | None],
        *,
        config: object = None,
        inputs: Mapping[str, Any] | None = None,
        source: str | tuple[str, ...],
    ) -> Stage:
        """Run `function(result_folder)` unless its result is already there.

        Args:
            name: unique in this run; the prefix of the cache folder.
            function: fills the folder it is given and returns what later stages read (the folder itself when None). It must
                continue in a folder that an interrupted attempt left half full.
            config: hashed; a pydantic model or anything json-able.
            inputs: hashed; a `Stage` by its key, a path by its content, anything else as json.
            source: the module or modules whose code the result depends on, with all they import.
        Raises: UserError for bad input and StageFailed for anything else, both naming the stage and how to resume.
        """
        modules = (source,) if isinstance(source, str) else source
        described = {k: v.key if isinstance(v, Stage) else v for k, v in (inputs or {}).items()}
        key = content_hash(name, config, described, source_digest(*modules))[:16]
        folder = self.cache / "stages" / f"{name}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock", name, self.echo):
            stage = _read_stage(folder, name, key)
            if stage is None:
                stage = self._attempt(name, key, folder, function)
            else:
                self.echo(f"{self._label(name)} from cache (took {stage.seconds:.0f} s)")
        self.stages[name] = stage
        if self.links is not None:
            _link(self.links / name, stage.path)
        return stage

    def adopt(self, name: str, path: Path, *, key: str, seconds: float) -> Stage:
        """Record a stage that this runner did not run: what a person did, under a key of what they said."""
        now = time.monotonic()
        self._worked.append((now - seconds, now))
        stage = Stage(name, key, path, path, seconds, resident_bytes())
        self.stages[name] = stage
        self._label(name)  # it has a number too
        return stage

    def _attempt(
        self, name: str, key: str, folder: Path, function: Callable[[Path], Path | None]
    ) -> Stage:
        result, attempts_file = folder / "result", folder / "attempts"
        attempts = (int(attempts_file.read_text()) if attempts_file.exists() else 0) + 1
        attempts_file.write_text(str(attempts))
        budget = f", budget {self.budget[name]:.0f} s" if name in self.budget else ""
        self.echo(
            f"{self._label(name)} {'running' if attempts == 1 else f'resuming (attempt {attempts})'}{budget}"
        )
        started = time.monotonic()
        resume = "run the same command again: finished stages are skipped and this one continues where it can"
        try:
            with PeakMemory() as memory:
                path = function(result) or result
        except UserError as error:
            raise UserError(f"stage '{name}': {error}") from error
        except Exception as error:
            (folder / "failure.txt").write_text(traceback.format_exc())
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise StageFailed(
                f"stage '{name}' failed: {what} (traceback in {folder / 'failure.txt'}); {resume}"
            ) from error
        ended = time.monotonic()
        beside = sum(max(0.0, min(ended, b) - max(started, a)) for a, b in self._worked)
        self._worked.append((started, ended))
        stage = Stage(
            name, key, folder, Path(path), ended - started, memory.peak_bytes, attempts, beside
        )
        record = asdict(stage) | {
            "folder": ".",
            "path": os.path.relpath(stage.path, folder),
            "cached": True,
        }
        aside = folder / "stage.json.part"
        aside.write_text(json.dumps(record, indent=1))
        aside.replace(folder / "stage.json")
        over = name in self.budget and stage.seconds > self.budget[name]
        self.echo(
            f"{self._label(name)} done in {stage.seconds:.0f} s{' (over budget)' if over else ''}, "
            f"peak memory {stage.peak_bytes / 1e9:.1f} GB"
        )
        return stage

    def _label(self, name: str) -> str:
        number = self._numbers.setdefault(name, len(self._numbers) + 1)
        return f"[{number:2d}] {name:<22}"


def _read_stage(folder: Path, name: str, key: str) -> Stage | None:
    marker = folder / "stage.json"
    if not marker.exists():
        return None
    record = json.loads(marker.read_text())
    path = (folder / record["path"]).resolve() if record["path"] != "." else folder
    if not path.exists():  # somebody cleaned the cache by hand: do it again rather than fail later
        marker.unlink()
        return None
    return Stage(
        **(record | {"name": name, "key": key, "folder": folder, "path": path, "cached": True})
    )


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    if not link.exists():  # a real folder of that name belongs to the user
        link.symlink_to(target.resolve())


@contextlib.contextmanager
def _locked(path: Path, name: str, echo: Callable[[str], None]) -> Iterator[None]:
    """Hold the stage for this process; a second run of the same stage waits and then finds it finished."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            echo(f"waiting for another run that is working on '{name}'")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class PeakMemory:
    """Largest resident memory of this process and its children while the block runs, in bytes (Linux; 0 elsewhere)."""

    def __enter__(self) -> PeakMemory:
        self.peak_bytes = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, resident_bytes())


def resident_bytes(pid: int | None = None) -> int:
    """Resident memory of a process (this one by default) and its children, in bytes; 0 where /proc is absent."""
    proc = Path("/proc") / str(pid or os.getpid())
    try:
        total = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        children = " ".join(f.read_text() for f in (proc / "task").glob("*/children")).split()
    except (
        OSError,
        ValueError,
        IndexError,
    ):  # the process ended while it was read, or there is no /proc
        return 0
    return total + sum(resident_bytes(int(child)) for child in children)


def source_digest(*modules: str) -> str:
    """One hash of the source of `modules` and of everything of ours that they import, directly or not."""
    reached: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in reached or _source_file(module) is None:
            continue
        reached.add(module)
        waiting += _imports(module)
    parents = {module.rpartition(".")[0] for module in reached} - reached - {""}
    files = {module: _source_file(module) for module in reached | parents}
    return content_hash(
        *[[m, file.read_text()] for m, file in sorted(files.items()) if file is not None]
    )


@functools.cache
def _source_file(module: str) -> Path | None:
    """The file of one of our modules, or None when there is no such module."""
    top, _, rest = module.partition(".")
    spec = find_spec(top) if top in PACKAGES else None
    if spec is None or not spec.submodule_search_locations:
        return None
    base = (
        Path(spec.submodule_search_locations[0], *rest.split("."))
        if rest
        else Path(spec.submodule_search_locations[0])
    )
    for file in (base / "__init__.py", base.with_suffix(".py")):
        if file.is_file():
            return file
    return None


@functools.cache
def _imports(module: str) -> tuple[str, ...]:
    """Our modules named in one module: import statements anywhere in it, and strings such as "rewards.motion:MotionReward".

    `from generator import load_generator` names the package itself, whose lazy table is then followed in full;
    `from generator.flow import x` does not.
    """
    file = _source_file(module)
    assert file is not None
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            base = ".".join([*parents, *([node.module] if node.module else [])])
            submodules = {f"{base}.{alias.name}" for alias in node.names}
            real = {name for name in submodules if _source_file(name) is not None}
            found |= real if real == submodules else real | {base}
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and _MODULE_NAME.fullmatch(node.value)
        ):
            found.add(node.value.partition(":")[0])
    return tuple(sorted(name for name in found if name.partition(".")[0] in PACKAGES))

"""Imports point one way, gold stays out of training, and the command line starts light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from reelhf.cli import VERBS

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {  # package -> what else of ours it may import, as module prefixes
    "reelhf": (),
    "annotation": ("reelhf",),
    "generator": ("reelhf",),
    "rewards": ("reelhf", "annotation.records"),
    "distill": ("reelhf", "generator", "rewards", "annotation.records"),
    "rlhf": ("reelhf", "annotation", "generator", "rewards", "distill"),
}
GOLD = "generator.toygold"
SEES_GOLD = {  # simulated people, and the comparison after the fact; nothing that trains or selects
    "rlhf/simulated.py",
    "rlhf/compare.py",
    "rlhf/commands.py",
    "rlhf/world.py",
}
HEAVY = {
    "torch",
    "deepspeed",
    "transformers",
    "trl",
    "peft",
    "gradio",
    "av",
    "numpy",
    "pyarrow",
    "matplotlib",
}


def imported_modules(file: Path) -> Iterator[str]:
    """Every module a file imports, at its top or inside a function, with `from` names joined."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            target = node.value.partition(":")[0]  # "package.module:name", imported when used
            if ":" in node.value and target.replace(".", "").isidentifier() and "." in target:
                yield target


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    front_door = ROOT / "reelhf" / "cli.py"  # its table of strings points up on purpose
    wrong = [
        f"{file.relative_to(ROOT)} imports {module}"
        for file in sources(package)
        if file != front_door
        for module in imported_modules(file)
        if within(module, tuple(ALLOWED)) and not within(module, (package, *ALLOWED[package]))
    ]
    assert wrong == []


def test_gold_is_out_of_reach_of_training_and_selection():
    seen = {
        str(file.relative_to(ROOT))
        for package in ALLOWED
        for file in sources(package)
        if any(within(module, (GOLD,)) for module in imported_modules(file))
    }
    assert seen <= SEES_GOLD


def test_nothing_imports_torchvision():
    for package in ALLOWED:
        for file in sources(package):
            assert not any(within(module, ("torchvision",)) for module in imported_modules(file)), (
                file
            )


def test_the_detector_sees_what_it_should(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "generator").mkdir()
    file = tmp_path / "generator" / "bad.py"
    file.write_text(
        "def f():\n    from rlhf import demo\n    from . import toygold\nX = 'rewards.train:go'\n"
    )
    assert set(imported_modules(file)) == {"rlhf.demo", "generator.toygold", "rewards.train"}


def loaded_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after one statement."""
    code = f"{statement}\nimport sys, json; print(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_help_imports_nothing_heavy():
    assert not loaded_after("from reelhf.cli import main; main(['--help'])") & (
        HEAVY | {"pydantic", "typer"}
    )


@pytest.mark.parametrize("verb", VERBS)
def test_the_commands_of_a_verb_import_nothing_heavy(verb):
    assert not loaded_after(f"import {VERBS[verb].app.partition(':')[0]}") & HEAVY


NEWER_THAN_3_10 = {
    *(
        f"typing.{name}"
        for name in (
            "Self",
            "Never",
            "assert_never",
            "Required",
            "NotRequired",
            "Unpack",
            "override",
        )
    ),
    *("tomllib", "enum.StrEnum", "datetime.UTC", "itertools.batched", "hashlib.file_digest"),
}


def test_nothing_needs_a_python_newer_than_the_oldest_we_promise():
    wrong = [
        f"{file.relative_to(ROOT)} imports {module}"
        for package in ALLOWED
        for file in sources(package)
        for module in imported_modules(file)
        if within(module, tuple(NEWER_THAN_3_10))
    ]
    assert wrong == []

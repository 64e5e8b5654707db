"""Tiny pipelines on disk, one folder per family and session."""

from __future__ import annotations

from pathlib import Path

import pytest

from reelhf.progress import silence_transformers
from tests.generator.adapters import tiny_pipes


@pytest.fixture(scope="session")
def pipe_folder(tmp_path_factory):
    """pipe_folder("wan") -> the folder of that tiny pipeline, written once by diffusers itself."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            silence_transformers()
            made[name] = tmp_path_factory.mktemp("pipes") / name
            tiny_pipes.PIPES[name]().save_pretrained(made[name])
        return made[name]

    return folder

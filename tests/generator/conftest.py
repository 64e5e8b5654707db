"""The tiny generator of `tiny_parts.py` as fixtures."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.generator.tiny_parts import make_generator, make_vae_and_text, render_clips


@pytest.fixture(scope="session")
def tiny_parts():
    """VAE and text encoder."""
    return make_vae_and_text()


@pytest.fixture
def tiny_generator(tiny_parts):
    """tiny_generator(role="base", size=32) -> DiTGenerator."""
    return partial(make_generator, *tiny_parts)


@pytest.fixture(scope="session")
def tiny_clips(tmp_path_factory) -> Path:
    """A folder of rendered clips with captions."""
    return render_clips(tmp_path_factory.mktemp("clips") / "toy")


@pytest.fixture(scope="session")
def tiny_folders(tiny_parts, tmp_path_factory) -> tuple[Path, Path]:
    """The VAE and the text encoder on disk."""
    root = tmp_path_factory.mktemp("parts")
    vae, text = tiny_parts
    return vae.save(root / "vae"), text.save(root / "text")

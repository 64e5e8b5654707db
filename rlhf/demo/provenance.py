"""Where a result came from: the machine and the source."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def machine() -> str:
    """Cores, processor and torch in one line."""
    import torch

    model = platform.processor() or platform.machine()
    return f"{os.cpu_count()} CPU cores ({model}), torch {torch.__version__}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """Short commit of the source, with a plus sign when files differ from it; None outside a clone."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return None
    try:
        head = _git(source, "rev-parse", "--short", "HEAD")
        return head + ("+" if _git(source, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(source: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(source), *words], capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()

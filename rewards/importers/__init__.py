"""Published judgments of video, as preference data that rewards train on and are measured with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rewards.importers.tables import ImportedTask

READERS = {
    "fetv": "rewards.importers.fetv:read_fetv",
    "videoalign": "rewards.importers.videoalign:read_videoalign",
    "videogen-rewardbench": "rewards.importers.videoalign:read_videogen_rewardbench",
    "genai-bench": "rewards.importers.genai:read_genai_bench",
}
"""Name of a published format -> how its file becomes tasks."""


def reader(name: str) -> Callable[[Path], Sequence[ImportedTask]]:
    """The reader of a format. Raises UserError naming the known ones."""
    from reelhf.errors import UserError, did_you_mean

    if name not in READERS:
        raise UserError(
            f"format {name!r}; expected one of {', '.join(READERS)}.{did_you_mean(name, READERS)}"
        )
    module, function = READERS[name].split(":")
    return getattr(import_module(module), function)

"""What the tests of this room share beside fixtures."""

from __future__ import annotations

from pathlib import Path

from annotation.presentation import PresentationConfig
from annotation.records import Choice, ClipRecord, TaskView, Verdict

SMALL = PresentationConfig(min_side=32)
PASSWORD = "correct horse"
NUM_PROMPTS = 3


class Clock:
    """A clock that tests turn by hand."""

    def __init__(self) -> None:
        self.seconds = 1_800_000_000.0

    def __call__(self) -> float:
        return self.seconds


def records(files: list[Path]) -> list[ClipRecord]:
    return [
        ClipRecord(
            path,
            f"Prompt number {index // 4}: something {['red', 'green', 'blue'][index // 4]} moves.",
            model=f"secretmodel{index % 4}",
            stage=f"secretstage{index % 2}",
            seed=index,
        )
        for index, path in enumerate(files)
    ]


def plain_verdict(task: TaskView, best: int = 0, worst: int = 1) -> Verdict:
    """The same pair in every dimension: always admissible."""
    return Verdict(tuple(Choice(d, best, worst) for d in task.dimensions), seconds=4.0)

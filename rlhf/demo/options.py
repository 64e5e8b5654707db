"""What the command line asked for, as one object."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reelhf.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from rlhf.rounds import LoopConfig

PRESETS = {"standard": "configs/loop/demo_standard.yaml", "smoke": "configs/loop/demo_smoke.yaml"}
ANNOTATORS = ("simulated", "human")
DEFAULT_PORT = 7860


@dataclass(frozen=True)
class DemoOptions:
    """What the command line asked for. Raises UserError for words that are unknown or contradict each other."""

    preset: str | None = "standard"
    """None when `config` names a file instead."""
    config: str | None = None
    annotator: str = "simulated"
    clips: Path | None = None
    serve: bool = True
    port: int = DEFAULT_PORT
    """Of the annotation page; the review page takes the next one."""
    out: Path = Path("runs/demo")
    top_up: bool = False
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise UserError(
                f"preset '{self.preset}'; expected {' or '.join(PRESETS)}.{did_you_mean(self.preset, PRESETS)}"
            )
        if self.annotator not in ANNOTATORS:
            raise UserError(
                f"annotator '{self.annotator}'; expected {' or '.join(ANNOTATORS)}."
                f"{did_you_mean(self.annotator, ANNOTATORS)}"
            )
        if self.top_up and self.annotator != "human":
            raise UserError("--top-up adds simulated votes to yours; it needs --annotator human")
        if self.top_up and self.clips is not None:
            raise UserError(
                "--top-up simulates votes from the toy world's gold; real clips have none"
            )
        if self.annotator == "human" and not self.serve:
            raise UserError("--annotator human needs the annotation page; leave out --no-serve")

    @property
    def command_line(self) -> str:
        """The line to type for the same results."""
        if self.preset is None:
            words = ["reelhf", "rlhf", "loop", str(self.config), *self.overrides]
        else:
            words = ["reelhf", "demo", *self.overrides, "--preset", self.preset]
        words += ["--annotator", self.annotator] if self.annotator != "simulated" else []
        words += ["--clips", str(self.clips)] if self.clips else []
        words += ["--top-up"] if self.top_up else []
        return shlex.join([*words, "--out", str(self.out)])


def load_loop_config(options: DemoOptions) -> LoopConfig:
    """The config that the preset or the command line names, with its overrides."""
    from reelhf.config import load_config
    from rlhf.rounds import LoopConfig

    path = options.config if options.preset is None else PRESETS[options.preset]
    return load_config(LoopConfig, path, options.overrides)

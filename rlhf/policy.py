"""What an RLHF run keeps: its state for a resume, and the policy as a generator folder."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from reelhf import training
from reelhf.engine import Ema, Engine, barrier, device, is_main, rng_state, set_rng_state
from reelhf.errors import UserError
from reelhf.run import RunFolder
from rlhf.hacking import HackingMonitor

if TYPE_CHECKING:
    from generator.base import VideoBackbone


@dataclass
class TrainState:
    """What a resumed run must know beside weights, optimizer, EMA, RNG and the monitor."""

    step: int = 0
    cursor: int = 0
    """Clips taken from the prompt list so far, over all processes."""
    best_score: float | None = None
    best_step: int = 0
    first: dict[str, float] | None = None
    """Validation metrics at the start: gains are measured from here."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Content hashes of the generator, the rewards, and whatever else the run began with."""


def save_state(
    folder: Path, engine: Engine, ema: Ema, monitor: HackingMonitor, state: TrainState
) -> None:
    """One checkpoint: weights and optimizer, the RNG of every process, counters, monitor, EMA."""
    client = {"state": asdict(state), "monitor": monitor.state_dict(), "rng": rng_state()}
    training.save_state(folder, engine, ema, client)


def load_state(
    run: RunFolder, engine: Engine, ema: Ema, monitor: HackingMonitor, inputs: dict[str, str]
) -> TrainState:
    """The state of the newest checkpoint, or a fresh one; UserError if the run began with other inputs."""
    found = run.latest_checkpoint()
    if found is None:
        return TrainState(inputs=inputs)
    client = training.load_state(found[1], engine, ema)
    state = TrainState(**client["state"])
    for name in sorted(inputs.keys() | state.inputs.keys()):
        if inputs.get(name) != state.inputs.get(name):
            raise UserError(
                f"{run.path} holds a run that began with another '{name}'; choose another --out, or give it the same"
            )
    monitor.load_state_dict(client["monitor"])
    set_rng_state(client["rng"])
    return state


def save_policy(backbone: VideoBackbone, denoiser: nn.Module, folder: Path) -> None:
    """Write a generator folder with these weights: aside, then swapped in."""
    if is_main():
        aside, old = (
            folder.with_name(f".{folder.name}.new"),
            folder.with_name(f".{folder.name}.old"),
        )
        for leftover in (aside, old):  # of an attempt that was killed here
            shutil.rmtree(leftover, ignore_errors=True)
        trained, backbone.denoiser = backbone.denoiser, denoiser
        try:
            backbone.save(aside)
        finally:
            backbone.denoiser = trained
        if folder.exists():
            os.replace(folder, old)
        os.replace(aside, folder)
        shutil.rmtree(old, ignore_errors=True)
    barrier()


def move_to_device(model: VideoBackbone | None) -> None:
    """Our generators know how to move; an adapter that does not stays where it was built."""
    if model is not None and hasattr(model, "to"):
        model.to(device())

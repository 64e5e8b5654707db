"""Checkpoints within a training: where they lie, whose they are, which one to go on from."""

from __future__ import annotations

from pathlib import Path

from reelhf.errors import UserError
from rewards.training.trainer import OUR_STATE

IDENTITY = "identity.sha256"


def open_checkpoints(folder: Path, identity: str) -> Path | None:
    """The newest complete checkpoint of this very training, None when there is none yet; UserError for another training's."""
    from reelhf.engine import barrier, is_main
    from reelhf.run import write_text_atomic

    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / IDENTITY
    if mark.is_file() and mark.read_text() != identity:
        raise UserError(
            f"{folder} holds checkpoints of a training with other settings, verdicts or backbones; "
            "choose another --out, or delete it to start anew"
        )
    barrier()  # every process has read the mark before one writes it
    if is_main() and not mark.is_file():
        write_text_atomic(mark, identity)
    complete = [
        path
        for path in folder.glob("checkpoint-*")
        if (path / "trainer_state.json").is_file() and (path / OUR_STATE.format(rank=0)).is_file()
    ]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

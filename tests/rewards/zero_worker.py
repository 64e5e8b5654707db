"""Trains tiny rewards on whatever processes launched this file: `zero_worker.py ROOT OUT STOP key=value ...`.

STOP is `never`, or `NAME:N`: training the reward of the class NAME ends with an error in its N-th loss.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


def launch(
    root: Path, out: Path, processes: int, *words: str, stop: str = "never"
) -> subprocess.CompletedProcess[str]:
    """Run this file on several processes of this machine and wait for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*command, f"--master_port={port}", __file__, *map(str, (root, out, stop)), *words],
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=580,
    )
    log = (done.stdout + done.stderr)[-3000:]
    assert (done.returncode == 0) == (stop == "never"), log
    assert stop == "never" or "Stopped by the test" in done.stderr, log
    return done


def stop_at(name: str, call: int) -> None:
    """Have a training of the class `name` fail in the `call`-th loss."""
    from rewards.training import trainer

    own, calls = trainer.preference_loss, [0]

    def stopped(model: Any, *arguments: Any, **options: Any) -> Any:
        calls[0] += type(getattr(model, "module", model)).__name__ == name
        if calls[0] == call:
            raise RuntimeError("Stopped by the test")
        return own(model, *arguments, **options)

    trainer.preference_loss = stopped


def main() -> None:
    import torch

    from reelhf.cli_config import read_config_words
    from rewards.train import train_rewards
    from rewards.training.config import RewardTrainConfig

    torch.set_num_threads(1)
    root, out, stop = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if stop != "never":
        name, _, call = stop.partition(":")
        stop_at(name, int(call))
    config = read_config_words(RewardTrainConfig, sys.argv[4:])
    train_rewards(config, root / "data", root / "backbones", out, splits=None)


if __name__ == "__main__":
    main()

"""Staged runs outside the test process: `staged_worker.py SCENARIOS.json`, alone or under torchrun."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from generator.parallel import FrameShards
from generator.training.denoiser import DenoiserTrainConfig
from generator.training.progressive import train_stages
from reelhf.engine import Engine, is_main
from reelhf.run import RunFolder


def record_gradients(patch: pytest.MonkeyPatch, file: Path) -> None:
    """Keep the gradients of the first step as ZeRO-0 has reduced them, before clipping."""
    step = Engine.step

    def recording(engine: Engine) -> dict[str, float]:
        if is_main() and not file.exists() and engine._engine.is_gradient_accumulation_boundary():
            named = engine.module.named_parameters()
            torch.save({n: p.grad.clone() for n, p in named if p.grad is not None}, file)
        return step(engine)

    patch.setattr(Engine, "step", recording)


def count_shared_attention(patch: pytest.MonkeyPatch, file: Path) -> None:
    """Keep how often attention between frames ran over several processes."""
    attention = FrameShards.window_attention
    file.write_text("0")

    def counting(shards: FrameShards, *args: Any) -> torch.Tensor:
        file.write_text(str(int(file.read_text()) + 1))
        return attention(shards, *args)

    patch.setattr(FrameShards, "window_attention", counting)


def stop_after(patch: pytest.MonkeyPatch, last: int) -> None:
    """End the run as a kill would, after the checkpoint of a step."""
    save = RunFolder.save_checkpoint

    def saving(run: RunFolder, step: int, *args: Any, **options: Any) -> Path:
        path = save(run, step, *args, **options)
        if step == last:
            raise KeyboardInterrupt
        return path

    patch.setattr(RunFolder, "save_checkpoint", saving)


def main() -> None:
    """Every scenario of the list in turn; a process that trains many engines starts once."""
    torch.set_num_threads(1)
    for scenario in json.loads(Path(sys.argv[1]).read_text()):
        config = DenoiserTrainConfig.model_validate(scenario["config"])
        out = Path(scenario["out"])
        with pytest.MonkeyPatch.context() as patch:
            if scenario.get("stop_after"):
                stop_after(patch, scenario["stop_after"])
            if scenario.get("gradients"):
                record_gradients(patch, out.with_suffix(".gradients.pt"))
            if is_main():
                count_shared_attention(patch, out.with_suffix(".shared"))
            with contextlib.suppress(KeyboardInterrupt):
                train_stages(
                    config,
                    Path(scenario["data"]),
                    out,
                    vae=Path(scenario["vae"]),
                    text=Path(scenario["text"]),
                )


if __name__ == "__main__":
    main()

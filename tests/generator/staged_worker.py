"""One staged run outside the test process: `staged_worker.py CONFIG.json DATA VAE TEXT OUT [STOP_AFTER]`, alone or under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from generator.training.denoiser import DenoiserTrainConfig
from generator.training.progressive import train_stages
from reelhf.engine import Engine, is_main
from reelhf.run import RunFolder


def record_gradients(file: Path) -> None:
    """Keep the gradients of the first step as ZeRO-0 has reduced them, before clipping."""
    step = Engine.step

    def recording(engine: Engine) -> dict[str, float]:
        if is_main() and not file.exists() and engine._engine.is_gradient_accumulation_boundary():
            named = engine.module.named_parameters()
            torch.save({n: p.grad.clone() for n, p in named if p.grad is not None}, file)
        return step(engine)

    Engine.step = recording  # type: ignore[method-assign]


def stop_after(last: int) -> None:
    """End the process as a kill would, after the checkpoint of a step."""
    save = RunFolder.save_checkpoint

    def saving(run: RunFolder, step: int, *args: Any, **options: Any) -> Path:
        path = save(run, step, *args, **options)
        if step == last:
            sys.exit(0)
        return path

    RunFolder.save_checkpoint = saving  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    config = DenoiserTrainConfig.model_validate_json(Path(sys.argv[1]).read_text())
    data, vae, text, out = map(Path, sys.argv[2:6])
    if len(sys.argv) > 6:
        stop_after(int(sys.argv[6]))
    if config.zero_stage == 0:
        record_gradients(out.with_suffix(".gradients.pt"))
    train_stages(config, data, out, vae=vae, text=text)

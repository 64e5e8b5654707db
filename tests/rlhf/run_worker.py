"""Runs one tiny RLHF run outside the test process: `run_worker.py SCENARIO.json`, alone or under torchrun."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from tiny_models import run_tiny

import rlhf.direct as direct
from reelhf.engine import Engine, is_main


def kill_at(function_name: str, call: int, when: str) -> None:
    """SIGKILL this process at the n-th call of a function of `rlhf.direct`, before or after it did its work."""
    original, calls = getattr(direct, function_name), [0]

    def killing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(direct, function_name, killing)


def record_gradients(path: Path) -> None:
    """Write the reduced gradients of every step's backward, before clipping."""
    original, steps = Engine.step, []

    def recording(engine: Engine) -> dict[str, float]:
        steps.append(
            {n: p.grad.clone() for n, p in engine.module.named_parameters() if p.grad is not None}
        )
        if is_main():
            torch.save(steps, path)
        return original(engine)

    Engine.step = recording  # type: ignore[method-assign]


def compute_in_float64() -> None:
    """The same code in double precision: what two runs then still differ in is no rounding of float32."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    accelerator = get_accelerator()
    supported = accelerator.supported_dtypes()
    accelerator.supported_dtypes = lambda: [*supported, torch.float64]  # gloo reduces it as well
    DeepSpeedEngine.communication_data_type = property(lambda engine: torch.float64)


def main() -> None:
    scenario = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    if scenario.get("float64"):
        compute_in_float64()
    if "kill" in scenario:
        kill_at(*scenario["kill"])
    if "gradients" in scenario:
        record_gradients(Path(scenario["gradients"]))
    run_tiny(Path(scenario["out"]), scenario["role"], **scenario["config"])


if __name__ == "__main__":
    main()

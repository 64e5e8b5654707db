"""Velocity, loss and gradients of one denoiser on one process or several that share its clips: `parallel_worker.py OUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from generator.base import NO_SHOT
from generator.dit import DiT, DiTConfig
from generator.parallel import sequence_group
from reelhf.engine import all_reduce_sum, init_distributed, is_main, world_size

CASES: dict[str, dict[str, Any]] = {
    # frames and windows that two and three processes divide, and that they do not; fewer frames than processes
    "even": {"grid": (4, 4, 4), "window": (2, 2)},
    "odd": {"grid": (5, 3, 5), "window": (2, 2)},
    "one_frame": {"grid": (1, 4, 4), "window": (2, 2)},
    "one_window": {"grid": (3, 2, 2), "window": (4, 4)},
    "checkpointed": {"grid": (5, 4, 6), "window": (2, 3), "checkpointing": True},
    # a prompt of two shots beside one of one: frames of either shot on one process, and each process with both
    "shots": {"grid": (5, 4, 4), "window": (2, 2), "starts": [[0, 2], [0, NO_SHOT]]},
    # full attention: heads are dealt out, and frames that do not divide are padded
    "full": {"grid": (5, 3, 4), "layers": "full", "width": 36, "num_heads": 6},
    "full_shots": {
        "grid": (4, 2, 3),
        "layers": "full",
        "width": 36,
        "num_heads": 6,
        "starts": [[0, 2], [0, NO_SHOT]],
        "attention": "packed",
        "checkpointing": True,
    },
    "packed": {"grid": (5, 3, 4), "attention": "packed", "starts": [[0, 2], [0, NO_SHOT]]},
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def run(
    grid: tuple[int, int, int],
    dtype: torch.dtype,
    starts: list[list[int]] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    torch.manual_seed(0)
    size = {"channels": 4, "width": 24, "num_heads": 2, "num_pairs": 3, "text_width": 8}
    config = DiTConfig.model_validate(size | changes)
    dit = DiT(config)
    for parameter in dit.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    dit = dit.to(dtype)
    dit.sequence_group = sequence_group(world_size())
    noisy, target, given = (torch.randn(2, 4, *grid) for _ in range(3))
    mask = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    sigma = torch.rand(2, grid[0])  # one per frame: every frame has its own modulation
    inputs = (torch.randn(2, 7, 8), mask, given, torch.ones(2, 1, *grid))
    cast = [x.to(dtype) if x.is_floating_point() else x for x in (noisy, sigma, *inputs)]
    shots = {}
    if starts is not None:
        of_token = torch.tensor([[0, 0, 0, 1, 1, 0, 0], [0] * 7])
        shots = {"token_shots": of_token, "shot_starts": torch.tensor(starts)}
    velocity, hidden = dit(*cast, features=(0, 1), **shots)
    weights = torch.arange(1.0, velocity.numel() + 1).view_as(velocity) / velocity.numel()
    loss = (weights * (velocity - target).square()).mean()
    loss.backward()
    gradients = {
        name: all_reduce_sum(parameter.grad) / world_size()
        for name, parameter in dit.named_parameters()
        if parameter.grad is not None
    }
    return {
        "loss": loss.detach(),
        "velocity": velocity.detach(),
        "hidden": [hidden[index].detach() for index in (0, 1)],
        "gradients": gradients,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    init_distributed()
    results = {}
    for name, dtype in DTYPES.items():
        # rotations and velocities are float32 by contract: rounding there would hide what float64 is to show
        wide = torch.Tensor.double if dtype == torch.float64 else torch.Tensor.float
        with mock.patch.object(torch.Tensor, "float", wide):
            results |= {f"{case} {name}": run(dtype=dtype, **o) for case, o in CASES.items()}
    if is_main():
        torch.save(results, Path(sys.argv[1]))

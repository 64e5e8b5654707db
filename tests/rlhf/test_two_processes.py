"""Two processes with the same global batch are one process: same gradients, same losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reelhf.run import read_metrics

WORKER = Path(__file__).with_name("run_worker.py")
CONFIG = {"num_steps": 20, "validate_every": 10, "checkpoint_every": 20, "optimizer": {"lr": 1e-4}}


def run_on_one_and_two(folder: Path, **scenario: Any) -> tuple[Path, Path]:
    """The run folders of one scenario on one process and on two."""
    outs = []
    for processes in (1, 2):
        out = folder / str(processes)
        described = {"out": str(out), "gradients": f"{out}.gradients.pt", **scenario}
        (folder / f"{processes}.json").write_text(json.dumps(described))
        launch = [sys.executable]
        if processes == 2:
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(
            [*launch, str(WORKER), str(folder / f"{processes}.json")],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        outs.append(out)
    return outs[0], outs[1]


def first_gradients(runs: tuple[Path, Path]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(parameter, its gradient on one process, on two) of the first step, when the weights are still the same."""
    one, two = (torch.load(f"{out}.gradients.pt")[0] for out in runs)
    assert one.keys() == two.keys()
    return ((name, one[name], two[name]) for name in one)


@pytest.fixture(scope="module", params=["base", pytest.param("refiner", marks=pytest.mark.slow)])
def one_and_two(request, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp(f"processes_{request.param}")
    return run_on_one_and_two(folder, role=request.param, config=CONFIG)


@pytest.mark.parametrize("role", ["base", pytest.param("refiner", marks=pytest.mark.slow)])
def test_gradients_are_equal_entry_by_entry_in_double_precision(role, tmp_path):
    """Nothing but rounding tells two processes from one: in float64 every entry of every gradient agrees."""
    config = CONFIG | {"num_steps": 1, "checkpoint_every": 1}
    runs = run_on_one_and_two(tmp_path, role=role, config=config, float64=True)
    for name, one, two in first_gradients(runs):
        assert one.dtype == torch.float64
        torch.testing.assert_close(two, one, rtol=1e-9, atol=0, msg=name)


def test_gradients_are_equal(one_and_two):
    """In float32 to 1e-5 of each tensor's largest entry, and nearly all entries to 1e-5 of their own.

    The others are small differences of large terms, which another batch size adds up in another order.
    """
    close, total = 0, 0
    for name, one, two in first_gradients(one_and_two):
        torch.testing.assert_close(
            two, one, rtol=1e-5, atol=1e-5 * one.abs().max().item() + 1e-9, msg=name
        )
        close += int(torch.isclose(two, one, rtol=1e-5, atol=0).sum())
        total += one.numel()
    assert close / total > 0.95


def test_losses_and_rewards_agree_over_twenty_steps(one_and_two):
    one, two = (read_metrics(out) for out in one_and_two)
    assert [row["step"] for row in two] == list(range(21))
    watched = ("reward/total", "anchor", "held_out/total", "validation/total", "valid_fraction")
    for ours, theirs in zip(two, one, strict=True):
        for key in watched:
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-4), (
                    theirs["step"],
                    key,
                )


def test_two_processes_choose_the_same_best_step(one_and_two):
    one, two = (read_metrics(out)[-1] for out in one_and_two)
    assert one["best/step"] == two["best/step"]

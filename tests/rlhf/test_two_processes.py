"""Two processes with the same global batch are one process: same gradients, same losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reelhf.run import read_metrics

WORKER = Path(__file__).with_name("run_worker.py")
CONFIG = {"num_steps": 20, "validate_every": 10, "checkpoint_every": 20, "optimizer": {"lr": 1e-4}}


@pytest.fixture(scope="module", params=["base", pytest.param("refiner", marks=pytest.mark.slow)])
def one_and_two(request, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp(f"processes_{request.param}")
    outs = []
    for processes in (1, 2):
        out = folder / str(processes)
        scenario = {
            "out": str(out),
            "role": request.param,
            "config": CONFIG,
            "gradients": f"{out}.gradients.pt",
        }
        (folder / f"{processes}.json").write_text(json.dumps(scenario))
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


def test_gradients_are_equal(one_and_two):
    one, two = (torch.load(f"{out}.gradients.pt") for out in one_and_two)
    first_one, first_two = one[0], two[0]
    assert first_one.keys() == first_two.keys()
    for name, gradient in first_one.items():
        # relative to the parameter's largest entry: entries near zero are differences of large terms
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            first_two[name], gradient, rtol=1e-5, atol=1e-5 * scale + 1e-9, msg=name
        )


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

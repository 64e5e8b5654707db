"""kill -9 at any moment, run again: weights, optimizer and metrics end bit-equal to a run that was never killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from reelhf.run import read_metrics

WORKER = Path(__file__).with_name("run_worker.py")
MOMENTS = {
    "after a few steps": ("batch_metrics", 3, "before"),
    "before a checkpoint is sealed": ("save_state", 2, "after"),
    "while a checkpoint is written": ("save_state", 3, "before"),
    "before a better policy is saved": ("save_policy", 2, "before"),
    "after a better policy is saved": ("save_policy", 2, "after"),
}
CONFIG = {"num_steps": 5, "validate_every": 2, "checkpoint_every": 2, "keep_checkpoints": 9}


def without_clock(rows: list[dict]) -> list[dict]:
    return [
        {
            key: value
            for key, value in row.items()
            if key not in ("time", "attempt") and "seconds" not in key
        }
        for row in rows
    ]


def run_in_own_process(scenario: dict) -> int:
    """Exit code of one run; minus nine when it killed itself."""
    file = Path(f"{scenario['out']}.json")
    file.write_text(json.dumps(scenario))
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(WORKER), str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, -signal.SIGKILL), f"{done.returncode}: {done.stdout[-3000:]}"
    return done.returncode


@pytest.fixture(scope="module", params=["base", pytest.param("refiner", marks=pytest.mark.slow)])
def runs(request, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp(f"resume_{request.param}")
    common = {"role": request.param, "config": CONFIG}
    moments = MOMENTS if request.param == "base" else dict(list(MOMENTS.items())[:2])
    assert run_in_own_process({"out": str(folder / "whole"), **common}) == 0
    for name, kill in moments.items():
        out = str(folder / name.replace(" ", "_"))
        assert run_in_own_process({"out": out, "kill": kill, **common}) == -signal.SIGKILL, name
        assert run_in_own_process({"out": out, **common}) == 0, name
    return {name: folder / name.replace(" ", "_") for name in ("whole", *moments)}


def test_every_moment_of_death_ends_bit_equal(runs):
    whole = runs["whole"]
    expected_metrics = without_clock(read_metrics(whole))
    assert [row["step"] for row in expected_metrics] == [0, 1, 2, 3, 4, 5]
    for name, folder in runs.items():
        assert without_clock(read_metrics(folder)) == expected_metrics, name
        for kind in ("best", "last"):
            weights = load_file(folder / kind / "denoiser.safetensors")
            for key, value in load_file(whole / kind / "denoiser.safetensors").items():
                assert torch.equal(weights[key], value), f"{name}: {kind} {key}"
        ours, theirs = (engine_state(path / "checkpoints/step_000005") for path in (folder, whole))
        assert ours.keys() == theirs.keys()
        assert {key.split("|")[0] for key in ours} == {"weight", "exp_avg", "exp_avg_sq", "steps"}
        for key, value in theirs.items():
            assert torch.equal(ours[key], value), f"{name}: {key}"


def engine_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and step counts of a run's one process."""
    (file,) = (checkpoint / "engine").glob("pieces_rank_*.safetensors")
    with safe_open(file, framework="pt") as pieces:
        steps = json.loads(pieces.metadata()["steps"])
        held = {key: pieces.get_tensor(key) for key in pieces.keys()}  # noqa: SIM118, a handle
    return held | {f"steps|{name}": torch.tensor(count) for name, count in steps.items()}


def test_the_killed_runs_were_resumed_and_not_repeated(runs):
    folder = runs["after a few steps"]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if row["attempt"] == 2] == [3, 4, 5]

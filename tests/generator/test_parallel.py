"""Processes that share a clip compute what one process computes: velocities, losses, gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from generator.parallel import FrameShards, SequenceGroup
from tests.generator.parallel_worker import CASES

WORKER = Path(__file__).with_name("parallel_worker.py")
ROOT = WORKER.parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By number of processes."""
    folder = tmp_path_factory.mktemp("parallel")
    found = {}
    for processes in (1, 2, 3):
        launch = [sys.executable]
        if processes > 1:
            launch += [
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={processes}",
            ]
        done = subprocess.run(
            [*launch, str(WORKER), str(folder / f"{processes}.pt")],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[processes] = torch.load(folder / f"{processes}.pt")
    return found


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_float64_agrees_element_by_element(results, case, processes):
    one, many = (results[count][f"{case} float64"] for count in (1, processes))
    assert one["loss"].dtype == torch.float64
    torch.testing.assert_close(many["loss"], one["loss"], rtol=1e-12, atol=0)
    torch.testing.assert_close(many["velocity"], one["velocity"], rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(many["hidden"], one["hidden"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert many["gradients"].keys() == one["gradients"].keys()
    for name, gradient in one["gradients"].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            many["gradients"][name], gradient, rtol=1e-9, atol=1e-13 * scale + 1e-30, msg=name
        )


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_float32_agrees_in_the_scale_of_each_gradient(results, case, processes):
    one, many = (results[count][f"{case} float32"] for count in (1, processes))
    torch.testing.assert_close(many["loss"], one["loss"], rtol=1e-5, atol=0)
    for name, gradient in one["gradients"].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            many["gradients"][name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name
        )


@pytest.mark.parametrize(("num_frames", "size"), [(4, 2), (5, 2), (1, 3), (7, 3)])
def test_every_frame_is_held_once_and_padding_is_zero(num_frames, size):
    frames = torch.arange(1.0, num_frames + 1)[None, :, None]
    parts = [
        FrameShards(SequenceGroup(None, size, rank), num_frames).local(frames, dim=1)
        for rank in range(size)
    ]
    assert len({part.shape for part in parts}) == 1
    joined = torch.cat(parts, dim=1)
    assert torch.equal(joined[:, :num_frames], frames)
    assert not joined[:, num_frames:].any()

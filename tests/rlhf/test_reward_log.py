"""Measuring the rewards' gradients in a run changes nothing of the run."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_models import DIMENSIONS, run_tiny

from reelhf.run import read_metrics


def test_gradients_are_logged_when_asked_and_the_weights_are_the_same_bits(tmp_path: Path):
    settings = {"num_steps": 2, "validate_every": 2, "checkpoint_every": 2}
    run_tiny(tmp_path / "plain", **settings)
    run_tiny(tmp_path / "logged", **settings, log_reward_gradients_every=2)
    plain, logged = (read_metrics(tmp_path / name) for name in ("plain", "logged"))
    assert not any(key.startswith("reward_gradient") for row in plain for key in row)
    assert not any(key.startswith("reward_gradient") for key in logged[1])
    for name in DIMENSIONS:
        assert logged[2][f"reward_gradient/{name}"] > 0
        assert logged[2][f"reward_spread/{name}"] > 0
    cosines = [value for key, value in logged[2].items() if key.startswith("reward_cosine/")]
    assert len(cosines) == 6
    assert all(-1 <= value <= 1 for value in cosines)
    weights = [load_file(tmp_path / n / "last" / "denoiser.safetensors") for n in ("plain", "logged")]  # fmt: skip
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

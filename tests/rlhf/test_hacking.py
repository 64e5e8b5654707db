"""The hacking monitor fires on a blatant attack and stays silent on honest progress."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from rlhf.hacking import (
    HackingConfig,
    HackingMonitor,
    ValidationReading,
    alarms,
    ensemble_spread,
    motion_amplitude,
    range_excess,
    saturated_fraction,
)

START = ValidationReading(
    {"motion_quality": 0.2}, total=0.5, held_out_total=0.4, motion=0.05, saturation=0.0
)
RANGES = {"motion_quality": (-2.0, 2.0)}


def fired(**changes) -> list[str]:
    return alarms(replace(START, **changes), START, RANGES, HackingConfig())


def test_honest_progress_fires_nothing():
    assert fired(rewards={"motion_quality": 1.5}, total=1.5, held_out_total=0.9, motion=0.04) == []


def test_each_sign_has_its_name():
    assert fired(rewards={"motion_quality": 20.0}) == ["range:motion_quality"]
    assert fired(total=2.0, held_out_total=-0.5) == ["held_out_gap"]
    assert fired(motion=0.01) == ["motion_collapse"]
    assert fired(saturation=0.3) == ["saturation"]


def test_both_rewards_falling_together_is_not_called_a_gap():
    assert fired(total=0.1, held_out_total=-0.5) == []


def test_a_generator_that_starts_outside_the_range_is_not_accused_for_it():
    weak = replace(START, rewards={"motion_quality": -9.0})
    assert alarms(weak, weak, RANGES, HackingConfig()) == []


@pytest.mark.parametrize(("value", "excess"), [(0.0, 0.0), (3.0, 0.25), (-4.0, 0.5)])
def test_range_excess_is_in_widths_of_the_range(value, excess):
    assert range_excess(value, (-2.0, 2.0)) == excess


def test_an_uncalibrated_range_never_fires():
    assert range_excess(1e9, (-float("inf"), float("inf"))) == 0.0


def test_the_run_stops_after_patience_alarms_in_a_row_and_survives_a_resume():
    monitor = HackingMonitor(HackingConfig(patience=2), RANGES)
    bad = replace(START, motion=0.0)
    monitor.observe(START)
    monitor.observe(bad)
    monitor.observe(START)
    monitor.observe(bad)
    assert not monitor.should_stop
    resumed = HackingMonitor(HackingConfig(patience=2), RANGES)
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.observe(bad) == ["motion_collapse"]
    assert resumed.should_stop


def test_motion_amplitude_of_known_clips():
    still = torch.full((1, 3, 4, 2, 2), 0.3)
    blinking = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 1, 4, 1, 1).expand(1, 3, 4, 2, 2)
    assert motion_amplitude(torch.cat([still, blinking])).tolist() == [0.0, 1.0]
    assert motion_amplitude(still[:, :, :1]).tolist() == [0.0]


def test_saturated_fraction_tolerates_a_small_overshoot():
    frames = torch.tensor([0.5, 1.01, 1.5, -0.5]).view(1, 1, 1, 2, 2)
    assert saturated_fraction(frames).tolist() == [0.5]


class _Scorer(nn.Module):
    """A small 3D convolution that learns to tell clean clips from noisy ones."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(
            nn.Conv3d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv3d(8, 8, 3, stride=2), nn.SiLU()
        )
        self.head = nn.Linear(8, 1)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(frames).mean((2, 3, 4)))[:, 0]


def _clips(count: int, generator: torch.Generator) -> torch.Tensor:
    coarse = torch.rand(count, 3, 1, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size=(6, 12, 12), mode="trilinear")


def test_the_signs_fire_at_once_when_pixels_are_optimised_against_one_scorer():
    """Three scorers that differ by seed only, all right on held-out pairs; Adam on the pixels of one of them."""
    generator = torch.Generator().manual_seed(0)
    scorers = [_Scorer(seed) for seed in range(3)]
    for scorer in scorers:
        optimizer = torch.optim.Adam(scorer.parameters(), lr=3e-3)
        for _ in range(60):
            clean = _clips(16, generator)
            noisy = clean + 0.2 * torch.randn(clean.shape, generator=generator)
            loss = -nn.functional.logsigmoid(scorer(clean) - scorer(noisy)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scorer.requires_grad_(False)
    clean = _clips(64, generator)
    noisy = clean + 0.2 * torch.randn(clean.shape, generator=generator)
    assert all((s(clean) > s(noisy)).float().mean() > 0.9 for s in scorers)
    on_real = torch.cat([scorers[0](clean), scorers[0](noisy)])
    scale = [(s(clean).mean(), torch.cat([s(clean), s(noisy)]).std()) for s in scorers]

    def read(frames: torch.Tensor) -> tuple[ValidationReading, float, float]:
        values = [scorer(frames) for scorer in scorers]
        z = [(value - mean) / std for value, (mean, std) in zip(values, scale, strict=True)]
        reading = ValidationReading(
            {"quality": float(values[0].mean())},
            total=float(z[0].mean()),
            held_out_total=float((z[1] + z[2]).mean()),
            motion=float(motion_amplitude(frames).mean()),
            saturation=float(saturated_fraction(frames).mean()),
        )
        return reading, float(ensemble_spread(z).mean()), float(values[0].std())

    pixels = (clean[:8] + 0.1 * torch.randn(clean[:8].shape, generator=generator)).requires_grad_()
    start, spread_before, deviation_before = read(pixels.detach())
    optimizer = torch.optim.Adam([pixels], lr=2e-2)
    for _ in range(40):
        optimizer.zero_grad()
        (-scorers[0](pixels).sum()).backward()
        optimizer.step()
    now, spread_after, deviation_after = read(pixels.detach())

    ranges = {"quality": (float(on_real.min()), float(on_real.max()))}
    signs = alarms(now, start, ranges, HackingConfig())
    assert now.total > start.total
    assert "range:quality" in signs
    assert spread_after > 2 * spread_before
    # the variance of the reward inside the batch is no sign: it stays where it was
    assert deviation_after < 5 * deviation_before

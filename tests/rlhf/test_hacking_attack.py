"""The experiment behind the monitor, kept as a test: pixels are optimised against one of three rewards that all judge well.

The three differ by their seed alone. Within forty steps the attacked one leaves its validated range and the others no longer agree with
it, while clips nobody attacked raise no alarm; the variance of the reward inside the batch says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from rlhf.hacking import (
    HackingConfig,
    HackingMonitor,
    ValidationReading,
    alarms,
    ensemble_spread,
    motion_amplitude,
    saturated_fraction,
)

CONFIG = HackingConfig(max_spread_ratio=2.0)
MOST_STEPS = 40
MOST_FALSE_ALARMS = 0.05
NAME = "quality"


class Scorer(nn.Module):
    """A small 3D convolution that learns to tell clean clips from noisy ones."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(
            nn.Conv3d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv3d(8, 8, 3, stride=2), nn.SiLU()
        )
        self.head = nn.Linear(8, 1)

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.body(frames).mean((2, 3, 4)))[:, 0]


def clean_clips(count: int, generator: torch.Generator) -> Tensor:
    coarse = torch.rand(count, 3, 4, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size=(6, 12, 12), mode="trilinear")


def noisy(clips: Tensor, generator: torch.Generator) -> Tensor:
    return clips + 0.2 * torch.randn(clips.shape, generator=generator)


@dataclass(frozen=True)
class Judges:
    """Three trained rewards, the first of which is attacked; their statistics and its range on validation clips."""

    scorers: Sequence[Scorer]
    scale: Sequence[tuple[Tensor, Tensor]]
    ranges: dict[str, tuple[float, float]]

    def read(self, frames: Tensor) -> ValidationReading:
        values = [scorer(frames) for scorer in self.scorers]
        z = [(value - mean) / std for value, (mean, std) in zip(values, self.scale, strict=True)]
        return ValidationReading(
            {NAME: float(values[0].mean())},
            total=float(z[0].mean()),
            held_out_total=float((z[1] + z[2]).mean()),
            motion=float(motion_amplitude(frames).mean()),
            saturation=float(saturated_fraction(frames).mean()),
            spread=float(ensemble_spread(z).mean()),
        )


@pytest.fixture(scope="module")
def judges() -> Judges:
    generator = torch.Generator().manual_seed(0)
    scorers = [Scorer(seed) for seed in range(3)]
    for scorer in scorers:
        optimizer = torch.optim.Adam(scorer.parameters(), lr=3e-3)
        for _ in range(60):
            clean = clean_clips(16, generator)
            loss = -nn.functional.logsigmoid(scorer(clean) - scorer(noisy(clean, generator))).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scorer.requires_grad_(False)
    held = clean_clips(64, generator)
    spoiled = noisy(held, generator)
    assert all((s(held) > s(spoiled)).float().mean() > 0.9 for s in scorers)
    both = [torch.cat([s(held), s(spoiled)]) for s in scorers]
    ranges = {NAME: (float(both[0].min()), float(both[0].max()))}
    return Judges(scorers, [(v.mean(), v.std()) for v in both], ranges)


@pytest.fixture(scope="module")
def start(judges: Judges) -> ValidationReading:
    """Mildly spoiled clips: what a generator that has something to learn makes."""
    return judges.read(mild_clips(64, 7))


def mild_clips(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    clips = clean_clips(count, generator)
    return clips + 0.1 * torch.randn(clips.shape, generator=generator)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_attack_on_one_reward_is_flagged_by_range_and_by_the_ensemble_within_forty_steps(
    judges: Judges, start: ValidationReading, seed: int
):
    pixels = mild_clips(8, seed).requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=2e-2)
    first: dict[str, int] = {}
    deviations = [float(judges.scorers[0](pixels.detach()).std())]
    for step in range(1, MOST_STEPS + 1):
        optimizer.zero_grad()
        (-judges.scorers[0](pixels).sum()).backward()
        optimizer.step()
        for sign in alarms(judges.read(pixels.detach()), start, judges.ranges, CONFIG):
            first.setdefault(sign, step)
    deviations.append(float(judges.scorers[0](pixels.detach()).std()))
    assert judges.read(pixels.detach()).total > start.total
    assert first[f"range:{NAME}"] <= MOST_STEPS
    assert first["ensemble_gap"] <= MOST_STEPS
    assert deviations[1] < 5 * deviations[0]  # the variance inside the batch stays where it was


def test_clips_nobody_attacked_raise_no_alarm(judges: Judges, start: ValidationReading):
    generator = torch.Generator().manual_seed(11)
    batches = [clean_clips(8, generator) for _ in range(60)]
    batches += [mild_clips(8, 1000 + i) for i in range(60)]
    flagged = [alarms(judges.read(b), start, judges.ranges, CONFIG) for b in batches]
    assert sum(map(bool, flagged)) / len(flagged) < MOST_FALSE_ALARMS, flagged


def test_a_run_under_attack_stops_and_an_honest_one_does_not(
    judges: Judges, start: ValidationReading
):
    def stops(clips: Sequence[Tensor]) -> bool:
        monitor = HackingMonitor(CONFIG, judges.ranges, start=start)
        for frames in clips:
            monitor.observe(judges.read(frames))
        return monitor.should_stop

    pixels = mild_clips(8, 5).requires_grad_()
    optimizer, attacked = torch.optim.Adam([pixels], lr=2e-2), []
    for _ in range(MOST_STEPS):
        optimizer.zero_grad()
        (-judges.scorers[0](pixels).sum()).backward()
        optimizer.step()
        attacked.append(pixels.detach().clone())
    noise = 0.1 * torch.randn(8, 3, 6, 12, 12, generator=torch.Generator().manual_seed(6))
    clean = clean_clips(8, torch.Generator().manual_seed(6))
    better = [clean + (1 - k / 10) * noise for k in range(11)]  # what it is meant to learn
    assert stops(attacked[::10] + attacked[-1:])
    assert not stops(better)

"""The attack of `test_hacking_attack` on the rewards themselves: tiny checkpoints of real families, as an ensemble on disk.

Three members differ by the seed of backbone and readouts and have briefly learned that noise is worse. Pixels follow the first alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_hacking_attack import CONFIG, MOST_FALSE_ALARMS, MOST_STEPS
from tiny_backbones import reward_on
from tiny_rewards import CAPTIONS
from torch import Tensor, nn

from rewards import load_reward
from rewards.calibration import spread
from rewards.ensemble import EnsembleReward
from rewards.module import RewardModule
from rlhf.hacking import (
    ValidationReading,
    alarms,
    ensemble_spread,
    motion_amplitude,
    saturated_fraction,
)

PROMPTS = 8
MOST_LESSONS = 60
TAUGHT = 0.8
"""Held-out accuracy at which learning stops: a reward that was taught until it saturates cannot leave its range any more, and the ensemble alone
notices (siglip2 after 20 steps)."""
WORST_NOISE = 0.2
MILD_NOISE = 0.05
"""Standard deviation in pixels: of the worst clip that is learned from, and of what the generator at hand makes."""


def clips(seed: int) -> Tensor:
    """Smooth clips of every prompt, [8, 3, 5, 32, 32] inside (0.05, 0.95)."""
    draws = torch.Generator().manual_seed(seed)
    coarse = torch.rand(PROMPTS, 3, 4, 6, 6, generator=draws)
    return 0.1 + 0.8 * nn.functional.interpolate(coarse, size=(5, 32, 32), mode="trilinear")


def noisy(frames: Tensor, level: Tensor | float, draws: torch.Generator) -> Tensor:
    level = torch.as_tensor(level).expand(len(frames)).view(-1, 1, 1, 1, 1)
    return frames + level * torch.randn(frames.shape, generator=draws)


def z_scores(model: RewardModule, frames: Tensor) -> Tensor:
    """(value - mean) / std of each clip and dimension, [8, D]."""
    said = model.score(frames, selection=model.select(5, 8.0), fps=8.0, prompts=CAPTIONS)
    return (said.values - model.mean) / model.std


def learn(model: RewardModule, draws: torch.Generator) -> None:
    """The less noisy of two looks at a clip is the better one, until that is learned."""
    model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(MOST_LESSONS):
        if step % 5 == 0 and accuracy(model) > TAUGHT:
            break
        less, more = WORST_NOISE * torch.rand(2, PROMPTS, generator=draws).sort(dim=0).values
        better, worse = (z_scores(model, noisy(clips(100 + step), n, draws)) for n in (less, more))
        loss = -nn.functional.logsigmoid(better - worse).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert accuracy(model) > TAUGHT
    model.freeze()


@torch.no_grad()
def accuracy(model: RewardModule) -> float:
    """Share of held-out clips that score higher than the same with noise, in the dimension with fewer."""
    draws, held = torch.Generator().manual_seed(1), torch.cat([clips(200), clips(201)])
    both = (held, noisy(held, WORST_NOISE, draws))
    clean, bad = (
        torch.cat([z_scores(model, part) for part in whole.split(PROMPTS)]) for whole in both
    )
    return float((clean > bad).float().mean(0).min())


@torch.no_grad()
def calibrate(model: RewardModule, draws: torch.Generator) -> None:
    """The frozen statistics, of clips as they come from the generator at hand."""
    looks = [
        z_scores(model, noisy(clips(seed), level, draws))
        for seed in range(200, 206)
        for level in (0.0, MILD_NOISE)
    ]
    for name, value in zip(("mean", "std", "low", "high"), spread(torch.cat(looks)), strict=True):
        getattr(model, name).copy_(value)


@dataclass(frozen=True)
class Judges:
    """The members of an ensemble, the first of which is attacked."""

    ensemble: EnsembleReward

    @property
    def target(self) -> RewardModule:
        return self.ensemble.members[0]  # type: ignore[return-value]

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        bounds = zip(self.target.low.tolist(), self.target.high.tolist(), strict=True)
        return dict(zip(self.target.dimensions, bounds, strict=True))

    @torch.no_grad()
    def read(self, frames: Tensor) -> ValidationReading:
        z = [z_scores(member, frames) for member in self.ensemble.members]
        values = (z[0] * self.target.std + self.target.mean).mean(0).tolist()
        totals = [one.mean(1) for one in z]
        return ValidationReading(
            dict(zip(self.target.dimensions, values, strict=True)),
            total=float(totals[0].mean()),
            held_out_total=float((totals[1] + totals[2]).mean()),
            motion=float(motion_amplitude(frames).mean()),
            saturation=float(saturated_fraction(frames).mean()),
            spread=float(ensemble_spread(totals).mean()),
        )

    def signs(self, frames: Tensor, start: ValidationReading) -> list[str]:
        return alarms(self.read(frames), start, self.ranges, CONFIG)


@pytest.fixture(
    scope="module",
    params=[
        "siglip2",
        pytest.param("vjepa2", marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", marks=pytest.mark.slow),
        pytest.param("qwen3_vl", marks=pytest.mark.slow),
    ],
)
def judges(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Judges:
    folder: Path = tmp_path_factory.mktemp(request.param)
    draws, members = torch.Generator().manual_seed(0), []
    settings = {"reads": "reward_tokens"} if "qwen" in request.param else {}
    for seed in range(3):
        model = reward_on(request.param, folder / f"base_{seed}", seed=seed, **settings)
        learn(model, draws)
        calibrate(model, draws)
        members.append(model)
    ensemble = load_reward(EnsembleReward(members).save(folder / "ensemble"))
    assert isinstance(ensemble, EnsembleReward)
    return Judges(ensemble)


@pytest.mark.parametrize("seed", [1, 2])
def test_following_one_member_leaves_its_range_and_the_others_within_forty_steps(
    judges: Judges, seed: int
) -> None:
    begun = noisy(clips(seed), MILD_NOISE, torch.Generator().manual_seed(seed))
    start = judges.read(begun)
    pixels = begun.clone().requires_grad_()
    optimizer, first = torch.optim.Adam([pixels], lr=2e-2), {}
    for step in range(1, MOST_STEPS + 1):
        optimizer.zero_grad()
        (-z_scores(judges.target, pixels).sum()).backward()
        optimizer.step()
        for sign in judges.signs(pixels.detach(), start):
            first.setdefault(sign.partition(":")[0], step)
        if {"range", "ensemble_gap"} <= first.keys():
            break
    assert {"range", "ensemble_gap"} <= first.keys(), first
    asked = {"selection": judges.target.select(5, 8.0), "fps": 8.0, "prompts": CAPTIONS}
    with torch.no_grad():  # the ensemble's own std says so too
        before, after = (judges.ensemble.score(f, **asked).std for f in (begun, pixels.detach()))
    assert after.mean() > 1.5 * before.mean()


def test_clips_nobody_attacked_are_flagged_in_fewer_than_one_case_in_twenty(
    judges: Judges,
) -> None:
    """Other samples of the same prompts, up to as good as they can be: every sign. Other clips altogether: range and ensemble."""
    flagged = []
    for seed in range(1, 5):
        draws = torch.Generator().manual_seed(seed)
        start = judges.read(noisy(clips(seed), MILD_NOISE, draws))
        for level in torch.linspace(0, MILD_NOISE, 8).tolist():
            flagged.append(judges.signs(noisy(clips(seed), level, draws), start))
            other = judges.signs(noisy(clips(300 + len(flagged)), level, draws), start)
            flagged.append([s for s in other if s == "ensemble_gap" or s.startswith("range")])
    assert sum(map(bool, flagged)) / len(flagged) < MOST_FALSE_ALARMS, flagged

"""The hacking monitor fires on a blatant attack and stays silent on honest progress."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

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


def test_the_ensemble_gap_is_off_by_default_and_relative_to_the_start():
    apart = replace(START, spread=3.0)
    assert fired(spread=3.0) == []
    watching = HackingConfig(max_spread_ratio=2.0)
    assert alarms(apart, replace(START, spread=1.0), RANGES, watching) == ["ensemble_gap"]
    assert alarms(apart, replace(START, spread=1.6), RANGES, watching) == []
    assert ensemble_spread([torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0])]).tolist() == [1, 0]


def test_a_monitor_saved_before_the_ensemble_gap_was_watched_still_loads():
    monitor = HackingMonitor(HackingConfig(), RANGES)
    monitor.observe(START)
    state = monitor.state_dict()
    del state["start"]["spread"]
    monitor.load_state_dict(state)
    assert monitor.start == START

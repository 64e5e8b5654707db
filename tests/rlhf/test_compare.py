"""Intervals and checks of the before/after comparison."""

from __future__ import annotations

import math
import random

import pytest

from rlhf.compare import CompareConfig, _difference, _unit_means, mean_interval, run_checks


def test_interval_of_a_constant_difference_is_that_difference():
    interval = mean_interval([0.3] * 20)
    assert interval.mean == interval.low == interval.high == pytest.approx(0.3)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = random.Random(0)
    covered = 0
    for trial in range(200):
        interval = mean_interval(
            [rng.gauss(0.5, 1.0) for _ in range(64)], resamples=400, seed=trial
        )
        covered += interval.low <= 0.5 <= interval.high
    assert 0.89 <= covered / 200 <= 0.99


def test_interval_narrows_with_the_number_of_prompts():
    rng = random.Random(1)
    values = [rng.gauss(0, 1) for _ in range(256)]
    few, many = mean_interval(values[:16]), mean_interval(values)
    assert many.high - many.low < (few.high - few.low) / 2


def test_bootstrap_refuses_what_it_cannot_resample():
    with pytest.raises(ValueError, match="at least two finite"):
        mean_interval([1.0])
    with pytest.raises(ValueError, match="at least two finite"):
        mean_interval([1.0, math.nan])


def test_seeds_are_averaged_before_prompts_are_compared_and_invalid_clips_left_out():
    assert _unit_means([1.0, 3.0, math.nan, 5.0], 2) == [2.0, 5.0]
    assert math.isnan(_unit_means([math.nan, math.nan], 2)[0])


def test_a_prompt_invalid_on_one_side_is_not_compared():
    config = CompareConfig(resamples=100)
    result = _difference(config, {"before": [1.0, math.nan, 2.0], "after": [2.0, 1.0, 3.0]})
    assert result["n"] == 2
    assert result["difference"] == pytest.approx(1.0)


def _measure(difference: float, half_width: float, before: float = 1.0) -> dict:
    return {
        "before": before,
        "after": before + difference,
        "difference": difference,
        "low": difference - half_width,
        "high": difference + half_width,
    }


@pytest.mark.parametrize(
    ("difference", "half_width", "status"),
    [(0.2, 0.1, "pass"), (0.2, 0.3, "fail"), (-0.2, 0.1, "fail")],
)
def test_a_rise_needs_its_whole_interval_above_zero(difference, half_width, status):
    config = CompareConfig(must_rise=("reward/total",))
    checks = run_checks(config, {"reward/total": _measure(difference, half_width)}, has_gold=True)
    assert [c["status"] for c in checks] == [status]


def test_non_inferiority_uses_the_stated_margin():
    measures = {
        "gold/motion": _measure(-0.02, 0.02),
        "motion/amplitude": _measure(-0.1, 0.05, before=0.5),
    }
    config = CompareConfig(
        must_not_fall={"gold/motion": 0.05}, must_not_fall_fraction={"motion/amplitude": 0.2}
    )
    checks = {c["measure"]: c for c in run_checks(config, measures, has_gold=True)}
    assert checks["gold/motion"]["status"] == "pass"
    assert checks["motion/amplitude"]["threshold"] == pytest.approx(-0.1)
    assert checks["motion/amplitude"]["status"] == "fail"


def test_gold_checks_are_not_measured_on_real_clips():
    config = CompareConfig(must_rise=("gold/composite",))
    checks = run_checks(config, {"reward/total": _measure(0.1, 0.05)}, has_gold=False)
    assert checks[0]["status"] == "not_measured"


def test_a_check_on_a_measure_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="reward/motoin"):
        run_checks(
            CompareConfig(must_rise=("reward/motoin",)),
            {"reward/total": _measure(0, 1)},
            has_gold=True,
        )

"""Micro-batches of equal cost and processes of equal load: every job once, as many for each, near the best possible."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from generator.base import BackboneSpec
from generator.data.buckets import Bucket
from generator.data.packing import deal, load_table, samples_per_micro_batch, save_table
from reelhf.errors import UserError

SPEC = BackboneSpec(channels=8)


@pytest.mark.parametrize(("num_jobs", "num_processes"), [(8, 1), (8, 2), (12, 4), (6, 6)])
def test_every_job_is_dealt_once_and_as_many_to_each(num_jobs, num_processes):
    rng = random.Random(num_jobs)
    costs = [rng.uniform(1, 9) for _ in range(num_jobs)]
    dealt = deal(costs, num_processes)
    assert sorted(itertools.chain(*dealt)) == list(range(num_jobs))
    assert {len(jobs) for jobs in dealt} == {num_jobs // num_processes}
    assert all(jobs == sorted(jobs) for jobs in dealt)


def test_loads_are_nearly_as_equal_as_any_deal_makes_them():
    """Against every way to split eight jobs into two fours, and never worse than in the order they come."""
    rng = random.Random(0)
    for _ in range(50):
        costs = [rng.choice([1, 2, 5, 9, 30]) * rng.uniform(0.9, 1.1) for _ in range(8)]
        total = sum(costs)
        best = min(
            max(sum(costs[i] for i in four), total - sum(costs[i] for i in four))
            for four in itertools.combinations(range(8), 4)
        )
        ours = max(sum(costs[i] for i in jobs) for jobs in deal(costs, 2))
        assert best <= ours <= 4 / 3 * best


def test_jobs_that_cannot_be_dealt_alike_are_refused():
    with pytest.raises(ValueError, match="7 jobs for 2 processes"):
        deal([1.0] * 7, 2)


def test_smaller_buckets_get_as_many_samples_as_take_as_long():
    large, small, image = Bucket(9, 64, 64), Bucket(5, 32, 32), Bucket(1, 32, 32)
    table = {large: 1.0, small: 0.21, image: 0.05}
    sizes = samples_per_micro_batch(table, SPEC, tokens=2 * large.tokens(SPEC) + 5)
    assert sizes == {large: 2, small: 9, image: 40}
    for bucket, count in sizes.items():
        assert count * table[bucket] <= 2.0 < (count + 1) * table[bucket]
    # a clip that is larger than the budget goes alone, and nothing becomes zero
    assert samples_per_micro_batch(table, SPEC, tokens=1)[large] == 1
    slow_image = {large: 1.0, image: 7.0}
    assert samples_per_micro_batch(slow_image, SPEC, tokens=48) == {large: 1, image: 1}


def test_the_cost_of_a_token_is_measured_not_assumed():
    """Attention makes a token of a long clip dearer: counting tokens would give the short clip too few samples."""
    large, small = Bucket(9, 64, 64), Bucket(9, 32, 32)
    assert large.tokens(SPEC) == 4 * small.tokens(SPEC)
    sizes = samples_per_micro_batch({large: 8.0, small: 1.0}, SPEC, tokens=large.tokens(SPEC))
    assert sizes[small] == 8


def test_a_table_comes_back_and_a_damaged_one_says_so(tmp_path):
    table = {Bucket(9, 64, 64): 0.125, Bucket(1, 64, 48): math.pi}
    save_table(table, tmp_path / "runtime.json")
    assert load_table(tmp_path / "runtime.json") == table
    (tmp_path / "runtime.json").write_text("[1, 2")
    with pytest.raises(UserError, match="damaged; delete it"):
        load_table(tmp_path / "runtime.json")

from __future__ import annotations

import pytest
import torch

from distill.losses import (
    paired_bootstrap,
    segment_consistency_loss,
    segment_edges,
    segment_projection,
)
from generator.flow import sigma_schedule


def test_edges_are_every_fifth_teacher_sigma():
    sigmas = sigma_schedule(20, shift=3.0)
    edges = segment_edges(sigmas, 4)
    assert edges == (sigmas[0], sigmas[5], sigmas[10], sigmas[15], sigmas[20])
    assert segment_edges(sigmas, 20) == sigmas
    with pytest.raises(ValueError, match="20 teacher steps cannot be cut into 3"):
        segment_edges(sigmas, 3)


def test_the_loss_is_zero_exactly_where_the_jump_lands_on_the_trajectory():
    noisy, velocity = torch.randn(2, 3, 4, 2, 2, 2)
    sigma, edge = torch.tensor([1.0, 0.7, 0.3]), torch.tensor([0.5, 0.5, 0.0])
    landing = segment_projection(noisy, velocity, sigma, edge)
    assert segment_consistency_loss(noisy, velocity, sigma, edge, landing).tolist() == [0.0] * 3
    off = segment_consistency_loss(noisy, velocity + 0.5, sigma, edge, landing)
    torch.testing.assert_close(
        off, torch.full((3,), 0.25)
    )  # velocity units: the jump's length cancels
    with pytest.raises(ValueError, match="above its segment's lower edge"):
        segment_consistency_loss(noisy, velocity, edge, edge, landing)


def test_the_interval_covers_the_mean_and_excludes_zero_only_when_it_should():
    differences = torch.randn(64, generator=torch.Generator().manual_seed(0))
    low, high = paired_bootstrap(differences)
    assert low < differences.mean() < high
    assert low < 0 < high
    low, high = paired_bootstrap(differences + 2)
    assert 1.4 < low < high < 2.6
    assert paired_bootstrap(torch.full((8,), 0.3)) == pytest.approx((0.3, 0.3))

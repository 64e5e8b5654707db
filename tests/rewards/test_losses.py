from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from rewards.losses import (
    best_worst_loss,
    bradley_terry_loss,
    bradley_terry_ties_loss,
    chance_corrected,
    gaussian_preference_loss,
    masked_mean,
    tie_width_from_rate,
)


@pytest.mark.parametrize("gap", [-3.0, 0.0, 0.4, 8.0])
@pytest.mark.parametrize("width", [0.05, 0.7, 2.0])
def test_win_loss_and_tie_probabilities_sum_to_one(gap: float, width: float) -> None:
    score_a, score_b = torch.full((3,), gap, dtype=torch.double), torch.zeros(3, dtype=torch.double)
    loss = bradley_terry_ties_loss(score_a, score_b, torch.tensor([1, -1, 0]), tie_width=width)
    assert loss.neg().exp().sum().item() == pytest.approx(1.0)


def test_swapping_the_clips_and_the_vote_changes_nothing() -> None:
    a, b = torch.randn(9), torch.randn(9)
    vote = torch.tensor([1, -1, 0] * 3)
    torch.testing.assert_close(
        bradley_terry_ties_loss(a, b, vote, tie_width=0.5),
        bradley_terry_ties_loss(b, a, -vote, tie_width=0.5),
    )


def test_a_vanishing_tie_width_gives_bradley_terry() -> None:
    a, b = torch.randn(5, dtype=torch.double), torch.randn(5, dtype=torch.double)
    ones = torch.ones(5)
    torch.testing.assert_close(
        bradley_terry_ties_loss(a, b, ones, tie_width=1e-9),
        bradley_terry_loss(a, b),
        atol=1e-8,
        rtol=0,
    )


def test_the_better_clip_wins_half_its_votes_at_the_tie_width() -> None:
    loss = bradley_terry_ties_loss(
        torch.tensor([0.7]), torch.zeros(1), torch.ones(1), tie_width=0.7
    )
    assert loss.neg().exp().item() == pytest.approx(0.5)


def test_the_gradient_stays_one_at_a_hopeless_gap() -> None:
    a = torch.tensor([-1000.0], requires_grad=True)
    bradley_terry_ties_loss(a, torch.zeros(1), torch.ones(1), tie_width=0.5).sum().backward()
    assert a.grad is not None and a.grad.item() == pytest.approx(-1.0)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.667])
def test_tie_width_reproduces_the_tie_rate_of_equal_clips(rate: float) -> None:
    zero = torch.zeros(1)
    loss = bradley_terry_ties_loss(zero, zero, zero, tie_width=tie_width_from_rate(rate))
    assert loss.neg().exp().item() == pytest.approx(rate, rel=1e-5)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        bradley_terry_ties_loss(torch.zeros(4, 1), torch.zeros(4), torch.zeros(4), tie_width=0.5)
    with pytest.raises(ValueError, match="one shape"):
        bradley_terry_loss(torch.zeros(4, 1), torch.zeros(4))


def test_missing_labels_do_not_enter_the_mean_or_its_gradient() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, float("nan")], requires_grad=True)
    mask = torch.tensor([True, True, False, False])
    mean, count = masked_mean(scores, mask)
    mean.backward()
    assert mean.item() == pytest.approx(1.5) and count.item() == 2
    torch.testing.assert_close(scores.grad, torch.tensor([0.5, 0.5, 0.0, 0.0]))


def test_the_masked_mean_of_nothing_is_zero() -> None:
    mean, count = masked_mean(torch.tensor([float("nan")]), torch.tensor([False]))
    assert mean.item() == 0 and count.item() == 0


def test_weights_count_only_where_a_label_is_present() -> None:
    mean, _ = masked_mean(
        torch.tensor([1.0, 5.0, 9.0]),
        torch.tensor([True, True, False]),
        torch.tensor([3.0, 1.0, 50.0]),
    )
    assert mean.item() == pytest.approx(2.0)


def test_best_and_worst_probabilities_sum_to_one_over_ordered_pairs() -> None:
    scores = torch.randn(4, dtype=torch.double)
    pairs = list(itertools.permutations(range(4), 2))
    best, worst = (torch.tensor(column) for column in zip(*pairs, strict=True))
    loss = best_worst_loss(scores.expand(len(pairs), 4), best, worst)
    assert loss.neg().exp().sum().item() == pytest.approx(1.0)


def test_padding_a_task_of_fewer_clips_changes_nothing() -> None:
    scores = torch.randn(1, 3)
    best, worst = torch.tensor([2]), torch.tensor([0])
    padded = torch.cat([scores, torch.full((1, 1), 99.0)], dim=1)
    mask = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(
        best_worst_loss(padded, best, worst, mask), best_worst_loss(scores, best, worst)
    )


def test_two_clips_make_best_worst_the_bradley_terry_loss() -> None:
    scores = torch.tensor([[0.3, 1.1]])
    expected = bradley_terry_loss(scores[:, 1], scores[:, 0])
    torch.testing.assert_close(
        best_worst_loss(scores, torch.tensor([1]), torch.tensor([0])), expected
    )
    assert expected.item() == pytest.approx(math.log1p(math.exp(-0.8)))


@pytest.mark.parametrize("vote", [1, -1, 0])
@pytest.mark.parametrize("gap", [-1000.0, 1000.0])
def test_gradients_are_exact_and_finite_at_a_gap_of_a_thousand(vote: int, gap: float) -> None:
    a = torch.tensor([gap], requires_grad=True)
    loss = bradley_terry_ties_loss(a, torch.zeros(1), torch.tensor([vote]), tie_width=0.5)
    loss.sum().backward()
    # a vote against the gap pulls with the whole weight, one along it not at all, and a tie towards no gap
    expected = math.copysign(1, gap) if vote == 0 else (-vote if vote * gap < 0 else 0)
    assert a.grad is not None and a.grad.item() == pytest.approx(expected)
    assert loss.isfinite().all()


def test_a_margin_shifts_the_gap_of_decided_votes_and_leaves_ties_alone() -> None:
    a, b = torch.randn(6), torch.randn(6)
    torch.testing.assert_close(
        bradley_terry_loss(a, b, margin=0.57), bradley_terry_loss(a - 0.57, b)
    )
    vote = torch.tensor([1, -1, 0, 1, -1, 0])
    torch.testing.assert_close(
        bradley_terry_ties_loss(a, b, vote, tie_width=0.4, margin=0.57),
        bradley_terry_ties_loss(a - 0.57 * vote, b, vote, tie_width=0.4),
    )


def gaussian(mean: float, std: Tensor | float, vote: int, width: float = 1e-6) -> Tensor:
    both = torch.full((1,), mean, dtype=torch.double), torch.zeros(1, dtype=torch.double)
    spread = torch.as_tensor(std, dtype=torch.double).expand(1)
    return gaussian_preference_loss(
        *both, spread, torch.zeros_like(spread), torch.tensor([vote]), tie_width=width
    )


@pytest.mark.parametrize("width", [0.2, 1.0])
@pytest.mark.parametrize("mean", [-2.0, 0.3])
def test_the_gaussian_heads_three_probabilities_sum_to_one(mean: float, width: float) -> None:
    total = sum(gaussian(mean, 2.0, vote, width).neg().exp().item() for vote in (1, -1, 0))
    assert total == pytest.approx(1.0, abs=1e-9)


def test_without_spread_the_gaussian_loss_is_the_one_without() -> None:
    a, b, vote = torch.randn(6), torch.randn(6), torch.tensor([1, -1, 0, 1, -1, 0])
    none = torch.full((6,), 1e-4)
    torch.testing.assert_close(
        gaussian_preference_loss(a, b, none, none, vote, tie_width=0.4),
        bradley_terry_ties_loss(a, b, vote, tie_width=0.4),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize(("mean", "std"), [(-2.0, 0.5), (0.0, 1.0), (1.0, 3.0)])
def test_the_quadrature_equals_a_fine_sum_over_the_normal_density(mean: float, std: float) -> None:
    z = torch.linspace(-12, 12, 20001, dtype=torch.double)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    expected = torch.trapezoid(torch.sigmoid(mean + std * z) * density, z).log().neg()
    assert gaussian(mean, std, 1).item() == pytest.approx(expected.item(), abs=2e-5)


def slope_of_spread(mean: float, *, expectation_inside: bool) -> float:
    spread = torch.ones(1, dtype=torch.double, requires_grad=True)
    if expectation_inside:
        loss = gaussian(mean, spread, 1)
    else:  # HPSv3: the mean of the losses
        z = torch.linspace(-12, 12, 20001, dtype=torch.double)
        density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
        gap = mean + spread * z
        loss = torch.trapezoid(bradley_terry_loss(gap, torch.zeros_like(gap)) * density, z)
    loss.backward()
    assert spread.grad is not None
    return spread.grad.item()


def test_a_wrong_model_may_admit_its_doubt_where_hpsv3_may_not() -> None:
    """The slope of the loss over the spread at 1, for a mean gap of -2, 0 and 2 in favour of the clip that won."""
    outside = [slope_of_spread(mean, expectation_inside=False) for mean in (-2.0, 0.0, 2.0)]
    assert outside == pytest.approx([0.116, 0.207, 0.116], abs=2e-3)
    inside = [slope_of_spread(mean, expectation_inside=True) for mean in (-2.0, 0.0, 2.0)]
    assert inside[0] < -0.2 < 0 < inside[2]
    assert inside[1] == pytest.approx(0.0, abs=1e-5)


def test_agreement_at_chance_weighs_nothing_and_certainty_one() -> None:
    assert chance_corrected(1 / 3) == 0 == chance_corrected(0.1)
    assert chance_corrected(1.0) == 1
    assert chance_corrected(2 / 3) == pytest.approx(0.5)

"""The metrics against hand tables, closed forms and scipy."""

from __future__ import annotations

import itertools

import pytest
import torch

from rewards.evaluation.metrics import (
    accuracy_with_ties,
    accuracy_without_ties,
    balanced_accuracy,
    best_tie_threshold,
    confusion,
    expected_calibration_error,
    flip_rate,
    mean_interval,
    paired_interval,
    published_accuracy_with_ties,
    published_accuracy_without_ties,
    ranks,
    reliability,
    spearman,
)

NAN = float("nan")
GAPS = torch.tensor([2.0, -1.0, 0.5, 0.0, NAN, 0.1, -0.2, 3.0])
VERDICTS = torch.tensor([1, -1, -1, 1, 1, 0, 0, 0])


def test_accuracies_of_a_table_made_by_hand():
    # decided: right, right, wrong, cannot tell, could not be scored
    assert accuracy_without_ties(GAPS, VERDICTS) == pytest.approx(2.5 / 5)
    # at 0.3 the exact 0 and the gaps 0.1, -0.2 are ties
    assert accuracy_with_ties(GAPS, VERDICTS, 0.3) == pytest.approx(4 / 8)
    assert confusion(GAPS, VERDICTS, 0.3) == [[1, 0, 1], [0, 2, 1], [0, 1, 1]]
    recalls = (1 / 2 + 2 / 3 + 1 / 3) / 3
    assert balanced_accuracy(GAPS, VERDICTS, 0.3) == pytest.approx(recalls)
    nothing = torch.empty(0)
    assert accuracy_without_ties(nothing, nothing.long()) is None
    assert accuracy_with_ties(nothing, nothing.long(), 0.3) is None
    assert best_tie_threshold(nothing, nothing.long()) == 0.0


@pytest.mark.parametrize("seed", range(8))
def test_the_tie_threshold_is_the_best_of_all_there_are(seed: int):
    generator = torch.Generator().manual_seed(seed)
    gaps = torch.randn(40, generator=generator).mul(4).round() / 4  # many equal sizes, some zero
    verdicts = torch.randint(-1, 2, (40,), generator=generator)
    threshold = best_tie_threshold(gaps, verdicts)
    tried = [-1.0, 0.0, *(gaps.abs() + 1e-6).tolist(), *(gaps.abs() - 1e-6).tolist()]
    best = max(accuracy_with_ties(gaps, verdicts, t) or 0.0 for t in tried)
    assert accuracy_with_ties(gaps, verdicts, threshold) == pytest.approx(best)


def slow_published(gaps: list[float], verdicts: list[int]) -> float:
    """The definition, without running sums: every k >= 1 smallest gaps are ties."""
    order = sorted(range(len(gaps)), key=lambda i: abs(gaps[i]))
    return max(
        (
            sum(verdicts[i] == 0 for i in order[:k])
            + sum(gaps[i] * verdicts[i] > 0 for i in order[k:])
        )
        / len(gaps)
        for k in range(1, len(gaps) + 1)
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_published_accuracy_with_ties_is_its_definition(seed: int):
    generator = torch.Generator().manual_seed(seed)
    gaps = torch.randn(30, generator=generator).mul(2).round().tolist()
    verdicts = torch.randint(-1, 2, (30,), generator=generator).tolist()
    assert published_accuracy_with_ties(gaps, verdicts) == pytest.approx(
        slow_published(gaps, verdicts)
    )


def test_published_metrics_of_pairs_worked_out_by_hand():
    gaps, verdicts = [0.1, -0.5, 2.0, 1.0], [0, -1, 1, -1]
    assert published_accuracy_with_ties(gaps, verdicts) == 3 / 4  # k = 1: tie, right, wrong, right
    assert published_accuracy_without_ties(gaps, verdicts) == pytest.approx(2 / 3)
    assert published_accuracy_with_ties([NAN, 1.0, 0.1], [1, 1, 0]) == pytest.approx(2 / 3)
    assert published_accuracy_without_ties([NAN, 1.0], [1, 1]) == 0.5
    assert published_accuracy_without_ties([0.0], [1]) == 0.0  # an exact 0 is wrong there
    assert published_accuracy_without_ties([1.0], [0]) is None
    with pytest.raises(ValueError, match="at least one pair"):
        published_accuracy_with_ties([], [])


# the leaderboard's "random" row prints 47.42 / 59.07 / 37.25 with ties, 49.86 / 49.64 / 50.40 without
@pytest.mark.parametrize("tie_share", [0.4742, 0.5907, 0.3725])
def test_noise_scores_the_share_of_ties_with_ties_and_one_half_without(tie_share: float):
    generator = torch.Generator().manual_seed(0)
    count = 26_500
    ties = round(tie_share * count)
    sides = torch.randint(0, 2, (count - ties,), generator=generator) * 2 - 1
    verdicts = torch.cat([torch.zeros(ties, dtype=torch.long), sides])
    gaps = torch.randn(count, generator=generator)
    found = published_accuracy_with_ties(gaps.tolist(), verdicts.tolist())
    assert ties / count <= found < ties / count + 0.01  # calling everything a tie is always tried
    without = published_accuracy_without_ties(gaps.tolist(), verdicts.tolist())
    assert without == pytest.approx(0.5, abs=0.02)


def test_calibrated_probabilities_have_no_calibration_error_and_overconfident_ones_have():
    generator = torch.Generator().manual_seed(0)
    gaps = torch.randn(40_000, generator=generator) * 2
    won = torch.rand(40_000, generator=generator) < torch.sigmoid(gaps)
    verdicts = torch.where(won, 1, -1)
    bins = reliability(gaps, verdicts)
    assert sum(b.count for b in bins) == 40_000
    assert expected_calibration_error(bins) < 0.01
    assert all(b.low <= b.confidence <= b.high for b in bins)
    assert expected_calibration_error(reliability(3 * gaps, verdicts)) > 0.1
    assert expected_calibration_error(reliability(3 * gaps, verdicts, temperature=3.0)) < 0.01


def test_the_calibration_error_of_four_pairs_by_hand():
    sure = torch.log(torch.tensor(0.9 / 0.1))  # sigma = 0.9: three of four right, off by 0.15
    gaps = torch.stack([sure, sure, -sure, sure])
    bins = reliability(gaps, torch.tensor([1, 1, -1, -1]))
    assert [(b.count, b.accuracy) for b in bins] == [(4, 0.75)]
    assert expected_calibration_error(bins) == pytest.approx(0.15)
    assert reliability(gaps, torch.zeros(4, dtype=torch.long)) == []
    assert expected_calibration_error([]) is None


def test_rank_correlation_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, generator=generator).mul(3).round()  # ties
    y = x + torch.randn(50, generator=generator).mul(3).round()
    assert spearman(x, y) == pytest.approx(float(stats.spearmanr(x, y).statistic))
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert spearman(torch.tensor([1.0, 2.0, NAN]), torch.tensor([2.0, 1.0, 0.0])) == -1.0
    assert spearman(torch.ones(3), torch.arange(3.0)) is None


def test_the_interval_resamples_groups_and_covers_the_mean():
    values = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    alone = mean_interval(values, list("abcdef"))
    together = mean_interval(values, list("aaaabb"))
    assert together == (0.0, 1.0)  # with two groups, one of them may be drawn twice
    assert alone[0] < 4 / 6 < alone[1]
    assert together[1] - together[0] > alone[1] - alone[0]
    assert mean_interval([], []) is None
    assert paired_interval(values, values, list("abcdef")) == (0.0, 0.0)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth():
    generator = torch.Generator().manual_seed(1)
    held = 0
    for _ in range(100):
        values = (torch.rand(60, generator=generator) < 0.7).double().tolist()
        low, high = mean_interval(values, [str(i) for i in range(60)])
        held += low <= 0.7 <= high
    assert 88 <= held <= 100


def test_flips_are_counted_on_pairs_shown_both_ways():
    forward = torch.tensor([1.0, 1.0, -2.0, NAN, 0.0])
    assert flip_rate(forward, -forward) == 0.0  # the same clip wins either way
    assert flip_rate(forward, forward.abs()) == pytest.approx(2 / 3)  # 'the first one', mostly
    assert flip_rate(torch.tensor([NAN]), torch.tensor([1.0])) is None


def test_a_pointwise_score_never_flips():
    score = {"a": 0.3, "b": -1.0, "c": 0.9}
    pairs = list(itertools.combinations(score, 2))
    forward = torch.tensor([score[x] - score[y] for x, y in pairs])
    backward = torch.tensor([score[y] - score[x] for x, y in pairs])
    assert flip_rate(forward, backward) == 0.0

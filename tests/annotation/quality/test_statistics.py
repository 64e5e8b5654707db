"""Every statistic against a reference library, a closed form, or a simulated jury of known skill."""

from __future__ import annotations

import math
import random
from itertools import combinations

import numpy as np
import pytest

from annotation.quality import agreement, annotators, leaderboard, raters, report
from annotation.quality.votes import Vote, votes_of


def judgment(annotator, task, clips, best=None, worst=None, **more):
    return {
        "annotator": annotator,
        "simulated": False,
        "task_id": task,
        "prompt_id": more.pop("prompt", task),
        "dimension": more.pop("dimension", "motion_quality"),
        "kind": "best_worst",
        "candidates": list(clips),
        "best": best,
        "worst": worst,
        "tie": False,
        "status": "ok",
        "scores": None,
        "constrained": False,
        "seconds": None,
        **more,
    }


# --- agreement -----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", agreement.LEVELS)
def test_alpha_equals_the_krippendorff_package_on_tables_with_holes(level):
    krippendorff = pytest.importorskip("krippendorff")
    rng = np.random.default_rng(3)
    for _ in range(5):
        table = rng.integers(1, 6, size=(4, 30)).astype(float)  # annotators x units
        table[:2] = np.where(rng.random((2, 30)) < 0.6, table[2], table[:2])
        table[rng.random(table.shape) < 0.3] = np.nan
        units = {u: list(table[:, u][~np.isnan(table[:, u])]) for u in range(30)}
        expected = krippendorff.alpha(table, level_of_measurement=level)
        assert agreement.krippendorff_alpha(units, level=level) == pytest.approx(expected)


def test_alpha_is_one_for_agreement_zero_for_chance_and_matches_a_worked_example():
    alpha = agreement.krippendorff_alpha
    assert alpha({i: [i % 2, i % 2] for i in range(10)}) == pytest.approx(1.0)
    rng = random.Random(0)
    chance = alpha({i: [rng.choice((-1, 1)) for _ in range(3)] for i in range(3000)})
    assert chance == pytest.approx(0.0, abs=0.04)
    # Krippendorff (2011), binary data of two observers on ten units: alpha = 0.095
    a = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    b = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert alpha(dict(enumerate(zip(a, b, strict=True)))) == pytest.approx(0.095, abs=5e-4)
    assert alpha({0: [1], 1: [0]}) is None
    assert alpha({0: [1, 1], 1: [1, 1]}) is None
    with pytest.raises(ValueError, match="level is 'rational'"):
        alpha({0: [1, 2]}, level="rational")


def test_the_interval_over_prompts_holds_alpha_and_is_wider_when_a_prompts_pairs_go_together():
    rng = random.Random(1)

    def units(number):
        return {i: [rng.choice((-1, 1)), 1] for i in range(number)}

    apart = {p: units(1) for p in range(200)}
    wholes = {p: {i: [sign, 1] for i in range(10)} for p, sign in enumerate([1, -1] * 10)}
    narrow, wide = agreement.agreement_of(apart), agreement.agreement_of(wholes)
    for found in (narrow, wide):
        assert found.low < found.alpha < found.high
    assert wide.high - wide.low > narrow.high - narrow.low
    assert (wide.num_units, wide.num_prompts) == (200, 20)


def test_observed_and_chance_agreement_give_nominal_alpha():
    rng = random.Random(2)
    units = {p: {0: [rng.choice((-1, 0, 1)) for _ in range(2)]} for p in range(60)}
    found = agreement.agreement_of(units, num_bootstrap=0)
    alpha = (found.observed - found.chance) / (1 - found.chance)
    assert found.alpha == pytest.approx(alpha)
    assert found.low is None


def test_constrained_picks_say_nothing_of_agreement_and_ties_say_all_pairs_are_equal():
    clips = "wxyz"
    rows = [
        judgment("a", "t", clips, 0, 3),
        judgment("b", "t", clips, 3, 0, constrained=True),
        judgment("c", "t", clips, tie=True, status="tie"),
        judgment("d", "t", clips, status="cannot_judge"),
    ]
    votes = votes_of(rows)
    assert {(v.annotator, v.label) for v in votes if (v.clip_a, v.clip_b) == ("w", "z")} == {
        ("a", 1),
        ("c", 0),
    }
    assert len(votes) == 5 + 6


def test_wilson_intervals_equal_scipys_and_never_leave_zero_to_one():
    stats = pytest.importorskip("scipy.stats")
    for hits, number in ((0, 5), (3, 7), (50, 50), (120, 400)):
        found = agreement.wilson(hits, number)
        expected = stats.binomtest(hits, number).proportion_ci(method="wilson")
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert agreement.wilson(0, 0) == agreement.Share(0, 0, 0.0, 1.0)


def test_the_same_best_clip_is_counted_over_pairs_of_people_against_one_in_k():
    rows = [
        judgment(name, "t", "wxyz", best, 3) for name, best in zip("abc", (0, 0, 1), strict=True)
    ]
    share, chance = agreement.best_pick_agreement(rows)["motion_quality"]
    assert (share.hits, share.number, chance) == (1, 3, 0.25)


def test_a_retest_counts_the_pairs_of_a_second_showing_whatever_their_order():
    rows = [
        judgment("a", "t1", "wxyz", 0, 3),
        judgment("a", "t2", "zyxw", 3, 0),  # the same clips again, the other way round
        judgment("b", "t1", "wxyz", 0, 3),
        judgment("b", "t2", "wxyz", 3, 0),
        judgment("c", "t1", "wxyz", 0, 3),
    ]
    found = agreement.retest_agreement(rows)
    assert (found["a"].hits, found["a"].number) == (5, 5)
    assert (found["b"].hits, found["b"].number) == (0, 5)
    assert "c" not in found


# --- annotators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 7, 8])
def test_the_chi_square_tail_is_scipys(degrees):
    stats = pytest.importorskip("scipy.stats")
    for statistic in (0.0, 0.1, 1.0, 7.3, 40.0):
        expected = stats.chi2.sf(statistic, degrees)
        assert annotators.chi_square_tail(statistic, degrees) == pytest.approx(expected, rel=1e-9)


def test_someone_who_always_takes_the_first_place_is_found_and_a_fair_page_is_not():
    rng = random.Random(0)
    lazy = [judgment("a", f"t{i}", "wxyz", 0, 3) for i in range(40)]
    fair = [judgment("a", f"t{i}", "wxyz", *rng.sample(range(4), 2)) for i in range(400)]
    assert annotators.position_bias(lazy)[4].p_value < 1e-6
    assert annotators.position_bias(lazy)[4].best == [40, 0, 0, 0]
    assert annotators.position_bias(fair)[4].p_value > 0.01


def test_too_fast_is_less_than_one_look_at_the_longest_clip():
    clips = [{"sha256": c, "num_frames": 8 * (i + 1), "fps": 2.0} for i, c in enumerate("wxyz")]
    seconds = annotators.play_seconds(clips)
    rows = [
        judgment("a", "t1", "wxyz", 0, 1, seconds=15.9),
        judgment("a", "t2", "wxyz", 0, 1, seconds=16.1),
        judgment("a", "t3", "wxyz", 0, 1),  # nobody measured it
        judgment("b", "t1", "wx", 0, 1, seconds=8.5),
    ]
    found = annotators.too_fast(rows, seconds)
    assert (found["a"].hits, found["a"].number) == (1, 2)
    assert (found["b"].hits, found["b"].number) == (0, 1)


def test_gold_counts_free_picks_and_a_vetoed_right_answer_is_right():
    gold = {("t", "motion_quality"): annotators.GoldAnswer("w", "z")}
    rows = [
        judgment("right", "t", "zyxw", 3, 0),
        judgment("vetoed", "t", "wxyz", 0, 3, status="vetoed"),
        judgment("vetoed", "t", "wxyz", 1, 2, constrained=True),
        judgment("half", "t", "wxyz", 0, 2),
        judgment("shy", "t", "wxyz", status="cannot_judge"),
        judgment("other", "t2", "wxyz", 0, 3),
    ]
    found = annotators.gold_accuracy(rows, gold)
    assert {name: (s.hits, s.number) for name, s in found.items()} == {
        "right": (1, 1),
        "vetoed": (1, 1),
        "half": (0, 1),
        "shy": (0, 1),
    }


def test_a_gold_answer_may_state_one_side_or_a_tie():
    row = judgment("a", "t", "wxyz", 0, 2)
    tied = judgment("a", "t", "wxyz", tie=True, status="tie")
    assert annotators.GoldAnswer(best="w").is_met_by(row)
    assert not annotators.GoldAnswer(worst="z").is_met_by(row)
    assert not annotators.GoldAnswer(tie=True).is_met_by(row)
    assert annotators.GoldAnswer(tie=True).is_met_by(tied)
    assert not annotators.GoldAnswer(best="w").is_met_by(tied)


def test_veto_rates_count_clashes_of_free_picks_per_pair_of_dimensions():
    rows = [
        judgment("a", "t", "wxyz", 0, 3, dimension="motion_quality"),
        judgment("a", "t", "wxyz", 3, 1, dimension="aesthetic_quality", status="vetoed"),
        judgment("a", "t", "wxyz", 0, 1, dimension="aesthetic_quality", constrained=True),
        judgment("a", "t", "wxyz", 0, 2, dimension="prompt_following"),
    ]
    found = {pair: (s.hits, s.number) for pair, s in annotators.veto_rates(rows).items()}
    assert found == {
        ("aesthetic_quality", "motion_quality"): (1, 1),
        ("aesthetic_quality", "prompt_following"): (0, 1),
        ("motion_quality", "prompt_following"): (0, 1),
    }


def test_uncorrelated_dimensions_clash_as_often_as_counting_says():
    """Two random (best, worst) of four clips clash in 5 of 12 cases: 2 / 4 - P(both sides), by inclusion and exclusion."""
    pairs = [(b, w) for b in range(4) for w in range(4) if b != w]
    expected = sum(p[0] == q[1] or p[1] == q[0] for p in pairs for q in pairs) / 144
    rng = random.Random(5)
    rows = [
        judgment("a", f"t{i}", "wxyz", *rng.choice(pairs), dimension=d)
        for i in range(4000)
        for d in ("x", "y")
    ]
    assert annotators.veto_rates(rows)["x", "y"].share == pytest.approx(expected, abs=0.03)


# --- rater models --------------------------------------------------------------------------------


def jury(skills, *, num_tasks=90, num_clips=4, seed=0):
    """Best and worst of four clips by annotators who see utilities through noise; skill is 1 / noise, negative inverts."""
    rng = random.Random(seed)
    rows = []
    for task in range(num_tasks):
        clips = [f"c{task}-{i}" for i in range(num_clips)]
        truth = [rng.gauss(0, 1) for _ in clips]
        for name, skill in skills.items():
            seen = [skill * q + rng.gauss(0, 1) for q in truth]
            order = sorted(range(num_clips), key=seen.__getitem__)
            rows.append(judgment(name, f"t{task}", clips, order[-1], order[0]))
    return rows


SKILLS = {"expert": 4.0, "good": 1.5, "weak": 0.6, "guesses": 0.0, "inverted": -1.5}


def test_both_rater_models_recover_the_order_of_a_jury_of_known_skill():
    found = raters.rate_annotators(votes_of(jury(SKILLS)))
    assert [score.annotator for score in found] == list(SKILLS)
    assert sorted(found, key=lambda s: -s.skill) == found
    by_name = {score.annotator: score for score in found}
    assert abs(by_name["guesses"].ability) < 0.2
    assert by_name["inverted"].ability < -0.2
    assert by_name["expert"].num_votes == 90 * 5


def test_dawid_skene_finds_the_confusion_matrices_that_made_the_labels():
    rng = np.random.default_rng(0)
    right = [(0.9, 0.8), (0.7, 0.9), (0.6, 0.6), (0.85, 0.85), (0.75, 0.7)]
    confusions = np.array([[[p, 1 - p], [1 - q, q]] for p, q in right])
    truth = rng.integers(0, 2, 3000)
    units, who, labels = [], [], []
    for unit, true in enumerate(truth):
        for rater, confusion in enumerate(confusions):
            units.append(unit)
            who.append(rater)
            labels.append(rng.choice(2, p=confusion[true]))
    found = raters.dawid_skene(units, who, labels, num_labels=2)
    assert found.confusion == pytest.approx(confusions, abs=0.06)
    assert (found.posterior.argmax(axis=1) == truth).mean() > 0.85
    assert found.posterior.sum(axis=1) == pytest.approx(1.0)


def test_ties_widen_the_rater_models_tie_band():
    rng = random.Random(0)
    votes = [(2 * i, 2 * i + 1, i % 3, rng.choice((-1, 0, 0, 1))) for i in range(300)]
    model = raters.rater_bradley_terry(*zip(*votes, strict=True))
    assert model.tie_width > 0.3
    decided = [(a, b, r, label or 1) for a, b, r, label in votes]
    assert raters.rater_bradley_terry(*zip(*decided, strict=True)).tie_width == 0.0


# --- leaderboards --------------------------------------------------------------------------------


def table_of_wins(seed=0, num_models=5, number=400):
    rng = np.random.default_rng(seed)
    strength = rng.normal(size=num_models)
    wins, games = np.zeros((num_models, num_models)), []
    for _ in range(number):
        a, b = rng.choice(num_models, 2, replace=False)
        if rng.random() > 1 / (1 + math.exp(strength[b] - strength[a])):
            a, b = b, a
        wins[a, b] += 1
        games.append((int(a), int(b)))
    return wins, games


def test_bradley_terry_equals_choix_with_and_without_a_prior():
    choix = pytest.importorskip("choix")
    wins, games = table_of_wins()
    ours, nu = leaderboard.fit_bradley_terry(wins, np.zeros_like(wins), prior=0.0)
    assert nu is None
    assert ours == pytest.approx(choix.ilsr_pairwise(5, games), abs=1e-6)
    held, _ = leaderboard.fit_bradley_terry(wins, np.zeros_like(wins), prior=2.0)
    assert held == pytest.approx(choix.opt_pairwise(5, games, alpha=1.0, tol=1e-10), abs=1e-4)


def test_ties_give_what_a_general_optimiser_finds_on_davidsons_likelihood():
    optimize = pytest.importorskip("scipy.optimize")
    wins, _ = table_of_wins(seed=4, number=200)
    ties = np.round(np.random.default_rng(1).random((5, 5)) * 8)
    ties = np.triu(ties, 1) + np.triu(ties, 1).T

    def negative(parameters):
        s, log_nu = np.append(parameters[:4], -parameters[:4].sum()), parameters[4]
        total = 0.0
        for i, j in combinations(range(5), 2):
            weights = np.array([s[i], s[j], log_nu + (s[i] + s[j]) / 2])
            log_p = weights - np.logaddexp.reduce(weights)
            total -= np.array([wins[i, j], wins[j, i], ties[i, j]]) @ log_p
        return total

    best = optimize.minimize(negative, np.zeros(5), tol=1e-12)
    ours, nu = leaderboard.fit_bradley_terry(wins, ties, prior=0.0)
    assert ours[:4] == pytest.approx(best.x[:4], abs=1e-4)
    assert nu == pytest.approx(best.x[4], abs=1e-4)


def votes_between(outcomes):
    """outcomes: (prompt, model of a, model of b, label); clips are named after their model."""
    model_of, votes = {}, []
    for index, (prompt, a, b, label) in enumerate(outcomes):
        clip_a, clip_b = f"{index}-a", f"{index}-b"
        model_of |= {clip_a: a, clip_b: b}
        votes.append(Vote("x", prompt, f"t{index}", "motion_quality", clip_a, clip_b, label))
    return votes, model_of


def test_the_leaderboard_ranks_models_keeps_one_that_never_lost_finite_and_its_interval_holds_it():
    outcomes = [(f"p{i % 30}", "new", "old", 1 if i % 4 else -1) for i in range(120)]
    outcomes += [(f"p{i % 30}", "best", "old", 1) for i in range(30)]
    outcomes += [(f"p{i % 30}", "old", "old", 1) for i in range(30)]
    ranks = leaderboard.leaderboard(*votes_between(outcomes), num_bootstrap=100)
    assert [rank.name for rank in ranks] == ["best", "new", "old"]
    assert all(rank.low <= rank.rating <= rank.high for rank in ranks)
    assert all(math.isfinite(rank.high) for rank in ranks)
    new, old = ranks[1], ranks[2]
    assert (new.wins, new.losses, old.losses) == (90, 30, 120)
    # three wins in four are ln 3 in logits; the prior takes next to nothing from it
    assert new.rating - old.rating == pytest.approx(leaderboard.ELO_SCALE * math.log(3), rel=0.01)


def test_gsb_is_good_less_bad_over_all_and_its_interval_resamples_prompts():
    outcomes = [
        (f"p{i}", "new", "old", label) for i, label in enumerate([1] * 50 + [0] * 30 + [-1] * 20)
    ]
    (found,) = leaderboard.gsb(*votes_between(outcomes))
    assert (found.good, found.same, found.bad, found.score) == (50, 30, 20, 0.3)
    assert found.low < 0.3 < found.high
    # the standard error of the mean of +1 x 50, 0 x 30, -1 x 20
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 0.78 / 10, rel=0.15)


def test_mean_opinion_scores_are_means_per_model_and_dimension():
    rows = [
        judgment("a", "t1", ["n1", "o1"], scores=[5.0, 3.0], kind="score"),
        judgment("a", "t2", ["n2", "o2"], scores=[4.0, 1.0], kind="score"),
    ]
    model_of = {"n1": "new", "n2": "new", "o1": "old", "o2": "old"}
    found = {s.name: s for s in leaderboard.opinion_scores(rows, model_of)}
    assert (found["new"].mean, found["old"].mean, found["new"].number) == (4.5, 2.0, 2)
    assert (found["old"].low, found["old"].high) == (1.0, 3.0)


def test_the_regression_finds_the_weights_that_decided_the_wins_and_equals_scipys():
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 3))
    truth = np.array([2.0, 1.0, 0.0])
    won = rng.random(3000) < 1 / (1 + np.exp(-x @ truth))
    prompts = [f"p{i % 100}" for i in range(3000)]
    found = leaderboard.dimension_weights(["a", "b", "c"], x, won, prompts, prior=0.0)
    sign = np.where(won, 1, -1)
    best = optimize.minimize(lambda beta: np.logaddexp(0, -sign * (x @ beta)).sum(), np.zeros(3))
    assert [w.coefficient for w in found] == pytest.approx(best.x, abs=1e-4)
    assert [w.share for w in found] == pytest.approx([2 / 3, 1 / 3, 0.0], abs=0.04)
    assert all(w.low < true < w.high for w, true in zip(found, truth, strict=True))


def test_wins_of_pairs_are_explained_by_the_scores_of_their_dimensions():
    """People whose verdict follows motion alone give it all the weight, and its interval is above zero."""
    rng = random.Random(0)
    rows, clips = [], []
    for task in range(150):
        pair = [f"c{task}-{i}" for i in range(2)]
        clips += [{"sha256": clip, "model": f"m{i}"} for i, clip in enumerate(pair)]
        scores = {name: [rng.randint(1, 5) for _ in pair] for name in ("look", "motion")}
        for name, given in scores.items():
            more = {"dimension": name, "kind": "score", "prompt": f"p{task}"}
            rows.append(judgment("rater", f"s{task}", pair, scores=given, **more))
        gap = scores["motion"][0] - scores["motion"][1] + rng.gauss(0, 1)
        for name in ("look", "motion", "structure"):  # two of three say which is better
            same = {"tie": True, "status": "tie"} if name == "structure" else {}
            pick = () if same else ((0, 1) if gap > 0 else (1, 0))
            more = {"dimension": name, "kind": "gsb", "prompt": f"p{task}", **same}
            rows.append(judgment("judge", f"g{task}", pair, *pick, **more))
    found = {w.dimension: w for w in report._dimension_weights(report.Judged(rows, clips, {}))}
    assert found["motion"].share > 0.85
    assert found["motion"].low > 0
    assert found["look"].low < 0 < found["look"].high
    only_pairs = [row for row in rows if row["kind"] == "gsb"]
    assert report._dimension_weights(report.Judged(only_pairs, clips, {})) == []


def test_best_worst_counting_scores_are_between_minus_one_and_one():
    rows = [judgment("a", "t", "wxyz", 0, 3), judgment("b", "t", "wxyz", 0, 2)]
    rows += [judgment("c", "t", "wxyz", 3, 0, constrained=True)]
    found = leaderboard.best_worst_scores(rows)
    assert found["w", "motion_quality"] == 1.0
    assert found["x", "motion_quality"] == 0.0
    assert found["z", "motion_quality"] == -0.5

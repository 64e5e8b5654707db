from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annotation.records import DIMENSIONS, Choice
from annotation.rules import admissible_pairs, check_choices, clashes, pair_clashes

FOUR = DIMENSIONS[:4]
pairs = st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(lambda pair: pair[0] != pair[1])


@given(pairs, pairs)
def test_a_clash_is_mutual_and_a_pair_never_clashes_with_itself(pair, other):
    assert pair_clashes(pair, other) == pair_clashes(other, pair)
    assert not pair_clashes(pair, pair)
    assert pair_clashes(pair, pair[::-1])


@given(st.lists(pairs, min_size=4, max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_whether_anything_clashes_does_not_depend_on_the_order_asked(picked, rng):
    picks = dict(zip(FOUR, picked, strict=True))
    order = list(FOUR)
    rng.shuffle(order)
    shuffled = clashes({name: picks[name] for name in order})
    assert {frozenset((c.dimension, c.other)) for c in shuffled} == {
        frozenset((c.dimension, c.other)) for c in clashes(picks)
    }
    assert all(order.index(c.dimension) > order.index(c.other) for c in shuffled), (
        "the later pick is the vetoed one"
    )


@given(st.lists(pairs, min_size=4, max_size=4), st.permutations(range(4)))
@settings(max_examples=60)
def test_renaming_the_clips_changes_no_clash(picked, names):
    renamed = {d: (names[b], names[w]) for d, (b, w) in zip(FOUR, picked, strict=True)}
    original = dict(zip(FOUR, picked, strict=True))
    assert [(c.dimension, c.other) for c in clashes(renamed)] == [
        (c.dimension, c.other) for c in clashes(original)
    ]


def test_a_tie_clashes_with_nothing():
    picks = {"motion_quality": (0, 1), "aesthetic_quality": (1, 0)}
    assert len(clashes(picks)) == 1
    assert clashes(picks, ties={"motion_quality"}) == []


def test_the_reason_names_clip_and_both_dimensions():
    (clash,) = clashes({"motion_quality": (0, 1), "aesthetic_quality": (2, 0)})
    assert clash.reason == "A is your worst for aesthetic_quality but your best for motion_quality"


@given(st.lists(pairs, min_size=3, max_size=3))
@settings(max_examples=60)
def test_admissible_pairs_are_exactly_those_that_do_not_clash(picked):
    others = dict(zip(FOUR[:3], picked, strict=True))
    open_pairs = admissible_pairs(4, FOUR[3], others)
    for best in range(4):
        for worst in range(4):
            if best != worst:
                clash = any(
                    c.dimension == FOUR[3] for c in clashes({**others, FOUR[3]: (best, worst)})
                )
                assert ((best, worst) in open_pairs) == (not clash)


def answered(**changes: Choice) -> list[Choice]:
    return [changes.get(name, Choice(name, best=0, worst=1)) for name in FOUR]


def test_a_clean_answer_has_no_problem():
    assert check_choices(answered(), dimensions=FOUR, num_clips=4) == []


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (
            Choice("motion_quality", best=1, worst=0),
            "A is your worst for motion_quality but your best",
        ),
        (Choice("motion_quality", best=0, worst=0), "A cannot be both best and worst"),
        (Choice("motion_quality", best=0, worst=4), "was not shown (4 clips"),
        (Choice("motion_quality", best=0), "needs both a best and a worst"),
        (Choice("motion_quality"), "best and worst are missing"),
        (Choice("motion_quality", best=0, worst=1, status="tie"), "tie takes no best or worst"),
        (Choice("motion_quality", status="fine"), "status 'fine' is not one of ok, tie"),
        (Choice("motion_quality", status="no_valid_pair"), "must state the free pick"),
        (Choice("motion_quality", best=0, worst=1, constrained=True), "must state the free pick"),
        (
            Choice("motion_quality", status="no_valid_pair", first_best=0, first_worst=1),
            "clashes with no other dimension",
        ),
    ],
)
def test_each_wrong_answer_is_named(choice, words):
    problems = check_choices(answered(motion_quality=choice), dimensions=FOUR, num_clips=4)
    assert any(words in problem for problem in problems), problems


def test_missing_double_and_unasked_dimensions_are_named():
    choices = [
        Choice(FOUR[0], 0, 1),
        Choice(FOUR[0], 0, 1),
        Choice("preservation", 0, 1),
        Choice(FOUR[1], 0, 1),
    ]
    text = "\n".join(check_choices(choices, dimensions=FOUR, num_clips=4))
    assert "prompt_following is answered 2 times" in text
    assert "preservation was not asked" in text
    assert "structural_stability is not answered" in text


def test_both_ways_out_of_a_veto_are_accepted():
    free = {"first_best": 1, "first_worst": 0}
    for way_out in (
        Choice("motion_quality", best=2, worst=3, constrained=True, **free),
        Choice("motion_quality", status="no_valid_pair", **free),
        Choice("motion_quality", status="tie", constrained=True, **free),
    ):
        assert check_choices(answered(motion_quality=way_out), dimensions=FOUR, num_clips=4) == []


def test_independent_dimensions_veto_most_tasks():
    """With unrelated dimensions the rule vetoes something in most tasks: why those picks must be kept, not thrown away."""
    rng = random.Random(0)
    vetoed = (
        sum(bool(clashes({d: tuple(rng.sample(range(4), 2)) for d in FOUR})) for _ in range(2000))
        / 2000
    )
    assert 0.7 < vetoed < 0.99

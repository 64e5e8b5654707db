"""Simulated annotators: their noise, bias and carelessness are as stated, and they live by the rules of the page."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from annotation.api.app import create_app
from annotation.api.server import running_server
from annotation.export import ExportQuery, export_preferences
from annotation.records import ClipRecord, ClipView, TaskView, read_preferences
from annotation.rules import check_choices, clashes
from annotation.store import Store
from generator.toygold import measure
from generator.toyworld import prompt_split, render, scene_from_caption
from reelhf.errors import UserError
from reelhf.video import write_video
from rlhf.simulated import (
    TYPICAL_SPREAD,
    AnnotatorProfile,
    Impression,
    SimulatedAnnotator,
    annotator_ceiling,
    default_panel,
    run_annotators,
)

DIMENSIONS = ("prompt_following", "motion_quality", "aesthetic_quality", "structural_stability")


def task(index: int, dimensions: tuple[str, ...] = DIMENSIONS, num_clips: int = 4) -> TaskView:
    clips = tuple(ClipView("ABCD"[slot], f"/media/{index}-{slot}") for slot in range(num_clips))
    return TaskView(
        presentation=f"show-{index}",
        prompt=f"prompt {index}",
        language="en",
        task_kind="t2v",
        dimensions=dimensions,
        questions={},
        clips=clips,
        first_frame_url=None,
        fps=8.0,
        num_frames=9,
        guideline_version="test",
        lease_seconds=60,
    )


def impressions(rng: random.Random, index: int, num_clips: int = 4) -> list[Impression]:
    """Clips whose dimensions are unrelated, spread as the constants say."""
    return [
        Impression(
            {d: 0.5 + rng.gauss(0, TYPICAL_SPREAD[d]) for d in DIMENSIONS},
            brightness=rng.gauss(0.5, 0.1),
            key=f"clip {index} {slot}",
        )
        for slot in range(num_clips)
    ]


def chi_square_p(counts: list[int]) -> float:
    """Upper tail of the chi-square test for uniformity over four slots (3 degrees of freedom)."""
    mean = sum(counts) / len(counts)
    x = sum((count - mean) ** 2 / mean for count in counts)
    return math.erfc(math.sqrt(x / 2)) + math.sqrt(2 * x / math.pi) * math.exp(-x / 2)


@pytest.mark.parametrize("noise", [0.3, 0.8, 2.0])
def test_the_stated_noise_gives_the_agreement_that_theory_expects(noise):
    # two clips whose truth differs by g; the annotator sees g + sqrt(2) noise: right with Phi(g / (sqrt(2) noise))
    gap, tasks = 0.6, 1500
    annotator = SimulatedAnnotator(AnnotatorProfile("a", noise=noise, tie_width=0.0))
    right = 0
    for index in range(tasks):
        better = {"motion_quality": 0.5 + gap * TYPICAL_SPREAD["motion_quality"]}
        seen = [
            Impression(better, 0.5, f"{index} x"),
            Impression({"motion_quality": 0.5}, 0.5, f"{index} y"),
        ]
        verdict = annotator.verdict(task(index, ("motion_quality",), 2), seen)
        right += verdict.choices[0].best == 0
    expected = 0.5 * (1 + math.erf(gap / (2 * noise)))
    assert right / tasks == pytest.approx(expected, abs=3 * math.sqrt(0.25 / tasks))


def test_careless_annotators_answer_at_random_at_the_stated_rate():
    annotator = SimulatedAnnotator(
        AnnotatorProfile("a", noise=0.0, careless_rate=0.4, tie_width=0.0)
    )
    rng, right, tasks = random.Random(0), 0, 1500
    for index in range(tasks):
        seen = impressions(rng, index)
        choice = annotator.verdict(task(index, ("aesthetic_quality",)), seen).choices[0]
        true = max(range(4), key=lambda slot: seen[slot].gold["aesthetic_quality"])
        right += choice.best == true
    assert right / tasks == pytest.approx(0.6 + 0.4 / 4, abs=0.04)


def test_without_slot_bias_the_best_slot_is_uniform_and_with_it_that_shows():
    p = {}
    for bias in (0.0, 0.8):
        annotator = SimulatedAnnotator(AnnotatorProfile("a", slot_bias=bias))
        rng, slots = random.Random(1), Counter()
        for index in range(500):
            verdict = annotator.verdict(task(index), impressions(rng, index))
            slots.update(c.first_best for c in (x.with_first() for x in verdict.choices))
        p[bias] = chi_square_p([slots[slot] for slot in range(4)])
    assert p[0.0] > 0.01
    assert p[0.8] < 1e-6


def test_the_default_panel_has_no_slot_bias_and_its_halves_are_alike():
    panel = default_panel(8, seed=3)
    assert len({profile.name for profile in panel}) == 8
    assert all(profile.slot_bias == 0 for profile in panel)
    assert sum(profile.careless_rate > 0 for profile in panel) == 1
    assert sum(profile.brightness_bias > 0 for profile in panel) == 1
    halves = [sum(p.noise for p in half) / 4 for half in (panel[0::2], panel[1::2])]
    assert halves[0] == pytest.approx(halves[1], abs=0.15)
    assert default_panel(8, seed=3) == panel != default_panel(8, seed=4)


def test_who_likes_brightness_prefers_the_brighter_of_two_equals():
    def share(bias: float) -> float:
        annotator = SimulatedAnnotator(AnnotatorProfile("a", brightness_bias=bias, tie_width=0.0))
        wins = 0
        for index in range(400):
            same = dict.fromkeys(DIMENSIONS, 0.5)
            seen = [Impression(same, 0.6, f"{index} x"), Impression(same, 0.5, f"{index} y")]
            wins += annotator.verdict(task(index, DIMENSIONS[:1], 2), seen).choices[0].best == 0
        return wins / 400

    assert share(0.0) == pytest.approx(0.5, abs=0.08)
    assert share(0.5) > 0.75


def test_equal_clips_are_a_tie():
    annotator = SimulatedAnnotator(AnnotatorProfile("a", noise=0.01))
    seen = [Impression(dict.fromkeys(DIMENSIONS, 0.5), 0.5, str(slot)) for slot in range(4)]
    assert {choice.status for choice in annotator.verdict(task(0), seen).choices} == {"tie"}


def test_every_verdict_obeys_the_rule_and_keeps_the_free_pick():
    rng, kinds = random.Random(2), Counter()
    annotator = SimulatedAnnotator(AnnotatorProfile("a", noise=0.3))
    for index in range(300):
        order = tuple(rng.sample(DIMENSIONS, 4))
        seen = impressions(rng, index)
        choices = annotator.verdict(task(index, order), seen).choices
        assert check_choices(choices, dimensions=order, num_clips=4) == []
        assert tuple(choice.dimension for choice in choices) == order
        picks = {c.dimension: (c.best, c.worst) for c in choices if c.status == "ok"}
        assert clashes(picks) == []
        for choice in choices:
            kinds[choice.status, choice.constrained] += 1
            if choice.constrained or choice.status == "no_valid_pair":
                vetoed = {**picks, choice.dimension: (choice.first_best, choice.first_worst)}
                assert clashes(vetoed)  # the free pick really clashed
        # the free pick is the same whatever was asked before it
        alone = annotator.verdict(task(index, order[-1:]), seen).choices[0].with_first()
        last = choices[-1].with_first()
        assert (alone.first_best, alone.first_worst) == (last.first_best, last.first_worst)
    assert (
        kinds["ok", True] > 50
    )  # unrelated dimensions: the rule vetoes many picks, and most find another pair
    assert kinds["no_valid_pair", False] > 5
    assert kinds["ok", False] > 300


def test_opinions_depend_on_the_clip_not_on_the_slot_or_the_time():
    annotator = SimulatedAnnotator(AnnotatorProfile("a", noise=1.0), seed=5)
    seen = impressions(random.Random(3), 0)
    one = annotator.verdict(task(0, DIMENSIONS[:1]), seen).choices[0]
    two = annotator.verdict(task(0, DIMENSIONS[:1]), seen[::-1]).choices[0]
    assert (one.best, one.worst) == (3 - two.best, 3 - two.worst)
    other = [
        SimulatedAnnotator(AnnotatorProfile("a", noise=1.0), seed=s).verdict(task(0), seen)
        for s in range(6, 12)
    ]
    assert any(verdict.choices[0] != one for verdict in other)


def test_an_impossible_profile_or_a_missing_password_is_one_clear_line():
    with pytest.raises(UserError, match="annotator a: noise and tie_width"):
        AnnotatorProfile("a", careless_rate=1.5)
    with pytest.raises(UserError, match="no credentials for annotator careful-2"):
        run_annotators(
            "http://127.0.0.1:1", {"careful-1": ("x", "y")}, default_panel(2), gold=measure
        )


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Six toy tasks with clips of known order, judged over HTTP by four annotators, each task by two."""
    folder = tmp_path_factory.mktemp("judged")
    records = []
    for index, prompt in enumerate(prompt_split("feedback", 6)):
        scene = scene_from_caption(prompt)
        for k in range(4):
            frames = render(scene, num_frames=5, size=32, fps=8, seed=k)
            frames = (1 - 0.2 * k) * frames + 0.2 * k * frames.mean((2, 3), keepdim=True)
            noise = torch.Generator().manual_seed(index * 4 + k)
            frames = (frames + 0.04 * k * torch.randn(frames.shape, generator=noise)).clamp(0, 1)
            path = folder / f"{index}-{k}.mp4"
            write_video(path, frames, 8)
            records.append(ClipRecord(path=path, prompt=prompt, model="toy", stage="base", seed=k))
    panel = default_panel(4)
    with Store.open(folder / "project") as store:
        ids = store.add_clips(records)
        store.create_tasks([ids[i : i + 4] for i in range(0, len(ids), 4)], need=2)
        logins = {}
        for profile in panel:
            password = f"long password of {profile.name}"
            store.add_user(f"sim {profile.name}", password, simulated=True)
            logins[profile.name] = (f"sim {profile.name}", password)
        with running_server(create_app(store, page=False)) as url:
            counts = run_annotators(url, logins, panel, gold=measure)
            again = run_annotators(url, logins, panel, gold=measure)
        export_preferences(store, folder / "preferences", ExportQuery(include_implied=True))
    return counts, again, read_preferences(folder / "preferences")


def test_a_panel_judges_everything_once_over_http_in_equal_shares(judged):
    counts, again, data = judged
    assert counts["judgments"] == 12
    assert counts["refused"] == 0
    assert counts["ok"] + counts["tie"] + counts["no_valid_pair"] == 12 * 4
    assert max(counts["per_annotator"].values()) - min(counts["per_annotator"].values()) <= 1
    assert again["judgments"] == 0
    assert all(row["simulated"] for row in data.judgments)
    assert len({row["annotator"] for row in data.judgments}) == 4


def test_the_ceiling_is_high_for_gold_itself_and_low_for_its_opposite(judged):
    _, _, data = judged
    ceiling = annotator_ceiling(data, measure)
    assert ceiling["aesthetic_quality"]["n"] >= 6
    assert ceiling["aesthetic_quality"]["accuracy"] > 0.85

    def opposite(frames, prompt, fps):
        return {name: -value for name, value in measure(frames, prompt, fps).items()}

    for dimension, row in annotator_ceiling(data, opposite).items():
        assert row["accuracy"] == pytest.approx(1 - ceiling[dimension]["accuracy"])
    one = data.judgments[0]["annotator"]
    part = annotator_ceiling(data, measure, annotators={one})
    assert sum(row["n"] for row in part.values()) < sum(row["n"] for row in ceiling.values())

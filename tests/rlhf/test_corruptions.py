"""Named corruptions: each keeps the clip's form, grows with its strength and hurts the dimension it says it hurts."""

from __future__ import annotations

import random

import pytest
import torch

from generator.toygold import GOLD_DIMENSIONS, measure
from generator.toyworld import caption, render, sample_scene
from reelhf.errors import UserError
from rlhf.corruptions import CORRUPTIONS, SWAPPED_CAPTION, corrupt, corrupted_gold

EVERY = sorted(CORRUPTIONS)


def moving(n: int, size: int = 128):
    rng = random.Random(0)
    found = []
    while len(found) < n:
        scene = sample_scene(rng, "rich")
        if scene.motion != "still":
            found.append((scene, render(scene, num_frames=9, size=size, fps=8, seed=len(found))))
    return found


@pytest.mark.parametrize("name", EVERY)
def test_form_and_range_stay_and_the_same_seed_spoils_alike(name):
    frames = moving(1, 48)[0][1][:, :, :32]  # not square
    spoilt = corrupt(name, frames, strength=0.7, seed=3)
    assert spoilt.shape == frames.shape
    assert spoilt.min() >= 0
    assert spoilt.max() <= 1
    assert torch.equal(spoilt, corrupt(name, frames, strength=0.7, seed=3))
    assert torch.equal(corrupt(name, frames, strength=0), frames)
    assert not torch.equal(spoilt, frames)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_each_corruption_lowers_its_own_dimension_most(name, strength):
    clips = moving(20)
    right = 0
    for index, (scene, frames) in enumerate(clips):
        before = measure(frames, caption(scene), 8)
        after = measure(corrupt(name, frames, strength=strength, seed=index), caption(scene), 8)
        losses = {d: before[d] - after[d] for d in GOLD_DIMENSIONS}
        right += max(losses, key=losses.__getitem__) == CORRUPTIONS[name].dimension
    assert right >= 0.9 * len(clips)


@pytest.mark.parametrize("name", ["blur", "noise", "blocks", "flicker", "warp", "freeze"])
def test_more_of_it_is_worse(name):
    dimension = CORRUPTIONS[name].dimension
    for index, (scene, frames) in enumerate(moving(5)):
        scores = [
            measure(corrupt(name, frames, strength=s, seed=index), caption(scene), 8)[dimension]
            for s in (0.0, 0.35, 0.7, 1.0)
        ]
        assert scores == sorted(scores, reverse=True)


def test_corruptions_of_time_show_only_frames_of_the_clip():
    frames = torch.rand(3, 9, 8, 8, generator=torch.Generator().manual_seed(0))
    originals = {frame.numpy().tobytes() for frame in frames.unbind(1)}
    for name in ("freeze", "shuffle", "reverse", "stutter"):
        spoilt = corrupt(name, frames)
        assert {frame.numpy().tobytes() for frame in spoilt.unbind(1)} <= originals
        assert CORRUPTIONS[name].needs_motion
    assert torch.equal(corrupt("reverse", corrupt("reverse", frames)), frames)
    assert torch.equal(corrupt("freeze", frames), frames[:, :1].expand_as(frames))


def test_what_an_oracle_says_follows_name_and_strength():
    assert set(corrupted_gold(None, 0.0, GOLD_DIMENSIONS).values()) == {1.0}
    blurred = corrupted_gold("blur", 0.8, GOLD_DIMENSIONS)
    assert min(blurred, key=blurred.__getitem__) == "aesthetic_quality"
    assert blurred["aesthetic_quality"] == pytest.approx(0.2)
    assert corrupted_gold("blur", 0.4, GOLD_DIMENSIONS)["aesthetic_quality"] > 0.2
    swapped = corrupted_gold(SWAPPED_CAPTION, 1.0, GOLD_DIMENSIONS)
    assert swapped["prompt_following"] == 0
    assert swapped["motion_quality"] == 1


def test_an_unknown_name_or_strength_is_one_clear_line():
    with pytest.raises(
        UserError, match=r"corruption 'blurr'; expected one of .*Did you mean 'blur'"
    ):
        corrupt("blurr", torch.zeros(3, 1, 8, 8))
    with pytest.raises(UserError, match=r"corruption strength 1\.5; expected 0 to 1"):
        corrupt("blur", torch.zeros(3, 1, 8, 8), strength=1.5)

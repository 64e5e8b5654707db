"""The reading of an encoder's states over time: paths, speeds, and how far they are from what a prompt asks."""

from __future__ import annotations

import pytest
import torch

from rewards.temporal import PromptAim, TemporalProbe, over_time

NAMES = ("level", "velocity", "speed", "unrest")
TIMES, SIDE, HIDDEN, QUERIES, HEADS = 5, 8, 16, 2, 2


def read(probe: TemporalProbe, tokens: torch.Tensor, seconds: float) -> dict[str, torch.Tensor]:
    """Name of a feature -> what the probe says of it: of what it finds, and of where ("path …")."""
    features = probe(tokens, (TIMES, SIDE, SIDE), torch.full((len(tokens),), seconds))
    assert features.shape[1] == probe.features
    found, course = features.split((probe.features - probe.course, probe.course), dim=1)
    spots = QUERIES * HEADS
    sizes = (2 * spots, 2 * spots, spots, spots, QUERIES, QUERIES)
    names = [*NAMES, *(f"path {name}" for name in NAMES), "whole speed", "whole unrest"]
    parts = [*found.chunk(4, dim=1), *course.split(sizes, dim=1)]
    return dict(zip(names, parts, strict=True))


@pytest.fixture
def probe() -> TemporalProbe:
    torch.manual_seed(0)
    return TemporalProbe(HIDDEN, num_queries=QUERIES, num_heads=HEADS)


def test_the_same_pictures_shown_faster_move_faster(probe):
    """Velocity is per second: twice the frame rate is twice the speed, and nothing else of what the probe reads changes."""
    tokens = torch.randn(2, TIMES * SIDE * SIDE, HIDDEN)
    slow, fast = read(probe, tokens, 0.25), read(probe, tokens, 0.125)
    for name, before in slow.items():
        gain = 2.0 if name.split()[-1] in ("velocity", "speed") else 1.0
        torch.testing.assert_close(fast[name], gain * before, msg=name, rtol=1e-3, atol=1e-3)
    assert (slow["speed"] >= 0).all()
    # a still clip has no velocity, whatever its rate
    still = read(probe, tokens[:, : SIDE * SIDE].repeat(1, TIMES, 1), 0.25)
    assert still["velocity"].abs().max() < 1e-5
    assert still["path velocity"].abs().max() < 1e-5


def test_a_path_is_straight_wherever_it_lies_and_whichever_way_it_goes(probe):
    """One odd patch that walks a cell per time: attention by content alone sees the same speed right, down, and elsewhere, and no unrest."""
    torch.nn.init.zeros_(probe.place.weight)  # content alone
    probe.queries.data *= 100  # attention that has found something
    ground, odd = torch.randn(2, HIDDEN)
    tokens = ground.repeat(3, TIMES, SIDE, SIDE, 1)
    for time in range(TIMES):
        tokens[0, time, 1, 1 + time] = odd  # to the right
        tokens[1, time, 5, 2 + time] = odd  # the same, elsewhere
        tokens[2, time, 1 + time, 4] = odd  # down
    seen = read(probe, tokens.flatten(1, 3), 0.25)
    right, elsewhere, down = seen["path velocity"].unflatten(1, (-1, 2))
    assert right[:, 1].abs().min() > 1e-4  # places are (down, right)
    torch.testing.assert_close(right, elsewhere)
    torch.testing.assert_close(down, right.flip(1))
    torch.testing.assert_close(seen["path speed"][0], seen["path speed"][2])
    assert (seen["path unrest"] < 1.1e-3).all()  # the root of the 1e-6 that gives it a slope
    assert (seen["path level"][0] != seen["path level"][1]).all()


def test_what_is_read_over_time_is_what_a_parabola_is_made_of():
    time = torch.arange(TIMES) * 0.5
    start, slope, bend = torch.randn(3, 1, 4, 2)
    clock = time.view(1, -1, 1, 1)
    paths = start[:, None] + slope[:, None] * clock + bend[:, None] * clock**2
    level, velocity, speed, unrest = over_time(paths, torch.full((1,), 0.5))
    torch.testing.assert_close(level, paths.mean(1))
    torch.testing.assert_close(velocity, slope + 2 * bend * time.mean(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(speed, velocity.norm(dim=-1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(unrest, 2 * 0.25 * bend.norm(dim=-1), rtol=1e-3, atol=1e-3)
    # a single time has a level alone
    _, velocity, speed, unrest = over_time(paths[:, :1], torch.full((1,), 0.5))
    assert not velocity.any()
    assert not unrest.any()
    assert speed.max() < 1.1e-3


def test_what_changes_is_the_root_mean_square_over_the_channels_of_a_query(probe):
    seen = read(probe, torch.randn(2, TIMES * SIDE * SIDE, HIDDEN), 0.25)
    speed, unrest = (
        seen[name].unflatten(1, (QUERIES, HIDDEN)).square().mean(-1).sqrt()
        for name in ("speed", "unrest")
    )
    torch.testing.assert_close(seen["whole speed"], speed, rtol=1e-2, atol=1e-3)
    # a mean of lengths is no less than the length of the mean, and for noise not much more
    assert (seen["whole unrest"] >= unrest).all()
    assert (seen["whole unrest"] < 1.2 * unrest).all()


def test_the_aim_counts_the_mean_squared_distance_of_two_points_by_its_logarithm():
    aim = PromptAim(features=6, vocab_size=5, hidden_size=4, size=3)
    features, words = torch.randn(2, 6), torch.rand(2, 5)
    shown = aim.shown(features)
    asked = aim.asked(words / words.norm(dim=1, keepdim=True) * 5**0.25)
    by_hand = [sum((shown[i, k] - asked[i, k]) ** 2 for k in range(3)) / 3 for i in range(2)]
    torch.testing.assert_close(aim(features, words).expm1(), torch.stack(by_hand)[:, None])

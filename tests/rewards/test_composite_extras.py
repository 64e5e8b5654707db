"""Pessimism, gradient logs, fitted weights: neutral where they are off, right where they are on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_rewards import CAPTIONS, smooth_clip, tiny_models, write_tiny_preferences
from torch import nn

from reelhf.cli import main
from reelhf.errors import UserError
from rewards import CompositeReward, load_composite
from rewards.base import RewardScores
from rewards.composite import soft_cap
from rewards.ensemble import EnsembleReward
from rewards.gradients import reward_log
from rewards.weights import fit_composite_weights, fit_win_weights, normalised

LOOK = "aesthetic_quality"
WEIGHTS_OF_TWO = {"motion_quality": 1.0, LOOK: 1.0}
WEIGHTS = {"prompt_following": 1.0, "motion_quality": 0.5, LOOK: 2.0}


def batch(count: int = 2) -> torch.Tensor:
    return torch.stack([smooth_clip(i) for i in range(count)])


def looks(count: int) -> list:
    models = [tiny_models(seed)["aesthetic"] for seed in range(count)]
    for seed, model in enumerate(models):
        model.mean.fill_(0.1 * seed)
        model.std.fill_(0.5 + seed)
        model.low.fill_(-1.0)
        model.high.fill_(1.0 + seed)
    return models


class Several(nn.Module):
    """Rewards whose z-scores are averaged and whose disagreement is the std: what pessimism is for."""

    compares = False

    def __init__(self, members: list) -> None:
        super().__init__()
        self.members, self.dimensions = nn.ModuleList(members), members[0].dimensions
        self.register_buffer("mean", torch.full((1,), 0.2))
        self.register_buffer("std", torch.full((1,), 0.5))
        self.select = members[0].select
        self.encode_prompts = members[0].encode_prompts

    def score(self, frames: torch.Tensor, **options) -> RewardScores:
        found = [member.score(frames, **options) for member in self.members]
        values = torch.stack([scores.values for scores in found])
        spread = (values.var(0, unbiased=False) + 1e-12).sqrt()
        return RewardScores(values.mean(0), found[0].valid, spread)


def test_pessimism_takes_spreads_off_and_zero_takes_nothing():
    several = Several(looks(2))
    asked = {"fps": 8.0, "prompts": CAPTIONS[:2]}
    plain = CompositeReward([several], {LOOK: 1.0}).score(batch(), **asked)
    careful = CompositeReward([several], {LOOK: 1.0}, pessimism=1.5).score(batch(), **asked)
    assert (plain.std > 0).all()
    torch.testing.assert_close(plain.z, soft_cap((plain.values - 0.2) / 0.5, 2.0))
    less = (plain.values - 1.5 * plain.std - 0.2) / 0.5  # mean - k * std
    torch.testing.assert_close(careful.z, soft_cap(less, 2.0))
    torch.testing.assert_close(careful.values, plain.values)
    single = CompositeReward(looks(1), {LOOK: 1.0})
    assert single.score(batch(), **asked).std is None
    with pytest.raises(UserError, match="pessimism is 1, but none of these rewards knows"):
        CompositeReward(looks(1), {LOOK: 1.0}, pessimism=1.0).score(batch(), **asked)


def test_an_ensemble_in_the_folder_of_one_reward_makes_the_composite_careful(tmp_path: Path):
    EnsembleReward(looks(2)).save(tmp_path / "aesthetic")
    asked = {"fps": 8.0, "prompts": CAPTIONS[:2]}
    plain = load_composite(tmp_path, {LOOK: 1.0}).score(batch(), **asked)
    careful = load_composite(tmp_path, {LOOK: 1.0}, pessimism=1.0).score(batch(), **asked)
    assert (plain.std > 0).all()
    assert (careful.total < plain.total).all()
    log = reward_log(load_composite(tmp_path, {LOOK: 1.0}), batch(), **asked)
    assert log[f"reward_disagreement/{LOOK}"] == pytest.approx(plain.std.mean().item(), rel=1e-4)


def test_a_reward_without_a_spread_beside_one_with_it_is_left_as_it_is():
    models = [tiny_models()["motion"], Several(looks(2))]
    asked = {"fps": 8.0, "prompts": CAPTIONS[:2]}
    plain = CompositeReward(models, WEIGHTS_OF_TWO).score(batch(), **asked)
    careful = CompositeReward(models, WEIGHTS_OF_TWO, pessimism=1.0).score(batch(), **asked)
    torch.testing.assert_close(careful.z[:, 0], plain.z[:, 0])
    assert (careful.z[:, 1] < plain.z[:, 1]).all()
    assert careful.std[:, 0].isnan().all()


def test_an_invalid_clip_stays_invalid_under_pessimism_and_the_others_keep_their_gradient():
    frames = batch(3)
    frames[1, 0, 2] = float("nan")
    frames.requires_grad_()
    same = [tiny_models(0)["aesthetic"] for _ in range(2)]  # agree exactly
    found = CompositeReward([Several(same)], {LOOK: 1.0}, pessimism=1.0).score(
        frames, fps=8.0, prompts=CAPTIONS[:3]
    )
    assert found.valid.tolist() == [True, False, True]
    assert found.total[1] == 0
    found.total.sum().backward()
    assert frames.grad.isfinite().all()
    assert (frames.grad[0] != 0).any()


def test_the_gradient_log_holds_the_norms_and_cosines_of_autograd():
    composite = CompositeReward(list(tiny_models().values()), WEIGHTS, max_gradient_norm=1e-6)
    frames = batch()
    log = reward_log(composite, frames, fps=8.0, prompts=CAPTIONS[:2])
    assert frames.grad is None
    free = CompositeReward(list(composite.models), WEIGHTS)
    gradients = {}
    for index, name in enumerate(free.dimensions):
        leaf = batch().requires_grad_()
        scores = free.score(leaf, fps=8.0, prompts=CAPTIONS[:2])
        scores.z[:, index].sum().backward()
        gradients[name] = leaf.grad.flatten(1)
        norm = gradients[name].norm(dim=1).mean().item()
        assert log[f"reward_pull/{name}"] == pytest.approx(norm, rel=1e-3)
        assert log[f"reward_gradient/{name}"] >= log[f"reward_pull/{name}"]
        values = scores.values[:, index]
        assert log[f"reward_spread/{name}"] == pytest.approx(values.std(unbiased=False).item(), rel=1e-4)  # fmt: skip
    pair = ("motion_quality", LOOK)
    cosine = torch.nn.functional.cosine_similarity(gradients[pair[0]], gradients[pair[1]]).mean()
    assert log["reward_cosine/" + ",".join(pair)] == pytest.approx(cosine.item(), abs=1e-5)
    assert sum(key.startswith("reward_cosine/") for key in log) == 6
    assert all(p.grad is None for p in composite.parameters())
    assert reward_log(composite, frames * float("nan"), fps=8.0, prompts=CAPTIONS[:2]) == {}


def test_weights_that_made_the_wins_are_found_again():
    generator = torch.Generator().manual_seed(0)
    gaps = torch.randn(6000, 3, generator=generator)
    true = torch.tensor([2.0, 0.5, 0.0])
    won = torch.rand(6000, generator=generator) < torch.sigmoid(gaps @ true)
    found = fit_win_weights(gaps, won)
    torch.testing.assert_close(found.float(), true, atol=0.15, rtol=0)
    assert normalised(found).mean().item() == pytest.approx(1.0)


def test_a_dimension_that_points_the_wrong_way_weighs_nothing_and_separable_wins_stay_finite():
    gaps = torch.tensor([[1.0, -1.0], [2.0, -0.5], [-1.0, 2.0], [0.5, -3.0]])
    won = torch.tensor([True, True, False, True])
    found = fit_win_weights(gaps, won)
    assert found.isfinite().all()
    assert found[1] == 0 < found[0]
    assert fit_win_weights(-gaps[:, :1], won).tolist() == [0.0]
    assert normalised(torch.zeros(2)).tolist() == [0.0, 0.0]


def test_the_command_fits_weights_from_verdicts_and_names_the_dimensions_there_are(tmp_path: Path):
    tiny_models()["aesthetic"].save(tmp_path / "rewards" / "aesthetic")
    data = write_tiny_preferences(
        tmp_path / "data",
        quality=lambda i: i % 5,
        make=lambda i: smooth_clip(i, 3, 32),
        num_tasks=6,
        clips_per_task=2,
    )
    with pytest.raises(UserError, match=r"no verdict on 'overall' .* it has aesthetic_quality, and 'all'"):  # fmt: skip
        fit_composite_weights(tmp_path / "rewards", data)
    main(["rewards", "weights", str(tmp_path / "rewards"), "--preferences", str(data), "--out", str(tmp_path / "w"), "--wins", "all"])  # fmt: skip
    text = (tmp_path / "w" / "weights.yaml").read_text()
    assert text.startswith("reward_weights:\n  aesthetic_quality: ")

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_rewards import CAPTIONS, smooth_clip, tiny_models

from reelhf.errors import UserError
from rewards import CompositeReward, load_composite
from rewards.composite import soft_cap

WEIGHTS = {"prompt_following": 1.0, "motion_quality": 0.5, "aesthetic_quality": 2.0}


def composite(**options: float) -> CompositeReward:
    return CompositeReward(list(tiny_models().values()), WEIGHTS, **options)


def batch(count: int = 2) -> torch.Tensor:
    return torch.stack([smooth_clip(i) for i in range(count)])


def test_the_cap_is_linear_below_zero_bounded_above_and_smooth_at_zero() -> None:
    z = torch.tensor([-30.0, -1.0, 0.0, 0.01, 2.0, 50.0], requires_grad=True)
    capped = soft_cap(z, 2.0)
    capped.sum().backward()
    assert capped[:3].tolist() == [-30.0, -1.0, 0.0]
    assert (capped < 2.0 + 1e-6).all()
    assert z.grad is not None
    assert z.grad[:4].tolist() == pytest.approx([1.0, 1.0, 1.0, 1.0], abs=1e-3)
    assert z.grad[-1] < 1e-6


def test_the_total_is_the_weighted_sum_of_bounded_z_scores() -> None:
    reward = composite()
    for model in reward.models:
        model.mean.fill_(0.1)
        model.std.fill_(0.5)
    scores = reward.score(batch(), fps=8.0, prompts=CAPTIONS[:2])
    weights = torch.tensor([WEIGHTS.get(name, 0.0) for name in scores.dimensions])
    torch.testing.assert_close(scores.z, soft_cap((scores.values - 0.1) / 0.5, 2.0))
    torch.testing.assert_close(scores.total, (scores.z * weights).sum(1))


def test_an_invalid_clip_is_left_out_and_counted() -> None:
    frames = batch(3)
    frames[1, 0, 2, 3, 3] = float("inf")
    frames.requires_grad_()
    scores = composite().score(frames, fps=8.0, prompts=CAPTIONS[:3])
    assert scores.valid.tolist() == [True, False, True]
    assert scores.metrics()["valid_fraction"] == pytest.approx(2 / 3)
    assert scores.total[1] == 0
    assert scores.mean_total().item() == pytest.approx(scores.total[[0, 2]].mean().item())
    scores.total.sum().backward()
    assert frames.grad is not None
    assert frames.grad.isfinite().all()
    assert (frames.grad[1] == 0).all()


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_each_clips_gradient_is_clipped_whatever_the_loss_is_scaled_by(scale: float) -> None:
    free, clipped = (batch().requires_grad_() for _ in range(2))
    prompts = CAPTIONS[:2]
    (scale * composite().score(free, fps=8.0, prompts=prompts).total).sum().backward()
    assert free.grad is not None
    norms = free.grad.flatten(1).norm(dim=1) / scale
    limit = float(norms.mean())  # one clip above, one below
    reward = composite(max_gradient_norm=limit)
    (scale * reward.score(clipped, fps=8.0, prompts=prompts).total).sum().backward()
    assert clipped.grad is not None
    torch.testing.assert_close(
        clipped.grad.flatten(1).norm(dim=1) / scale, norms.clamp_max(limit), rtol=1e-4, atol=1e-7
    )


def test_only_frames_that_some_reward_looks_at_are_needed() -> None:
    reward = composite()
    selections = reward.select(5, 8.0, torch.Generator().manual_seed(0))
    assert len(selections) == 3
    assert reward.needed_frames(selections, 5).tolist() == [0, 1, 2, 3, 4]  # motion sees them all


def test_cached_prompts_score_like_strings() -> None:
    reward = composite()
    encoded = reward.encode_prompts(CAPTIONS[:2])
    first = reward.score(batch(), fps=8.0, prompts=encoded).values
    torch.testing.assert_close(first, reward.score(batch(), fps=8.0, prompts=CAPTIONS[:2]).values)


def test_an_unknown_weight_names_the_nearest_dimension() -> None:
    with pytest.raises(UserError, match=r"'motoin_quality'.*Did you mean 'motion_quality'\?"):
        CompositeReward(list(tiny_models().values()), {"motoin_quality": 1.0})


def test_a_folder_of_models_becomes_a_composite(tmp_path: Path) -> None:
    for name, model in tiny_models().items():
        model.save(tmp_path / name)
    loaded = load_composite(tmp_path, WEIGHTS)
    first = loaded.score(batch(), fps=8.0, prompts=CAPTIONS[:2])
    torch.testing.assert_close(
        first.total, composite().score(batch(), fps=8.0, prompts=CAPTIONS[:2]).total
    )
    with pytest.raises(UserError, match="holds no reward model"):
        load_composite(tmp_path / "foundational", WEIGHTS)

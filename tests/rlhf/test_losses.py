"""The equations of direct reward maximisation."""

from __future__ import annotations

import pytest
import torch

from rewards.composite import soft_cap
from rlhf.losses import (
    direct_align_clean,
    low_res_consistency_loss,
    out_of_range_loss,
    surrogate_loss,
    valid_sum,
    velocity_anchor_loss,
)


def test_gradient_of_the_surrogate_is_the_given_gradient():
    latents = torch.randn(3, 4, 2, 5, 5, requires_grad=True)
    wanted = torch.randn_like(latents)
    surrogate_loss(latents, wanted).sum().backward()
    assert torch.equal(latents.grad, wanted)


def test_surrogate_carries_the_chain_rule_through_whatever_made_the_latents():
    weight = torch.randn(4, requires_grad=True, dtype=torch.float64)
    inputs = torch.randn(2, 4, dtype=torch.float64)
    loss = (weight * inputs).sin().pow(2).sum()
    (direct,) = torch.autograd.grad(loss, weight)
    latents = weight * inputs
    gradient = 2 * latents.sin() * latents.cos()
    (through,) = torch.autograd.grad(surrogate_loss(latents, gradient).sum(), weight)
    torch.testing.assert_close(through, direct)


def test_surrogate_refuses_another_shape():
    with pytest.raises(ValueError, match="expected one shape"):
        surrogate_loss(torch.zeros(2, 4), torch.zeros(2, 1))


def test_anchor_is_zero_at_the_reference_and_the_mean_square_elsewhere():
    velocity = torch.randn(3, 4, 2, 5, 5)
    assert torch.equal(velocity_anchor_loss(velocity, velocity), torch.zeros(3))
    assert velocity_anchor_loss(velocity + 0.5, velocity).tolist() == pytest.approx([0.25] * 3)


def test_anchor_does_not_train_the_reference():
    reference = torch.randn(1, 2, requires_grad=True)
    velocity = torch.randn(1, 2, requires_grad=True)
    velocity_anchor_loss(velocity, reference).sum().backward()
    assert reference.grad is None


@pytest.mark.parametrize("sigma_next", [0.0, 0.4, 0.95])
def test_direct_align_recovers_the_clean_latents_of_a_path_with_known_noise(sigma_next):
    clean, noise = torch.randn(2, 3, 4, 4, 4, 4, dtype=torch.float64)
    on_path = (1 - sigma_next) * clean + sigma_next * noise
    torch.testing.assert_close(direct_align_clean(on_path, noise, sigma_next), clean)


def test_low_res_consistency_is_zero_for_an_exact_enlargement_and_sees_a_colour_shift():
    low_res = torch.rand(2, 3, 5, 8, 8)
    enlarged = low_res.repeat_interleave(2, 3).repeat_interleave(2, 4)
    assert low_res_consistency_loss(enlarged, low_res).max() < 1e-12
    assert low_res_consistency_loss(enlarged + 0.1, low_res).tolist() == pytest.approx([0.01] * 2)


def test_low_res_consistency_leaves_texture_inside_a_low_res_pixel_free():
    low_res = torch.full((1, 3, 1, 4, 4), 0.5)
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4).expand(1, 3, 1, 8, 8)
    assert low_res_consistency_loss(0.5 + 0.3 * checks, low_res).item() == pytest.approx(
        0, abs=1e-12
    )


def test_low_res_consistency_refuses_other_frames():
    with pytest.raises(ValueError, match="same clips and frames"):
        low_res_consistency_loss(torch.zeros(1, 3, 5, 8, 8), torch.zeros(1, 3, 4, 4, 4))


def test_out_of_range_is_zero_inside_and_pulls_overshoot_back():
    frames = torch.tensor([0.0, 0.5, 1.0, 1.2, -0.3]).view(1, 1, 1, 1, 5).requires_grad_()
    out_of_range_loss(frames).sum().backward()
    signs = frames.grad.flatten().sign().tolist()
    assert signs == [0, 0, 0, 1, -1]


@pytest.mark.parametrize("cap", [0.5, 2.0])
def test_cap_bounds_what_is_good_and_keeps_the_slope_of_what_is_bad(cap):
    z = torch.tensor([-50.0, -1.0, 0.0, 1e-3, 50.0], requires_grad=True)
    capped = soft_cap(z, cap)
    assert capped.max() <= cap
    assert capped[:3].tolist() == [-50.0, -1.0, 0.0]
    capped.sum().backward()
    assert z.grad[:3].tolist() == [1.0, 1.0, 1.0]
    assert z.grad[3] == pytest.approx(1.0, abs=1e-4)
    assert z.grad[4] == 0


def test_an_invalid_clip_leaves_no_trace_in_the_sum_or_its_gradient():
    values = torch.tensor([1.0, float("nan"), 3.0], requires_grad=True)
    total = valid_sum(values, torch.tensor([True, False, True]))
    total.backward()
    assert total.item() == 4.0
    assert values.grad.tolist() == [1.0, 0.0, 1.0]

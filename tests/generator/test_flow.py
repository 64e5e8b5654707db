from __future__ import annotations

import itertools

import pytest
import torch

from generator.flow import (
    adams_step,
    add_noise,
    euler_step,
    expand_sigma,
    flow_matching_loss,
    guided_velocity,
    logit_normal_sigma,
    resample_schedule,
    rescale_guidance,
    shift_sigma,
    sigma_schedule,
    velocity_from_x0,
    x0_from_velocity,
)


def test_euler_is_exact_on_a_straight_path():
    clean, noise = torch.randn(2, 2, 4, 3, 2, 2)
    latents = noise
    for high, low in zip(sigma_schedule(3)[:-1], sigma_schedule(3)[1:], strict=True):
        latents = euler_step(latents, noise - clean, torch.full((2,), high), torch.full((2,), low))
    torch.testing.assert_close(latents, clean)


def test_euler_converges_to_a_closed_form_path():
    """d x / d sigma = x has the solution x(0) = x(1) / e; the error of Euler halves as the steps double."""
    start = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    errors = []
    for steps in (50, 100):
        latents = start
        sigmas = torch.tensor(sigma_schedule(steps), dtype=torch.float64)
        for high, low in itertools.pairwise(sigmas):
            latents = euler_step(latents, latents, high[None], low[None])
        errors.append(abs(latents.item() - torch.tensor(-1.0, dtype=torch.float64).exp().item()))
    assert errors[1] < 4e-3
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.05)


def test_clean_latents_are_recovered_from_the_true_velocity_at_any_sigma():
    clean, noise = torch.randn(2, 3, 4, 2, 2, 2)
    for sigma in (
        torch.tensor([0.1, 0.5, 1.0]),
        torch.tensor([[0.2, 0.9], [0.5, 0.5], [1.0, 0.1]]),
    ):
        noisy = add_noise(clean, noise, sigma)
        torch.testing.assert_close(x0_from_velocity(noisy, sigma, noise - clean), clean)
        torch.testing.assert_close(velocity_from_x0(noisy, sigma, clean), noise - clean)
    assert flow_matching_loss(noise - clean, clean, noise).tolist() == [0.0, 0.0, 0.0]


def test_a_sigma_per_latent_frame_noises_each_frame_on_its_own():
    clean, noise = torch.zeros(1, 1, 2, 1, 1), torch.ones(1, 1, 2, 1, 1)
    noisy = add_noise(clean, noise, torch.tensor([[0.0, 0.75]]))
    assert noisy.flatten().tolist() == [0.0, 0.75]
    with pytest.raises(ValueError, match=r"need \[B\] or \[B, T\]"):
        expand_sigma(torch.zeros(3), clean)


def test_shift_keeps_the_ends_is_identity_at_one_and_composes():
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_sigma(sigma, 3.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (shifted[1:-1] > sigma[1:-1]).all()
    torch.testing.assert_close(shift_sigma(sigma, 1.0), sigma)
    torch.testing.assert_close(shift_sigma(shift_sigma(sigma, 2.0), 3.0), shift_sigma(sigma, 6.0))
    torch.testing.assert_close(shift_sigma(shifted, 1 / 3.0), sigma)


def test_schedule_runs_from_one_to_zero():
    sigmas = sigma_schedule(5, shift=2.0)
    assert sigmas[0] == 1.0
    assert sigmas[-1] == 0.0
    assert len(sigmas) == 6
    assert all(high > low for high, low in itertools.pairwise(sigmas))
    with pytest.raises(ValueError, match="at least one step"):
        sigma_schedule(0)


def test_training_sigmas_are_logit_normal_before_the_shift():
    generator = torch.Generator().manual_seed(0)
    sigma = logit_normal_sigma((20000,), mean=0.5, std=0.8, shift=3.0, generator=generator)
    logits = torch.logit(shift_sigma(sigma.double(), 1 / 3.0))
    assert logits.mean().item() == pytest.approx(0.5, abs=0.02)
    assert logits.std().item() == pytest.approx(0.8, abs=0.02)


def test_guidance_of_one_is_the_conditional_velocity_and_zero_the_unconditional():
    conditional, unconditional = torch.randn(2, 5)
    torch.testing.assert_close(guided_velocity(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guided_velocity(conditional, unconditional, 0.0), unconditional)


def test_channel_weights_scale_each_channels_share_of_the_loss():
    clean, noise = torch.zeros(2, 3, 1, 2, 2), torch.zeros(2, 3, 1, 2, 2)
    velocity = torch.zeros_like(clean)
    velocity[:, 1] = 3.0
    plain = flow_matching_loss(velocity, clean, noise)
    weighted = flow_matching_loss(
        velocity, clean, noise, channel_weights=torch.tensor([0.5, 2.0, 0.5])
    )
    assert plain.tolist() == [3.0, 3.0]
    assert weighted.tolist() == [6.0, 6.0]


def test_adams_is_exact_where_the_velocity_is_linear_in_sigma():
    """d x / d sigma = a + b sigma: Euler errs by half the step squared, the two-step method not at all."""
    a, b = torch.randn(2, 2, 3, 2, 4, 4, dtype=torch.float64)
    sigmas = [1.0, 0.8, 0.5, 0.05]

    def at(sigma: float) -> torch.Tensor:
        return torch.full((2,), sigma, dtype=torch.float64)

    def exact(sigma: float) -> torch.Tensor:
        return a * sigma + b * sigma**2 / 2

    x, previous = exact(0.8), a + b * 1.0
    for before, now, then in zip(sigmas, sigmas[1:], sigmas[2:], strict=False):
        velocity = a + b * now
        x = adams_step(x, velocity, previous, at(now), at(then), at(before))
        previous = velocity
    torch.testing.assert_close(x, exact(0.05))
    euler = euler_step(exact(0.5), a + b * 0.5, at(0.5), at(0.05))
    assert (euler - exact(0.05)).abs().max() > 1e-2


def test_rescaled_guidance_has_the_spread_of_the_conditional_prediction():
    torch.manual_seed(0)
    conditional = torch.randn(3, 4, 2, 8, 8)
    guided = guided_velocity(conditional, torch.randn(3, 4, 2, 8, 8), 5.0)
    axes = (1, 2, 3, 4)
    assert (guided.std(axes) > 2 * conditional.std(axes)).all()
    whole = rescale_guidance(guided, conditional, 1.0)
    torch.testing.assert_close(whole.std(axes), conditional.std(axes))
    assert torch.equal(rescale_guidance(guided, conditional, 0.0), guided)
    half = rescale_guidance(guided, conditional, 0.5)
    torch.testing.assert_close(half, (whole + guided) / 2)


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
def test_a_shifted_schedule_resampled_is_the_shifted_schedule_of_that_length(shift):
    own = sigma_schedule(12, shift=shift)
    for steps in (1, 2, 5, 12, 40):
        assert resample_schedule(own, steps) == pytest.approx(sigma_schedule(steps, shift=shift))
    uneven = resample_schedule((1.0, 0.9, 0.3, 0.0), 30)
    assert all(high > low for high, low in itertools.pairwise(uneven))
    assert resample_schedule((1.0, 0.9, 0.3, 0.0), 3) == pytest.approx((1.0, 0.9, 0.3, 0.0))
    assert resample_schedule((1.0, 0.0), 2) == pytest.approx((1.0, 0.5, 0.0))

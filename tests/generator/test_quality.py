"""PSNR, SSIM and flicker against closed forms and against the definition written out."""

from __future__ import annotations

import math

import pytest
import torch

from generator.quality import psnr, ssim, temporal_flicker


def test_psnr_of_a_known_error():
    assert psnr(0.01) == pytest.approx(20)
    assert psnr(1.0) == 0
    assert psnr(0.0) == 100  # the ceiling


def test_ssim_of_equal_frames_is_one_and_it_is_symmetric():
    one, other = torch.rand(2, 2, 3, 3, 24, 20)
    torch.testing.assert_close(ssim(one, one), torch.ones(2, 3))
    torch.testing.assert_close(ssim(one, other), ssim(other, one))
    assert ssim(one, other).max() < 0.5


@pytest.mark.parametrize(("a", "b"), [(0.2, 0.2), (0.0, 1.0), (0.3, 0.7)])
def test_ssim_of_flat_frames_is_the_brightness_term(a, b):
    frames = torch.full((1, 3, 1, 16, 16), a, dtype=torch.float64)
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    value = ssim(frames, torch.full_like(frames, b))
    assert value.item() == pytest.approx(expected, abs=1e-9)


def test_ssim_of_a_negative_is_the_structure_term_turned_round():
    """Around 0.5 a negative has the same brightness and variance and the opposite covariance."""
    torch.manual_seed(0)
    grey = 0.5 + 0.2 * torch.randn(1, 1, 1, 11, 11, dtype=torch.float64)
    window = _window()
    grey = grey - (window * grey[0, 0, 0]).sum() + 0.5  # mean 0.5 in the only window there is
    frames = grey.expand(1, 3, 1, 11, 11)
    variance = (window * (grey - 0.5).square()[0, 0, 0]).sum()
    expected = (-2 * variance + 9e-4) / (2 * variance + 9e-4)
    torch.testing.assert_close(ssim(frames, 1 - frames).squeeze(), expected)


def _window() -> torch.Tensor:
    weights = [
        [math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)]
        for i in range(11)
    ]
    window = torch.tensor(weights, dtype=torch.float64)
    return window / window.sum()


def test_ssim_is_the_mean_of_its_definition_at_every_window():
    torch.manual_seed(1)
    one, other = torch.rand(2, 1, 3, 1, 14, 13, dtype=torch.float64)
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)
    x, y = ((luma * frames[0, :, 0]).sum(0) for frames in (one, other))
    window, values = _window(), []
    for top in range(4):
        for left in range(3):
            a, b = (z[top : top + 11, left : left + 11] for z in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = ((window * (z - m) ** 2).sum() for z, m in ((a, mean_a), (b, mean_b)))
            cov = (window * (a - mean_a) * (b - mean_b)).sum()
            brightness = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
            values.append(brightness * (2 * cov + 9e-4) / (var_a + var_b + 9e-4))
    torch.testing.assert_close(ssim(one, other).squeeze(), torch.stack(values).mean())


def test_a_standing_error_does_not_flicker_and_a_coming_and_going_one_does():
    frames = torch.rand(2, 3, 5, 8, 8, dtype=torch.float64)
    standing = frames + 0.3 * torch.rand(2, 3, 1, 8, 8)
    assert temporal_flicker(frames, standing).max() < 1e-12
    blinking = frames.clone()
    blinking[:, :, 1::2] += 0.1
    torch.testing.assert_close(
        temporal_flicker(frames, blinking), torch.full((2,), 0.1, dtype=torch.float64)
    )


def test_a_reconstruction_that_stands_still_flickers_as_much_as_its_clip_moves():
    frames = torch.rand(1, 3, 4, 8, 8)
    still = frames[:, :, :1].expand_as(frames)
    expected = frames.diff(dim=2).abs().mean()
    torch.testing.assert_close(temporal_flicker(frames, still).squeeze(), expected)


def test_what_cannot_be_measured_says_so():
    image = torch.rand(1, 3, 1, 16, 16)
    with pytest.raises(ValueError, match="an image has only one"):
        temporal_flicker(image, image)
    with pytest.raises(ValueError, match="at least 11 pixels, got 8 x 16"):
        ssim(image[..., :8, :], image[..., :8, :])
    for function in (ssim, temporal_flicker):
        with pytest.raises(ValueError, match="expected one shape"):
            function(image, image[..., :12, :12])

"""How close a reconstruction is to its clip: PSNR, SSIM, and flicker that was not in the clip. Pure functions of frames in [0, 1]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # BT.601
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of values in [0, 1]."""
    return -10 * math.log10(max(mean_squared_error, 1e-10))


def ssim(frames: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of the luma of each frame: [B, 3, F, H, W] twice -> [B, F], 1 for equal frames, at most 1.

    Gaussian window of 11 x 11 pixels with sigma 1.5, constants 0.01^2 and 0.03^2, places whose window leaves the frame not counted
    (Wang et al. 2004, equation 13). Raises: ValueError for frames smaller than the window.
    """
    if frames.shape != others.shape:
        raise ValueError(f"expected one shape, got {tuple(frames.shape)} and {tuple(others.shape)}")
    if min(frames.shape[3:]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs frames of at least {SSIM_WINDOW} pixels, got {frames.shape[3]} x {frames.shape[4]}"
        )
    luma = frames.new_tensor(LUMA).view(1, 3, 1, 1, 1)
    one, other = ((luma * x).sum(1).flatten(0, 1) for x in (frames, others))  # [B * F, H, W]
    means = _blurred(torch.stack([one, other, one * one, other * other, one * other]))
    mean, mean_other, square, square_other, product = means
    variance, variance_other = square - mean.square(), square_other - mean_other.square()
    covariance = product - mean * mean_other
    structure = (2 * covariance + SSIM_C2) / (variance + variance_other + SSIM_C2)
    brightness = (2 * mean * mean_other + SSIM_C1) / (mean.square() + mean_other.square() + SSIM_C1)
    return (structure * brightness).mean((1, 2)).unflatten(0, (len(frames), -1))


def _blurred(maps: Tensor) -> Tensor:
    """Gaussian means of [..., H, W] where the window lies inside: [..., H - 10, W - 10]."""
    return _window_rows(maps.shape[-2], maps) @ maps @ _window_rows(maps.shape[-1], maps).T


def _window_rows(extent: int, like: Tensor) -> Tensor:
    """The window at each place as a row, [extent - 10, extent]: a product of matrices is many times faster than a 1-channel convolution."""
    offsets = torch.arange(SSIM_WINDOW, dtype=like.dtype, device=like.device) - SSIM_WINDOW // 2
    window = (-offsets.square() / (2 * SSIM_SIGMA**2)).exp()
    rows = like.new_zeros(extent - SSIM_WINDOW + 1, extent)
    for place, weight in enumerate(window / window.sum()):
        rows.diagonal(place).fill_(weight)
    return rows


def temporal_flicker(frames: Tensor, others: Tensor) -> Tensor:
    """What changes from one frame to the next in `others` and does not in `frames`, or the reverse: [B, 3, F, H, W] twice -> [B].

    With the error e = others - frames, the mean over pixels, channels and neighbouring frames of |e(t + 1) - e(t)|, in [0, 2]. An
    error that stands still, however large, has none; one that comes and goes by a from frame to frame has a. Raises: ValueError for
    images.
    """
    if frames.shape != others.shape:
        raise ValueError(f"expected one shape, got {tuple(frames.shape)} and {tuple(others.shape)}")
    if frames.shape[2] < 2:
        raise ValueError("flicker is between frames; an image has only one")
    return (others - frames).diff(dim=2).abs().mean((1, 2, 3, 4))

"""Flow matching as pure functions: the path, its velocity, the Euler step, the shifted schedule.

`noisy = (1 - sigma) * clean + sigma * noise`, `velocity = noise - clean`; sigma 1 is pure noise (rectified flow,
Liu et al. 2209.03003; Lipman et al. 2210.02747, with time running from data at 0).
"""

from __future__ import annotations

import torch
from torch import Tensor


def expand_sigma(sigma: Tensor, latents: Tensor) -> Tensor:
    """sigma [B] or [B, T] -> a shape that broadcasts against latents [B, C, T, h, w]."""
    if sigma.ndim == 1 and len(sigma) == len(latents):
        return sigma[:, None, None, None, None]
    if sigma.ndim == 2 and sigma.shape == (latents.shape[0], latents.shape[2]):
        return sigma[:, None, :, None, None]
    raise ValueError(
        f"sigma has shape {tuple(sigma.shape)}; latents {tuple(latents.shape)} need [B] or [B, T]"
    )


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The point of the straight path from clean to noise at sigma, [B, C, T, h, w]."""
    sigma = expand_sigma(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def x0_from_velocity(noisy: Tensor, sigma: Tensor, velocity: Tensor) -> Tensor:
    """The clean latents that this velocity points at: noisy - sigma * velocity."""
    return noisy - expand_sigma(sigma, noisy) * velocity


def velocity_from_x0(noisy: Tensor, sigma: Tensor, clean: Tensor) -> Tensor:
    """Inverse of `x0_from_velocity`; sigma must be above zero."""
    return (noisy - clean) / expand_sigma(sigma, noisy)


def euler_step(noisy: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One explicit Euler step of d(latents) / d(sigma) = velocity from sigma to sigma_next."""
    return noisy + expand_sigma(sigma_next - sigma, noisy) * velocity


def guided_velocity(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2207.12598): scale 1 is the conditional velocity, 0 the unconditional."""
    return unconditional + guidance_scale * (conditional - unconditional)


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Move sigmas towards noise for larger latents: s * sigma / (1 + (s - 1) * sigma); 0 and 1 stay (SD3, 2403.03206).

    `shift_sigma(shift_sigma(x, a), b) == shift_sigma(x, a * b)`; shift 1 changes nothing.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def logit_normal_sigma(
    size: tuple[int, ...], *, mean: float, std: float, shift: float, generator: torch.Generator
) -> Tensor:
    """Training sigmas: sigmoid of a normal, then shifted (SD3, 2403.03206, eq. 19 and 23)."""
    return shift_sigma(torch.sigmoid(mean + std * torch.randn(size, generator=generator)), shift)


def sigma_schedule(num_steps: int, *, shift: float = 1.0) -> tuple[float, ...]:
    """num_steps + 1 sigmas from 1.0 to 0.0, equally spaced before the shift."""
    if num_steps < 1:
        raise ValueError(f"a schedule needs at least one step, got {num_steps}")
    grid = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    return tuple(shift_sigma(grid, shift).tolist())


def flow_matching_loss(
    velocity: Tensor, clean: Tensor, noise: Tensor, *, channel_weights: Tensor | None = None
) -> Tensor:
    """Squared error of the velocity per sample, mean over [C, T, h, w]; shape [B].

    Args:
        channel_weights: weight of each latent channel, [C], mean 1; all alike by default.
    """
    error = (velocity - (noise - clean)).square()
    if channel_weights is not None:
        error = error * channel_weights[:, None, None, None]
    return error.flatten(1).mean(1)

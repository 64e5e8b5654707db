"""Flow matching as pure functions: the path, its velocity, the Euler step, the shifted schedule.

`noisy = (1 - sigma) * clean + sigma * noise`, `velocity = noise - clean`; sigma 1 is pure noise (rectified flow,
Liu et al. 2209.03003; Lipman et al. 2210.02747, with time running from data at 0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def adams_step(
    noisy: Tensor,
    velocity: Tensor,
    previous: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    sigma_previous: Tensor,
) -> Tensor:
    """One step of the two-step Adams-Bashforth method with unequal steps: second order at one evaluation per step.

    The velocity is taken as a line through (sigma_previous, previous) and (sigma, velocity), and integrated to sigma_next
    (Hairer, Norsett & Wanner, Solving ODEs I, III.5). Exact where the velocity is linear in sigma.
    """
    step, last = sigma_next - sigma, sigma - sigma_previous
    ratio = expand_sigma(step / last, noisy)
    slope = 0.5 * ratio * (velocity - previous)
    return noisy + expand_sigma(step, noisy) * (velocity + slope)


def guided_velocity(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2207.12598): scale 1 is the conditional velocity, 0 the unconditional."""
    return unconditional + guidance_scale * (conditional - unconditional)


def rescale_guidance(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Guidance without overexposure: the guided prediction at the conditional one's spread per sample, mixed in by `share`.

    Source: Lin et al. 2305.08891, eq. 15-16, where it is applied to the network's prediction; 0 changes nothing, 1 gives the
    conditional standard deviation exactly.
    """
    axes = tuple(range(1, guided.ndim))
    ratio = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp_min(1e-8)
    return share * guided * ratio + (1 - share) * guided


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Move sigmas towards noise for larger latents: s * sigma / (1 + (s - 1) * sigma); 0 and 1 stay (SD3, 2403.03206).

    `shift_sigma(shift_sigma(x, a), b) == shift_sigma(x, a * b)`; shift 1 changes nothing.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def shift_for_tokens(shift: float, tokens: int, base_tokens: int | None) -> float:
    """The shift that noises a clip of `tokens` latent positions as `shift` noises one of `base_tokens`: shift * sqrt(tokens / base).

    More positions average more noise away, so the same sigma hides less; SD3 (2403.03206, eq. 23) for pixels of an image, here over
    frames too. Without a base the shift is the same for all.
    """
    return shift if base_tokens is None else shift * math.sqrt(tokens / base_tokens)


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


def resample_schedule(sigmas: Sequence[float], num_steps: int) -> tuple[float, ...]:
    """The same curve from 1.0 to 0.0 in another number of steps.

    Where the curve lies against the straight one is kept in log-odds, in which a shift is a constant: a shifted schedule gives
    exactly the shifted schedule of that length. A schedule of one step says nothing and gives equal steps.
    """
    grid = torch.linspace(1.0, 0.0, len(sigmas), dtype=torch.float64)[1:-1].flip(0)
    own = torch.tensor(list(sigmas), dtype=torch.float64)[1:-1].flip(0)
    wanted = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    inner = wanted[1:-1]
    offset = torch.zeros_like(inner)
    if len(grid):
        known = own.logit() - grid.logit()
        place = torch.searchsorted(grid, inner).clamp(1, max(1, len(grid) - 1))
        low, high = (place - 1).clamp_max(len(grid) - 1), place.clamp_max(len(grid) - 1)
        width = (grid[high] - grid[low]).clamp_min(1e-12)
        share = ((inner - grid[low]) / width).clamp(0, 1)
        offset = known[low] + share * (known[high] - known[low])
    return (1.0, *torch.sigmoid(inner.logit() + offset).tolist(), 0.0)


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

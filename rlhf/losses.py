"""The equations of direct reward maximisation, each a pure function without I/O.

Convention: sigma in [0, 1], 1 is pure noise; `noisy = (1 - sigma) * clean + sigma * noise`; velocity = noise - clean.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def surrogate_loss(latents: Tensor, latent_gradient: Tensor) -> Tensor:
    """A scalar per clip whose gradient with respect to `latents` is `latent_gradient`, whatever made the latents.

    Args:
        latents: clean latents with the denoiser's graph, [B, C, T, h, w].
        latent_gradient: d loss / d latents found by the two-stage pass, same shape; treated as a constant.
    Returns: <sg(gradient), latents> per clip, [B]; its value means nothing, only its gradient does.
    """
    if latents.shape != latent_gradient.shape:
        raise ValueError(
            f"expected one shape, got {tuple(latents.shape)} and {tuple(latent_gradient.shape)}"
        )
    return (latent_gradient.detach() * latents).flatten(1).sum(1)


def velocity_anchor_loss(velocity: Tensor, reference_velocity: Tensor) -> Tensor:
    """Mean squared distance of two velocity fields at the same point, per clip [B]; zero at the reference model.

    For equal Gaussian transition widths this is the KL divergence between policy and reference up to a factor of sigma
    (Flow-GRPO, 2505.05470, eq. 10), here unweighted.
    """
    if velocity.shape != reference_velocity.shape:
        raise ValueError(
            f"expected one shape, got {tuple(velocity.shape)} and {tuple(reference_velocity.shape)}"
        )
    return (velocity - reference_velocity.detach()).square().flatten(1).mean(1)


def direct_align_clean(stepped: Tensor, noise: Tensor, sigma_next: Tensor | float) -> Tensor:
    """x0 recovered from a point on a path whose noise is known: (y - sigma' * noise) / (1 - sigma').

    Source: SRPO, 2509.06942, eq. 7. Exact at any sigma' < 1 when y = (1 - sigma') x0 + sigma' noise.
    """
    return (stepped - sigma_next * noise) / (1 - sigma_next)


def low_res_consistency_loss(frames: Tensor, low_res: Tensor) -> Tensor:
    """Mean squared distance, per clip [B], between the clip shrunk by area averaging and its low-resolution condition.

    Args:
        frames: [B, 3, F, H, W], unclamped; low_res: [B, 3, F, h, w] with h <= H and w <= W, treated as a constant.
    """
    if frames.shape[:3] != low_res.shape[:3]:
        raise ValueError(
            f"expected the same clips and frames, got {tuple(frames.shape)} and {tuple(low_res.shape)}"
        )
    shrunk = F.adaptive_avg_pool3d(frames, (frames.shape[2], *low_res.shape[3:]))
    return (shrunk - low_res.detach()).square().flatten(1).mean(1)


def out_of_range_loss(frames: Tensor) -> Tensor:
    """Mean squared overshoot of the pixels below 0 and above 1, per clip [B]: a clamp hides it from the rewards."""
    return (F.relu(frames - 1) + F.relu(-frames)).square().flatten(1).mean(1)


def valid_sum(values: Tensor, valid: Tensor) -> Tensor:
    """Sum of `values` [B] over the clips that could be scored, a scalar; a NaN of an invalid clip leaves no trace.

    Times `reelhf.engine.global_mean_scale(valid.sum())` it is a loss whose averaged gradient is that of the mean over the
    valid clips of all processes.
    """
    return values.masked_fill(~valid, 0.0).sum()  # masked, not multiplied: NaN * 0 is still NaN

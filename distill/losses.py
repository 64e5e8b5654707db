"""Formulas of distillation, pure: each one tested once and imported everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from generator.flow import euler_step


def segment_edges(sigmas: tuple[float, ...], num_segments: int) -> tuple[float, ...]:
    """Every n-th sigma of a teacher's schedule, first and last included: the student's schedule.

    Raises: ValueError unless the teacher's steps divide evenly over the segments.
    """
    num_steps = len(sigmas) - 1
    if num_segments < 1 or num_steps % num_segments:
        raise ValueError(
            f"{num_steps} teacher steps cannot be cut into {num_segments} equal segments"
        )
    return tuple(sigmas[:: num_steps // num_segments])


def segment_projection(noisy: Tensor, velocity: Tensor, sigma: Tensor, edge: Tensor) -> Tensor:
    """Where a student's single Euler step lands at the lower edge of its segment, [B, C, T, h, w]."""
    return euler_step(noisy, velocity, sigma, edge)


def segment_consistency_loss(
    noisy: Tensor, velocity: Tensor, sigma: Tensor, edge: Tensor, target: Tensor
) -> Tensor:
    """Squared distance at the segment's lower edge, in units of velocity; shape [B].

    The projection of every point of a segment must agree with `target`, the same trajectory at the edge. Dividing by the
    way still to go makes long and short jumps count alike (Hyper-SD 2404.13686, section 3.1, with an MSE distance).

    Args:
        noisy, velocity: state and student velocity, [B, C, T, h, w].
        sigma, edge: where the state is and where its segment ends, [B], sigma > edge.
        target: the trajectory at the edge, no gradient.
    """
    if not (sigma > edge).all():
        raise ValueError("every sigma must lie above its segment's lower edge")
    gap = segment_projection(noisy, velocity, sigma, edge) - target
    return gap.square().flatten(1).mean(1) / (sigma - edge).square()


def paired_bootstrap(
    differences: Tensor, *, num_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of paired differences [N]."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(differences), (num_resamples, len(differences)), generator=generator)
    means = differences.double()[index].mean(dim=1)
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high

"""What a reconstruction costs, and how much an opponent's pull counts beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from generator.training.crops import FOREGROUND_DISTANCE
from generator.vae import Decoder
from reelhf.config import Config
from reelhf.engine import all_reduce_sum, world_size

HeadInput = tuple[Tensor, bool]
"""Fine tokens of one chunk, [B, width, T, h, w], and whether the chunk starts the clip."""


class VAELossConfig(Config):
    """Weights of the terms."""

    mse: float = Field(1.0, ge=0)
    """Squared error. It leads here: an L1 error has its optimum at the median, which for a small moving actor is the
    background, and training stays there for hundreds of steps."""
    l1: float = Field(0.1, ge=0)
    """Absolute error."""
    edge: float = Field(0.0, ge=0)
    """Absolute error of the spatial differences between neighbouring pixels."""
    kl: float = Field(1e-6, ge=0)
    """Divergence from N(0, 1) per latent element."""
    foreground: float = Field(1.0, ge=0)
    """Extra weight of pixels unlike their clip's median colour, in the first three."""


def pixel_loss(
    reconstruction: Tensor, frames: Tensor, foreground: Tensor, config: VAELossConfig
) -> Tensor:
    """The terms that compare pixels, a scalar.

    Args:
        reconstruction, frames: [B, 3, F, H, W].
        foreground: `foreground_distance` of the whole clips at the crops, [B, 1, F, H, W].
    """
    weight = 1 + config.foreground * (foreground > FOREGROUND_DISTANCE).to(frames)
    error = reconstruction - frames
    loss = config.mse * (weight * error.square()).mean() + config.l1 * (weight * error.abs()).mean()
    if config.edge:
        for axis in (3, 4):
            along = weight.narrow(axis, 1, weight.shape[axis] - 1)
            loss = loss + config.edge * (along * error.diff(dim=axis).abs()).mean()
    return loss


def vae_loss(
    reconstruction: Tensor, frames: Tensor, kl: Tensor, foreground: Tensor, config: VAELossConfig
) -> Tensor:
    """`pixel_loss` and the divergence `kl` (a scalar, nats per latent element), weighted, a scalar."""
    return pixel_loss(reconstruction, frames, foreground, config) + config.kl * kl


def adaptive_weight(fidelity_norm: Tensor, adversarial_norm: Tensor, *, limit: float) -> Tensor:
    """Factor that makes the adversarial gradient as long as the fidelity's at the decoder's last layer (VQGAN, 2012.09841, equation 7).

    Norms of two gradients of the same weights, scalars; the result lies in [0, limit], and has no gradient.
    """
    return (fidelity_norm / (adversarial_norm + 1e-8)).clamp(0, limit).detach()


@contextmanager
def head_inputs(decoder: Decoder) -> Iterator[list[HeadInput]]:
    """What reaches the decoder's last layer inside the block, chunk by chunk, detached."""
    seen: list[HeadInput] = []
    hook = decoder.head.register_forward_pre_hook(
        lambda _, inputs: seen.append((inputs[0].detach(), inputs[1]))
    )
    try:
        yield seen
    finally:
        hook.remove()


def last_layer_norms(
    head: nn.Module, seen: Sequence[HeadInput], cotangents: Sequence[Tensor]
) -> list[Tensor]:
    """Norm of the gradient that each of several losses has in the decoder's last layer, over all processes; all of them call it.

    The last layer alone is run again on what it saw: neither the rest of the network nor any `.grad` is touched.

    Args:
        cotangents: gradients of the losses with respect to the reconstruction, [B, 3, F, H, W] each.
    """
    weights = {
        name: parameter.detach().requires_grad_(True)
        for name, parameter in head.named_parameters()
        if name.endswith("weight")
    }
    biases = {
        name: parameter.detach()
        for name, parameter in head.named_parameters()
        if name not in weights
    }
    with torch.enable_grad():
        chunks = [functional_call(head, {**weights, **biases}, inputs) for inputs in seen]
        output = torch.cat(chunks, dim=2)
    norms = []
    for cotangent in cotangents:
        gradients = torch.autograd.grad(
            output, list(weights.values()), cotangent, retain_graph=True, allow_unused=True
        )
        # `first` and `later` weights: of images only the first, on every process
        means = [all_reduce_sum(g) / world_size() for g in gradients if g is not None]
        norms.append(torch.nn.utils.get_total_norm(means))
    return norms


def pulled(reconstruction: Tensor, cotangent: Tensor) -> Tensor:
    """A scalar whose gradient with respect to the reconstruction is the cotangent; its own value means nothing."""
    return (reconstruction * cotangent.detach()).sum()

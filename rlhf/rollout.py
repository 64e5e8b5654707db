"""Clips from the policy with a gradient path of our choosing, and the two-stage gradient from pixels to latents.

Four ways to let the reward's gradient reach the denoiser, all returning clean latents [B, C, T, h, w]:

- `last`: the whole graph of the last K sampler steps (DRaFT-K, 2309.17400).
- `drtune`: K steps drawn from a sigma band; the denoiser's INPUT is detached at each, so the gradient reaches every graded
  step along the sampler's linear path alone (DRTune, 2405.00760). The clip that is scored is the finished one.
- `x0`: stop at one step drawn from the band and jump to its x0 prediction (ReFL, 2304.05977, with a chosen band).
- `direct_align`: finish the clip, re-noise it with known noise to a sigma of the band, take one graded step and recover x0 by
  the known noise (SRPO, 2509.06942).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from generator.base import SamplerSpec
from generator.flow import add_noise, x0_from_velocity
from reelhf.errors import UserError
from rlhf.losses import direct_align_clean

if TYPE_CHECKING:
    from generator.base import Condition, SamplerKind, Task, VideoBackbone

GradientMode = Literal["last", "drtune", "x0", "direct_align"]
Scores = TypeVar("Scores")


@dataclass(frozen=True)
class GradedSteps:
    """Which sampler steps the gradient passes through, the same on every rank."""

    mode: GradientMode
    steps: tuple[int, ...]
    """Indices of the sampler's intervals, ascending."""


def step_coefficients(
    kind: SamplerKind, sigma: float, sigma_next: float
) -> tuple[float, float, float]:
    """(a, b, c) of one sampler step: next = a * latents + b * velocity + c * fresh noise.

    Euler moves along the velocity; re-noising predicts x0 = latents - sigma * velocity and noises it to the next sigma.
    """
    if kind == "adams":
        raise ValueError("the steps of 'adams' look back; a single one has no coefficients")
    if kind == "euler":
        return 1.0, sigma_next - sigma, 0.0
    return 1.0 - sigma_next, -(1.0 - sigma_next) * sigma, sigma_next


def shorter_sampler(sampler: SamplerSpec, num_steps: int | None) -> SamplerSpec:
    """The checkpoint's sampler with `num_steps` of its own sigmas, evenly spaced by index; all of them for None."""
    if num_steps is None or num_steps == sampler.num_steps:
        return sampler
    if num_steps > sampler.num_steps:
        raise UserError(
            f"rollout_steps is {num_steps}, but the checkpoint samples with {sampler.num_steps} steps"
        )
    picked = torch.linspace(0, sampler.num_steps, num_steps + 1).round().long().tolist()
    sigmas = tuple(sampler.sigmas[index] for index in picked)
    return replace(sampler, sigmas=sigmas)


def anchor_sigmas(sampler: SamplerSpec, generators: Sequence[torch.Generator]) -> Tensor:
    """A sigma per clip [B]: anywhere in (0, 1) for an ODE, on its own grid for a few-step student, which knows no other."""
    if sampler.kind == "renoise":
        grid = torch.tensor(sampler.sigmas[:-1])
        return torch.stack([grid[torch.randint(len(grid), (), generator=g)] for g in generators])
    return torch.stack([torch.rand((), generator=g).clamp(0.01, 0.99) for g in generators])


def draw_graded_steps(
    sampler: SamplerSpec,
    mode: GradientMode,
    num_steps: int,
    band: tuple[float, float],
    generator: torch.Generator,
) -> GradedSteps:
    """Choose the graded steps: the last ones, or a random subset of those whose starting sigma lies in `band`.

    `x0` and `direct_align` grade one step. The number of steps never depends on the draw: under ZeRO-3 every rank must
    make the same number of forward calls.
    """
    if mode == "last":
        return GradedSteps(
            mode, tuple(range(max(0, sampler.num_steps - num_steps), sampler.num_steps))
        )
    low, high = band
    inside = [i for i, sigma in enumerate(sampler.sigmas[:-1]) if low <= sigma <= high]
    if mode == "direct_align":  # at sigma = 1 nothing of the clip is left to align to
        inside = [i for i in inside if sampler.sigmas[i] < 1.0]
    wanted = num_steps if mode == "drtune" else 1
    if len(inside) < wanted:
        raise UserError(
            f"gradient_band [{low}, {high}] holds {len(inside)} of the sampler's sigmas "
            f"{tuple(round(s, 3) for s in sampler.sigmas[:-1])}; {mode} needs at least {wanted}"
        )
    chosen = torch.randperm(len(inside), generator=generator)[:wanted].tolist()
    return GradedSteps(mode, tuple(sorted(inside[i] for i in chosen)))


def rollout(
    backbone: VideoBackbone,
    denoiser: nn.Module,
    condition: Condition,
    task: Task,
    noise: Callable[[int], Tensor],
    *,
    sampler: SamplerSpec,
    graded: GradedSteps,
) -> Tensor:
    """Clean latents [B, C, T, h, w] carrying the graph that `graded` asks for.

    Args:
        denoiser: the engine in training (every call goes through it), or any module `backbone.velocity` accepts.
        noise: stream -> standard normal [B, C, T, h, w]: 0 is the starting point, i + 1 what a re-noising sampler adds after
            step i, and one more for `direct_align`.
    """

    def velocity(latents: Tensor, sigma: float, sigma_next: float) -> Tensor:
        sigmas, targets = (
            latents.new_full((len(latents),), value) for value in (sigma, sigma_next)
        )
        return backbone.velocity(
            denoiser,
            latents,
            sigmas,
            condition,
            task,
            **sampler.guidance,
            sigma_target=targets,
        )

    if graded.mode == "direct_align":
        with torch.no_grad():
            clean = rollout(
                backbone,
                denoiser,
                condition,
                task,
                noise,
                sampler=sampler,
                graded=GradedSteps("last", ()),
            )
        (index,) = graded.steps
        sigma, sigma_next = sampler.sigmas[index], sampler.sigmas[index + 1]
        known = noise(sampler.num_steps + 1)
        start = add_noise(clean, known, torch.full((len(clean),), sigma, device=clean.device))
        return direct_align_clean(
            start + (sigma_next - sigma) * velocity(start, sigma, sigma_next), known, sigma_next
        )

    latents = noise(0)
    path: Tensor | None = None  # drtune: a zero whose gradient is that of the sampler's linear path
    for index, (sigma, sigma_next) in enumerate(pairwise(sampler.sigmas)):
        is_graded = index in graded.steps
        with torch.set_grad_enabled(is_graded and torch.is_grad_enabled()):
            step_velocity = velocity(latents, sigma, sigma_next)
        if is_graded and graded.mode == "x0":
            return x0_from_velocity(
                latents, latents.new_full((len(latents),), sigma), step_velocity
            )
        keep, move, renoise = step_coefficients(sampler.kind, sigma, sigma_next)
        if graded.mode == "drtune":
            path = None if path is None else keep * path
            if is_graded:
                term = move * (step_velocity - step_velocity.detach())
                path = term if path is None else path + term
            step_velocity = step_velocity.detach()  # the next input carries no gradient
        latents = keep * latents + move * step_velocity
        if renoise > 0:
            latents = latents + renoise * noise(index + 1)
    return latents if path is None else latents + path


@dataclass(frozen=True)
class PixelGradient(Generic[Scores]):
    """What the two-stage pass found."""

    frames: Tensor
    """The decoded clips, unclamped and detached, [B, 3, F, H, W]."""
    latent_gradient: Tensor
    """d (sum of the loss over clips) / d latents, [B, C, T, h, w]."""
    scores: Scores
    """Whatever the objective returned beside its loss."""


def two_stage_gradient(
    decode: Callable[[Tensor, object | None], tuple[Tensor, object]],
    latents: Tensor,
    objective: Callable[[Tensor], tuple[Tensor, Scores]],
    *,
    chunk_size: int,
    truncate_state: bool = False,
) -> PixelGradient[Scores]:
    """Gradient of a loss on pixels with respect to latents, holding one decoder chunk's graph at a time.

    1. Decode chunk by chunk without a graph, keeping each chunk's entry state. 2. Score the frames as a leaf. 3. Go back
    through the chunks in reverse with two cotangents: that of the chunk's frames and that of the state it handed on.

    Args:
        decode: streaming decoder, `decode(latents, state) -> (frames, state)`.
        latents: [B, C, T, h, w]; their own graph is neither used nor touched.
        objective: frames [B, 3, F, H, W] -> (loss per clip [B], scores); its graph is freed before the decoder's is built.
        chunk_size: latent frames per decoder call.
        truncate_state: drop the state's cotangent: cheaper, and the gradient of a frame then stops at its chunk's edge.
    """
    chunks = latents.detach().split(chunk_size, dim=2)
    entry_states: list[object | None] = [None]
    decoded = []
    with torch.no_grad():
        for chunk in chunks:
            frames, state = decode(chunk, entry_states[-1])
            decoded.append(frames)
            entry_states.append(state)

    leaf = torch.cat(decoded, dim=2).requires_grad_()
    loss, scores = objective(leaf)
    (frame_gradient,) = torch.autograd.grad(loss.sum(), leaf)
    frame_gradients = frame_gradient.split([part.shape[2] for part in decoded], dim=2)

    latent_gradients: list[Tensor] = []
    state_cotangents: list[Tensor | None] = []
    for chunk, entry, gradient in reversed(
        list(zip(chunks, entry_states, frame_gradients, strict=False))
    ):
        chunk = chunk.clone().requires_grad_()
        leaves, structure = tree_flatten(entry)
        leaves = [_as_leaf(value) for value in leaves]
        frames, state = decode(chunk, tree_unflatten(leaves, structure))
        handed_on = [value for value in tree_flatten(state)[0] if _is_differentiable(value)]
        outputs, cotangents = [frames], [gradient]
        for value, cotangent in zip(handed_on, state_cotangents, strict=False):
            if cotangent is not None and value.requires_grad:
                outputs.append(value)
                cotangents.append(cotangent)
        inputs = [value for value in leaves if _is_differentiable(value)]
        found = torch.autograd.grad(outputs, [chunk, *inputs], cotangents, allow_unused=True)
        latent_gradients.insert(0, torch.zeros_like(chunk) if found[0] is None else found[0])
        state_cotangents = [] if truncate_state else list(found[1:])
    return PixelGradient(leaf.detach(), torch.cat(latent_gradients, dim=2), scores)


def jitter(
    frames: Tensor, generators: Sequence[torch.Generator], *, noise: float, shift: int
) -> Tensor:
    """Frames [B, 3, F, H, W] as a shaky, grainy eye sees them, one generator per clip; differentiable.

    Rewards are fooled by patterns that hold for one exact pixel grid. Expecting the reward over small changes that no viewer
    minds takes their gradient away (randomised smoothing, 1902.02918, and expectation over transformations, 1707.07397).
    """
    if shift:
        padded = F.pad(frames, (shift, shift, shift, shift, 0, 0), mode="replicate")
        height, width = frames.shape[-2:]
        views = []
        for clip, generator in zip(padded, generators, strict=True):
            top, left = torch.randint(2 * shift + 1, (2,), generator=generator).tolist()
            views.append(clip[..., top : top + height, left : left + width])
        frames = torch.stack(views)
    if noise:
        grain = [torch.randn(frames.shape[1:], generator=generator) for generator in generators]
        frames = frames + noise * torch.stack(grain).to(frames)
    return frames


def _is_differentiable(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _as_leaf(value: object) -> object:
    return value.detach().requires_grad_() if _is_differentiable(value) else value  # type: ignore[attr-defined]

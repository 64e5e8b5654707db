"""Rollouts with graded steps against autograd and finite differences; the two-stage gradient against one graph."""

from __future__ import annotations

import pytest
import torch
from tiny_models import PROMPTS, tiny_composite, tiny_generator
from torch import Tensor, nn

from generator.base import SamplerSpec
from generator.sampling import sample_latents
from generator.vae import VAEConfig, VideoVAE
from reelhf.errors import UserError
from rlhf.examples import ClipNoise
from rlhf.rollout import (
    GradedSteps,
    anchor_sigmas,
    draw_graded_steps,
    jitter,
    rollout,
    shorter_sampler,
    step_coefficients,
    two_stage_gradient,
)

EULER = SamplerSpec("euler", (1.0, 0.75, 0.4, 0.0))
RENOISE = SamplerSpec("renoise", (1.0, 0.75, 0.4, 0.0))


class ToyField(nn.Module):
    """A velocity field with two parameters, in float64: v = tanh(a * x + b * sigma)."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.tensor([0.7, -0.3], dtype=torch.float64))

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        slope, offset = self.parameter
        return torch.tanh(slope * noisy + offset * sigma.view(-1, 1, 1, 1, 1))


class ToyBackbone:
    def velocity(self, denoiser, noisy, sigma, condition, task, **_):
        return denoiser(noisy, sigma)


def toy_noise(stream: int) -> Tensor:
    generator = torch.Generator().manual_seed(stream)
    return torch.randn(2, 3, 2, 2, 2, generator=generator, dtype=torch.float64)


def toy_rollout(field: ToyField, sampler: SamplerSpec, graded: GradedSteps) -> Tensor:
    return rollout(ToyBackbone(), field, None, None, toy_noise, sampler=sampler, graded=graded)


def reward_of(latents: Tensor) -> Tensor:
    return (
        (latents * torch.linspace(-1, 1, latents.numel(), dtype=latents.dtype).view_as(latents))
        .sin()
        .sum()
    )


def frozen_rollout(
    parameter: Tensor, sampler: SamplerSpec, graded: tuple[int, ...], inputs: list[Tensor] | None
) -> Tensor:
    """The rollout with its ungraded steps (and, for drtune, every input) held at the base point: what is differentiated."""
    base, moved = ToyField(), ToyField()
    moved.parameter.data = parameter
    latents = toy_noise(0)
    for index, (sigma, sigma_next) in enumerate(
        zip(sampler.sigmas, sampler.sigmas[1:], strict=False)
    ):
        keep, move, renoise = step_coefficients(sampler.kind, sigma, sigma_next)
        field = moved if index in graded else base
        seen = latents if inputs is None else inputs[index]
        velocity = field(seen, torch.full((2,), sigma, dtype=torch.float64))
        latents = keep * latents + move * velocity + renoise * toy_noise(index + 1)
    return latents


def inputs_at_base(sampler: SamplerSpec) -> list[Tensor]:
    field, latents, seen = ToyField(), toy_noise(0), []
    for index, (sigma, sigma_next) in enumerate(
        zip(sampler.sigmas, sampler.sigmas[1:], strict=False)
    ):
        seen.append(latents)
        keep, move, renoise = step_coefficients(sampler.kind, sigma, sigma_next)
        velocity = field(latents, torch.full((2,), sigma, dtype=torch.float64))
        latents = (keep * latents + move * velocity + renoise * toy_noise(index + 1)).detach()
    return seen


def finite_difference(reward, parameter: Tensor, eps: float = 1e-6) -> Tensor:
    gradient = torch.zeros_like(parameter)
    for index in range(len(parameter)):
        step = torch.zeros_like(parameter)
        step[index] = eps
        gradient[index] = (reward(parameter + step) - reward(parameter - step)) / (2 * eps)
    return gradient


@pytest.mark.parametrize("sampler", [EULER, RENOISE], ids=["euler", "renoise"])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_gradient_of_the_last_steps_equals_finite_differences(sampler, num_steps):
    field = ToyField()
    graded = draw_graded_steps(sampler, "last", num_steps, (0, 1), torch.Generator())
    (found,) = torch.autograd.grad(reward_of(toy_rollout(field, sampler, graded)), field.parameter)
    with torch.no_grad():
        wanted = finite_difference(
            lambda p: reward_of(frozen_rollout(p, sampler, graded.steps, None)),
            field.parameter.data,
        )
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("sampler", [EULER, RENOISE], ids=["euler", "renoise"])
@pytest.mark.parametrize("steps", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_drtune_gradient_is_that_of_the_linear_path_with_every_input_held(sampler, steps):
    field = ToyField()
    latents = toy_rollout(field, sampler, GradedSteps("drtune", steps))
    (found,) = torch.autograd.grad(reward_of(latents), field.parameter)
    held = inputs_at_base(sampler)
    with torch.no_grad():
        wanted = finite_difference(
            lambda p: reward_of(frozen_rollout(p, sampler, steps, held)), field.parameter.data
        )
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_drtune_and_last_agree_on_the_last_step():
    field = ToyField()
    gradients = []
    for mode in ("last", "drtune"):
        latents = toy_rollout(field, EULER, GradedSteps(mode, (2,)))
        gradients.append(torch.autograd.grad(reward_of(latents), field.parameter)[0])
    torch.testing.assert_close(*gradients)


def test_x0_jump_predicts_the_clean_latents_of_its_step():
    field = ToyField()
    latents = toy_rollout(field, EULER, GradedSteps("x0", (1,)))
    start = inputs_at_base(EULER)[1]
    expected = start - 0.75 * field(start, torch.full((2,), 0.75, dtype=torch.float64))
    torch.testing.assert_close(latents, expected)
    assert latents.requires_grad


def test_direct_align_of_the_true_velocity_gives_back_the_finished_clip():
    class Straight(nn.Module):  # a field whose velocity is exact for the re-noised clip
        def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
            sigma = sigma.view(-1, 1, 1, 1, 1)
            return torch.where(sigma < 1, (noisy - torch.ones_like(noisy)) / sigma, noisy - 1)

    latents = rollout(
        ToyBackbone(),
        Straight(),
        None,
        None,
        toy_noise,
        sampler=EULER,
        graded=GradedSteps("direct_align", (1,)),
    )
    torch.testing.assert_close(latents, torch.ones_like(latents))


@pytest.mark.parametrize("role", ["base", "refiner"])
@pytest.mark.parametrize("mode", ["last", "drtune"])
def test_rollout_makes_the_clip_that_sampling_makes(role, mode):
    backbone = tiny_generator(role)
    frames, height, width = backbone.frame_shape
    condition = backbone.encode_prompts(PROMPTS[:2])
    task = backbone.text_to_video_task(2, frames, height, width)
    if role == "refiner":
        task = backbone.low_res_task(
            torch.rand(2, 3, frames, height // 2, width // 2), height, width
        )
    seeds = (11, 12)
    noise = ClipNoise(seeds, tuple(task.condition_latents.shape[1:]))
    found = rollout(
        backbone,
        backbone.denoiser,
        condition,
        task,
        noise,
        sampler=backbone.sampler,
        graded=GradedSteps(mode, (backbone.sampler.num_steps - 1,)),
    )
    with torch.no_grad():
        wanted = sample_latents(backbone, condition, task, noise(0), seeds=seeds)
    torch.testing.assert_close(found.detach(), wanted, atol=1e-5, rtol=1e-5)
    assert found.requires_grad


def test_graded_steps_come_from_the_band_and_cover_it():
    drawn = set()
    for seed in range(40):
        graded = draw_graded_steps(
            EULER, "drtune", 1, (0.3, 0.8), torch.Generator().manual_seed(seed)
        )
        drawn |= set(graded.steps)
    assert drawn == {1, 2}


def test_a_band_without_a_sigma_says_which_there_are():
    with pytest.raises(UserError, match=r"holds 0 of the sampler's sigmas \(1.0, 0.75, 0.4\)"):
        draw_graded_steps(EULER, "drtune", 1, (0.5, 0.6), torch.Generator())


def test_direct_align_never_starts_from_pure_noise():
    for seed in range(20):
        graded = draw_graded_steps(
            EULER, "direct_align", 1, (0.0, 1.0), torch.Generator().manual_seed(seed)
        )
        assert graded.steps != (0,)


def test_a_shorter_sampler_keeps_both_ends_and_only_known_sigmas():
    full = SamplerSpec("euler", tuple(1 - i / 20 for i in range(21)), guidance_scale=3.0)
    short = shorter_sampler(full, 8)
    assert short.num_steps == 8
    assert set(short.sigmas) <= set(full.sigmas)
    assert (short.sigmas[0], short.sigmas[-1], short.guidance_scale) == (1.0, 0.0, 3.0)
    with pytest.raises(UserError, match="samples with 20 steps"):
        shorter_sampler(full, 21)


def test_a_few_step_student_is_anchored_on_its_own_sigmas_only():
    generators = [torch.Generator().manual_seed(seed) for seed in range(50)]
    assert anchor_sigmas(RENOISE, generators).unique().tolist() == pytest.approx([0.4, 0.75, 1.0])


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5])
def test_two_stage_gradient_equals_the_gradient_of_one_graph(chunk_size):
    torch.manual_seed(0)
    sizes = {
        "decoder_width": 16,
        "decoder_blocks": 2,
        "decoder_fine_width": 8,
        "decoder_fine_blocks": 2,
    }
    vae = VideoVAE(VAEConfig(encoder_fine_width=8, encoder_width=16, **sizes)).requires_grad_(False)
    nn.init.normal_(vae.decoder.head.later.weight, std=0.05)  # a strong path through time
    latents = torch.randn(2, 48, 5, 2, 2)

    def objective(frames: Tensor) -> tuple[Tensor, None]:
        return (frames * 3).sin().flatten(1).mean(1), None

    leaf = latents.clone().requires_grad_()
    frames, _ = vae.decode(leaf)
    (wanted,) = torch.autograd.grad(objective(frames)[0].sum(), leaf)
    found = two_stage_gradient(vae.decode, latents, objective, chunk_size=chunk_size)
    torch.testing.assert_close(found.frames, frames.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.latent_gradient, wanted, atol=1e-6, rtol=1e-4)


def test_truncating_the_state_loses_gradient_only_across_chunks():
    torch.manual_seed(0)
    vae = VideoVAE(
        VAEConfig(decoder_width=16, decoder_fine_width=8, decoder_fine_blocks=1)
    ).requires_grad_(False)
    latents = torch.randn(1, 48, 3, 2, 2)

    def gradient(truncate: bool) -> Tensor:
        return two_stage_gradient(
            vae.decode,
            latents,
            lambda frames: (frames.square().flatten(1).sum(1), None),
            chunk_size=1,
            truncate_state=truncate,
        ).latent_gradient

    full, truncated = gradient(False), gradient(True)
    torch.testing.assert_close(full[:, :, -1], truncated[:, :, -1])
    assert not torch.allclose(full[:, :, 0], truncated[:, :, 0])


def test_surrogate_through_the_denoiser_equals_one_graph_from_weights_to_reward():
    backbone, reward = tiny_generator(), tiny_composite()
    condition = backbone.encode_prompts(PROMPTS[:2])
    task = backbone.text_to_video_task(2, *backbone.frame_shape)
    noise = ClipNoise((1, 2), tuple(task.condition_latents.shape[1:]))
    prompts = reward.encode_prompts(PROMPTS[:2])
    parameters = list(backbone.denoiser.parameters())

    def latents() -> Tensor:
        graded = GradedSteps("last", (4,))
        return rollout(
            backbone,
            backbone.denoiser,
            condition,
            task,
            noise,
            sampler=backbone.sampler,
            graded=graded,
        )

    def objective(frames: Tensor) -> tuple[Tensor, None]:
        return -reward.score(frames, fps=8.0, prompts=prompts).total, None

    frames, _ = backbone.decode(latents())
    wanted = torch.autograd.grad(objective(frames)[0].sum(), parameters, allow_unused=True)
    clean = latents()
    gradient = two_stage_gradient(backbone.decode, clean, objective, chunk_size=1).latent_gradient
    found = torch.autograd.grad((gradient * clean).sum(), parameters, allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def view_generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


def test_jitter_off_changes_nothing():
    frames = torch.rand(2, 3, 4, 8, 8)
    assert torch.equal(jitter(frames, view_generators(), noise=0.0, shift=0), frames)


def test_jitter_shifts_each_clip_as_a_whole_and_repeats_the_border():
    ramp = torch.arange(8.0).expand(2, 3, 4, 8, 8)
    seen = jitter(ramp, view_generators(), noise=0.0, shift=2)
    for clip in seen:
        row = clip[0, 0, 0]
        step = int(row[4] - 4)
        assert -2 <= step <= 2
        assert torch.equal(clip, (torch.arange(8.0) + step).clamp(0, 7).expand_as(clip))


def test_jitter_depends_on_the_clip_alone_and_passes_the_gradient():
    frames = torch.rand(2, 3, 4, 8, 8, requires_grad=True)
    together = jitter(frames, view_generators(), noise=0.1, shift=2)
    alone = jitter(frames[1:], view_generators()[1:], noise=0.1, shift=2)
    assert torch.equal(together[1:], alone)
    together.sum().backward()
    assert (
        frames.grad.sum() == frames.numel()
    )  # a shift moves the gradient, the border keeps its share

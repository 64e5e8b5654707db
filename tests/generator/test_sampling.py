from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from generator.base import BackboneSpec, Condition, SamplerSpec, Task, VideoBackbone
from generator.checkpoint import load_generator
from generator.flow import sigma_schedule
from generator.sampling import noise_like, refine_frames, sample_frames, sample_latents
from reelhf.errors import UserError

PROMPTS = ["a large solid red circle", "一个小的纯色蓝色圆环", "a small green star"]


class CountingVelocity:
    """A denoiser whose velocity is known in closed form; counts its evaluations (NFE)."""

    def __init__(self, velocity):
        self.velocity, self.calls, self.rows = velocity, 0, 0

    def __call__(self, noisy, sigma, *_inputs):
        self.calls += 1
        self.rows += len(noisy)
        return self.velocity(noisy, sigma)


def start(backbone, batch=2):
    condition = backbone.encode_prompts(PROMPTS[:batch])
    shape = backbone.spec.latent_shape(*backbone.frame_shape)
    task = backbone.text_to_video_task(batch, *backbone.frame_shape)
    return condition, task, noise_like(range(batch), shape)


def test_the_noise_of_a_seed_does_not_depend_on_its_batch():
    shape = (4, 3, 2, 2)
    together = noise_like([5, 9, 5], shape)
    assert torch.equal(together[1:2], noise_like([9], shape))
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(noise_like([5], shape, stream=1), noise_like([5], shape))
    assert noise_like(range(400), shape).std().item() == pytest.approx(1.0, abs=0.02)


def test_euler_sampling_follows_a_straight_path_to_its_end(tiny_generator):
    backbone = tiny_generator()
    condition, task, noise = start(backbone)
    clean = torch.randn_like(noise)
    denoiser = CountingVelocity(lambda noisy, sigma: noise - clean)
    sampler = SamplerSpec("euler", (1.0, 0.7, 0.2, 0.0))
    latents = sample_latents(backbone, condition, task, noise, denoiser=denoiser, sampler=sampler)
    torch.testing.assert_close(latents, clean)
    assert denoiser.calls == 3


def test_renoise_sampling_ends_at_the_predicted_clean_latents(tiny_generator):
    """With the exact velocity towards `clean`, fresh noise changes the way but not the end; it depends on the seed only."""
    backbone = tiny_generator()
    condition, task, noise = start(backbone)
    clean = torch.randn_like(noise)
    seen = []

    def towards_clean(noisy, sigma):
        seen.append(noisy)
        return (noisy - clean) / sigma[:, None, None, None, None]

    sampler = SamplerSpec("renoise", (1.0, 0.5, 0.0))
    for seeds in ([1, 2], [1, 3]):
        latents = sample_latents(
            backbone,
            condition,
            task,
            noise,
            denoiser=CountingVelocity(towards_clean),
            sampler=sampler,
            seeds=seeds,
        )
        torch.testing.assert_close(latents, clean)
    assert torch.equal(seen[1][0], seen[3][0])
    assert not torch.equal(seen[1][1], seen[3][1])
    with pytest.raises(ValueError, match="one seed per sample"):
        sample_latents(backbone, condition, task, noise, sampler=sampler)


def test_guidance_of_one_costs_one_evaluation_and_equals_the_conditional_velocity(tiny_generator):
    backbone = tiny_generator()
    condition, task, noise = start(backbone)
    sigma = torch.tensor([0.4, 0.9])

    def velocity(scale):
        return backbone.velocity(
            backbone.denoiser, noise, sigma, condition, task, guidance_scale=scale
        )

    conditional, unconditional = velocity(None), velocity(0.0)
    assert torch.equal(velocity(1.0), conditional)
    torch.testing.assert_close(
        unconditional,
        backbone.velocity(backbone.denoiser, noise, sigma, condition.dropped(), task),
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(
        velocity(3.0), unconditional + 3.0 * (conditional - unconditional), rtol=1e-4, atol=1e-4
    )
    assert (conditional - unconditional).abs().max() > 1e-4
    counting = CountingVelocity(lambda noisy, sigma: noisy)
    backbone.velocity(counting, noise, sigma, condition, task, guidance_scale=1.0)
    assert counting.rows == 2
    backbone.velocity(counting, noise, sigma, condition, task, guidance_scale=2.0)
    assert counting.rows == 2 + 4


def test_an_empty_prompt_is_the_unconditional_one(tiny_generator):
    backbone = tiny_generator()
    _, task, noise = start(backbone, 1)
    sigma = torch.tensor([0.5])
    with torch.no_grad():
        empty = backbone.velocity(
            backbone.denoiser, noise, sigma, backbone.encode_prompts([""]), task
        )
        dropped = backbone.velocity(
            backbone.denoiser, noise, sigma, backbone.encode_prompts([PROMPTS[0]]).dropped(), task
        )
    torch.testing.assert_close(empty, dropped, rtol=1e-4, atol=1e-5)


def test_sampled_clips_depend_on_prompt_and_seed_only(tiny_generator):
    backbone = tiny_generator()
    assert isinstance(backbone, VideoBackbone)
    clips = sample_frames(backbone, PROMPTS, [3, 4, 5], batch_size=2)
    assert clips.shape == (3, 3, 5, 32, 32)
    assert clips.min() >= 0
    assert clips.max() <= 1
    torch.testing.assert_close(
        sample_frames(backbone, PROMPTS[1:2], [4]), clips[1:2], rtol=1e-3, atol=1e-4
    )
    with pytest.raises(ValueError, match="one seed per prompt"):
        sample_frames(backbone, PROMPTS, [1])


def test_image_to_video_gives_the_first_latent_frame_and_nothing_else(tiny_generator):
    backbone = tiny_generator()
    images = torch.rand(2, 3, 32, 32)
    task = backbone.image_task(images, 5, 32, 32)
    assert task.condition_mask.shape == (2, 1, 2, 2, 2)
    assert (task.condition_mask[:, :, 0] == 1).all()
    assert not task.condition_mask[:, :, 1:].any()
    assert not task.condition_latents[:, :, 1:].any()
    # causal VAE: the image's latent is the first latent of any clip that starts with it
    clip = torch.cat((images.unsqueeze(2), torch.rand(2, 3, 4, 32, 32)), dim=2)
    torch.testing.assert_close(task.condition_latents[:, :, :1], backbone.encode(clip)[:, :, :1])
    nothing = backbone.text_to_video_task(2, 5, 32, 32)
    assert not nothing.condition_mask.any()
    assert not nothing.condition_latents.any()
    with pytest.raises(ValueError, match="first frames"):
        backbone.image_task(torch.rand(2, 3, 16, 16), 5, 32, 32)


def test_any_frames_may_be_given_and_their_groups_are_held(tiny_generator):
    backbone = replace(tiny_generator(), frame_shape=(9, 32, 32))
    first, last = torch.rand(2, 2, 3, 32, 32)

    def known(task):
        return task.condition_mask[0, 0, :, 0, 0].tolist()

    both = backbone.frames_task({0: first, -1: last}, 9, 32, 32)
    assert known(both) == [1, 0, 1]
    # the picture that a clip shows which rests on the first frame, then jumps to the last one's group
    clip = torch.stack([first] * 5 + [last] * 4, dim=2)
    expected = backbone.encode(clip)
    torch.testing.assert_close(both.condition_latents[:, :, [0, 2]], expected[:, :, [0, 2]])
    assert not both.condition_latents[:, :, 1].any()
    # frame 0 of both tasks is the same, the last frame alone leaves it open
    only_first = backbone.image_task(first, 9, 32, 32)
    torch.testing.assert_close(
        both.condition_latents[:, :, :1], only_first.condition_latents[:, :, :1]
    )
    only_last = backbone.frames_task({8: last}, 9, 32, 32)
    assert known(only_last) == [0, 0, 1]
    still = backbone.encode(torch.stack([last] * 9, dim=2))
    torch.testing.assert_close(only_last.condition_latents[:, :, 2], still[:, :, 2])
    assert known(backbone.frames_task({2: first, 3: last}, 9, 32, 32)) == [0, 1, 0]
    with pytest.raises(UserError, match="frame 9 of a clip of 9 frames; expected -9 to 8"):
        backbone.frames_task({9: last}, 9, 32, 32)
    with pytest.raises(ValueError, match="frames at -1"):
        backbone.frames_task({-1: last[:, :, :16]}, 9, 32, 32)


def test_where_a_clip_ends_may_be_given_beside_where_it_starts(tiny_generator):
    backbone = tiny_generator()
    first, last = torch.rand(2, 1, 3, 32, 32)
    clips = [
        backbone.sample(PROMPTS[0], **given)
        for given in (
            {},
            {"first_frames": first},
            {"given_frames": {-1: last}},
            {"first_frames": first, "given_frames": {-1: last}},
        )
    ]
    for one, other in itertools.combinations(clips, 2):
        assert (one - other).abs().max() > 1e-5
    again = backbone.sample(PROMPTS[0], given_frames={0: first})
    assert torch.equal(again, clips[1])


def test_a_generator_shows_more_than_no_frame_per_second(tiny_generator):
    with pytest.raises(UserError, match=r"0\.0 frames per second; expected more than 0"):
        replace(tiny_generator(), fps=0.0)


def test_how_layers_run_does_not_travel_with_the_weights(tiny_generator, tmp_path):
    backbone = tiny_generator()
    backbone.denoiser.config = backbone.denoiser.config.model_copy(update={"compile": True})
    backbone.save(tmp_path / "g")
    assert not load_generator(tmp_path / "g").denoiser.config.compile


def test_a_refiner_enlarges_clips_and_keeps_no_gradient_to_its_input(tiny_generator):
    refiner = tiny_generator("refiner", 64)
    low_res = torch.rand(2, 3, 5, 32, 32, requires_grad=True)
    task = refiner.low_res_task(low_res, 64, 64)
    assert task.low_res_latents.shape == (2, 8, 2, 4, 4)
    assert not task.low_res_latents.requires_grad
    assert refine_frames(refiner, low_res.detach(), PROMPTS[:2], [0, 1], batch_size=1).shape == (
        2,
        3,
        5,
        64,
        64,
    )
    with pytest.raises(ValueError, match="low-resolution latents"):
        sample_frames(refiner, PROMPTS[:1], [0])
    with pytest.raises(ValueError, match="this is a base"):
        tiny_generator().low_res_task(low_res, 64, 64)


def test_decoding_latent_frame_by_latent_frame_equals_decoding_at_once(tiny_generator):
    backbone = tiny_generator()
    latents = torch.randn(1, 8, 3, 2, 2)
    whole, _ = backbone.decode(latents)
    parts, state = [], None
    for chunk in latents.split(1, dim=2):
        frames, state = backbone.decode(chunk, state)
        parts.append(frames)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=1e-5, atol=1e-5)


def test_a_saved_generator_comes_back_equal(tiny_generator, tmp_path):
    for role, size in (("base", 32), ("refiner", 64)):
        saved = tiny_generator(role, size)
        saved.save(tmp_path / role)
        loaded = load_generator(tmp_path / role)
        assert (loaded.sampler, loaded.role, loaded.frame_shape, loaded.fps, loaded.spec) == (
            saved.sampler,
            role,
            (5, size, size),
            8.0,
            saved.spec,
        )
        for name, value in saved.denoiser.state_dict().items():
            assert torch.equal(loaded.denoiser.state_dict()[name], value)
        task = None
        if role == "refiner":
            task = saved.low_res_task(torch.rand(1, 3, 5, 32, 32), 64, 64)
        before, after = (sample_frames(g, PROMPTS[:1], [0], task=task) for g in (saved, loaded))
        assert torch.equal(before, after)


def test_a_generator_cut_short_is_refused_by_name(tiny_generator, tmp_path):
    tiny_generator().save(tmp_path / "g")
    weights = tmp_path / "g" / "denoiser.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"denoiser\.safetensors was cut short"):
        load_generator(tmp_path / "g")
    with pytest.raises(UserError, match=r"not a generator folder: it has no generator\.json"):
        load_generator(tmp_path)


def test_lora_targets_are_linear_layers_of_every_block(tiny_generator):
    backbone = tiny_generator()
    modules = dict(backbone.denoiser.named_modules())
    targets = backbone.lora_targets()
    assert all(isinstance(modules[name], torch.nn.Linear) for name in targets)
    assert {name.rsplit(".", 1)[1] for name in targets} == {"q", "kv", "out", "up", "down"}
    assert {name.split(".")[0] for name in targets} == {"spatial", "temporal"}


@pytest.mark.parametrize(
    ("frames", "height", "width", "message"),
    [
        (8, 64, 64, r"8 frames: .* use 5 or 9"),
        (9, 60, 64, r"height 60 is not a positive multiple of 16; use 48 or 64"),
        (9, 64, 8, r"width 8 is not a positive multiple of 16; use 16 or 32"),
    ],
)
def test_illegal_sizes_are_named_with_the_nearest_legal_ones(frames, height, width, message):
    with pytest.raises(UserError, match=message):
        BackboneSpec().check(frames, height, width)


def test_latent_shapes():
    assert BackboneSpec().latent_shape(9, 64, 96) == (48, 3, 4, 6)
    assert BackboneSpec().latent_shape(1, 16, 16) == (48, 1, 1, 1)


@pytest.mark.parametrize(
    "sigmas", [(1.0,), (0.9, 0.0), (1.0, 0.5), (1.0, 0.5, 0.5, 0.0), (1.0, 0.2, 0.4, 0.0)]
)
def test_a_sampler_goes_strictly_down_from_one_to_zero(sigmas):
    with pytest.raises(UserError, match="strictly descending"):
        SamplerSpec("euler", sigmas)
    with pytest.raises(UserError, match="sampler kind 'heun'"):
        SamplerSpec("heun", (1.0, 0.0))


def test_conditions_and_tasks_are_cut_and_joined_along_the_batch():
    condition = Condition(torch.randn(3, 4, 8), torch.ones(3, 4, dtype=torch.bool))
    short = Condition(torch.randn(1, 2, 8), torch.ones(1, 2, dtype=torch.bool))
    joined = Condition.cat((condition, short))
    assert joined.embeds.shape == (4, 4, 8)
    assert joined.mask[3].tolist() == [True, True, False, False]
    assert len(joined[1]) == 1
    assert torch.equal(joined[1:3].embeds, condition.embeds[1:])
    dropped = condition.dropped(torch.tensor([True, False, True]))
    assert dropped.mask.any(1).tolist() == [False, True, False]
    task = Task(torch.randn(3, 2, 1, 1, 1), torch.zeros(3, 1, 1, 1, 1))
    assert torch.equal(Task.cat((task[:1], task[1:])).condition_latents, task.condition_latents)
    with pytest.raises(ValueError, match="with and without"):
        Task.cat((task, Task(task.condition_latents, task.condition_mask, task.condition_latents)))


def test_the_second_order_sampler_ends_nearer_to_the_exact_flow_at_the_same_cost(tiny_generator):
    """A field whose path bends: v(x, sigma) = x, x(0) = x(1) / e."""
    backbone = tiny_generator()
    condition, task, noise = start(backbone)
    errors = {}
    for kind in ("euler", "adams"):
        for steps in (8, 16):
            denoiser = CountingVelocity(lambda noisy, sigma: noisy)
            sampler = SamplerSpec(kind, sigma_schedule(steps))
            end = sample_latents(
                backbone, condition, task, noise, denoiser=denoiser, sampler=sampler
            )
            assert denoiser.calls == steps
            errors[kind, steps] = float((end - noise * math.exp(-1)).abs().max())
    assert errors["adams", 8] < 0.3 * errors["euler", 8]
    # twice the steps: a half of the error for the first order, about a quarter for the second
    assert 1.7 < errors["euler", 8] / errors["euler", 16] < 2.4
    assert errors["adams", 8] / errors["adams", 16] > 2.9


def test_a_negative_prompt_takes_the_place_of_the_dropped_one(tiny_generator):
    backbone = tiny_generator()
    condition, task, noise = start(backbone)
    negative = backbone.encode_prompts([PROMPTS[2]])
    sigma = torch.tensor([0.4, 0.9])

    def velocity(rows, **guidance):
        return backbone.velocity(backbone.denoiser, noise, sigma, rows, task, **guidance)

    away_from = velocity(condition, guidance_scale=3.0, negative=negative)
    conditional, other = velocity(condition), velocity(negative[[0, 0]])
    torch.testing.assert_close(away_from, other + 3 * (conditional - other), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="3 negative prompts for 2 samples"):
        velocity(condition, guidance_scale=3.0, negative=negative[[0, 0, 0]])
    sampler = replace(backbone.sampler, guidance_scale=3.0)
    plain, avoided = (
        sample_frames(backbone, PROMPTS[:1], [0], sampler=sampler, negative_prompt=text)
        for text in (None, PROMPTS[2])
    )
    assert (plain - avoided).abs().max() > 1e-4
    without = replace(backbone.sampler, guidance_scale=1.0)
    with pytest.raises(UserError, match="works through guidance"):
        sample_frames(backbone, PROMPTS[:1], [0], sampler=without, negative_prompt="x")


def test_rescaled_guidance_keeps_the_spread_of_the_conditional_velocity(tiny_generator):
    backbone = tiny_generator()
    condition, task, noise = start(backbone)
    sigma = torch.tensor([0.4, 0.9])

    def velocity(**guidance):
        return backbone.velocity(backbone.denoiser, noise, sigma, condition, task, **guidance)

    axes = (1, 2, 3, 4)
    rescaled = velocity(guidance_scale=6.0, guidance_rescale=1.0)
    torch.testing.assert_close(rescaled.std(axes), velocity().std(axes))
    with pytest.raises(UserError, match="guidance_rescale 2; expected 0 to 1"):
        SamplerSpec(guidance_rescale=2)


def test_the_short_way_to_clips(tiny_generator):
    backbone = tiny_generator()
    clips = backbone.sample(PROMPTS)
    assert clips.shape == (3, 3, *backbone.frame_shape)
    assert torch.equal(clips, sample_frames(backbone, PROMPTS, [0, 1, 2]))
    again = backbone.sample(PROMPTS[1], seeds=[1], batch_size=1)
    torch.testing.assert_close(again[0], clips[1], rtol=1e-4, atol=1e-4)
    fewer = backbone.sample(PROMPTS[:1], num_steps=backbone.sampler.num_steps + 3)
    assert (fewer[0] - clips[0]).abs().max() > 1e-5
    first = torch.rand(1, 3, *backbone.frame_shape[1:])
    assert (backbone.sample(PROMPTS[:1], first_frames=first) - clips[:1]).abs().max() > 1e-5
    student = SamplerSpec("renoise", (1.0, 0.5, 0.0))
    with pytest.raises(UserError, match="distilled for 2 steps and knows no other, not 7"):
        student.in_steps(7)

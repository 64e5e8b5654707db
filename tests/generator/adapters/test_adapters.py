"""What every adapter must do: sample as its own pipeline does, and let gradients through."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from generator import load_generator
from generator.adapters import load_diffusers
from generator.base import Condition, Task, VideoBackbone
from generator.sampling import noise_like, sample_frames, sample_latents
from reelhf.engine import Engine, EngineConfig, OptimizerConfig
from reelhf.errors import UserError
from rlhf.rollout import GradedSteps, rollout, two_stage_gradient

PROMPTS = ["a red circle moves left", "two stars"]
STEPS, GUIDANCE = 4, 4.0  # CogVideoX' own DDIM walks its own timesteps only if steps divide 1000
TOLERANCE = 2e-5
"""Largest difference allowed between our latents and the pipeline's, in float32; the latents' std is about 1."""


@dataclass(frozen=True)
class Family:
    """A tiny clip size, and what its spec must say."""

    frame_shape: tuple[int, int, int]
    spec: tuple[int, int, int]
    """channels, temporal ratio, spatial ratio."""
    illegal: tuple[tuple[tuple[int, int, int], str], ...]
    """Clip sizes that are not legal, and what the error proposes."""
    streams: bool = True


FAMILIES = {
    "wan21": Family(
        (9, 32, 48), (16, 4, 8), (((10, 32, 48), "use 9 or 13"), ((9, 40, 48), "use 32 or 48"))
    ),
    "wan22": Family(
        (9, 32, 64), (48, 4, 16), (((9, 48, 64), "use 32 or 64"), ((8, 32, 64), "use 5 or 9"))
    ),
    "ltx": Family(
        (17, 64, 96),
        (8, 8, 32),
        (((13, 64, 96), "use 9 or 17"), ((17, 48, 96), "use 32 or 64")),
        streams=False,
    ),
    "ltx_timestep": Family((9, 64, 64), (8, 8, 32), (((5, 64, 64), "use 1 or 9"),), streams=False),
    "cogvideox_2b": Family(
        (9, 32, 48), (4, 4, 8), (((13, 32, 48), "use 9 or 17"), ((9, 40, 48), "use 32 or 48"))
    ),
    "cogvideox_5b": Family((17, 32, 48), (4, 4, 8), (((12, 32, 48), "use 9 or 17"),)),
}
STREAMING = [name for name, family in FAMILIES.items() if family.streams]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def backbone(family, pipe_folder):
    loaded = load_generator(pipe_folder(family))
    return loaded.configured(
        frame_shape=FAMILIES[family].frame_shape, num_steps=STEPS, guidance_scale=GUIDANCE
    )


def reference(pipe: Any, backbone: Any, noise: torch.Tensor, output_type: str) -> torch.Tensor:
    """What the published pipeline makes of this noise: latents [B, C, T, h, w], or frames [B, 3, F, H, W]."""
    pipe.set_progress_bar_config(disable=True)
    num_frames, height, width = backbone.frame_shape
    kind = type(pipe).__name__
    if kind == "LTXPipeline":
        noise_in_its_layout = pipe._pack_latents(noise, 1, 1)
    elif kind == "CogVideoXPipeline":
        noise_in_its_layout = noise.transpose(1, 2)
    else:
        noise_in_its_layout = noise
    made = pipe(
        PROMPTS,
        num_frames=num_frames,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=noise_in_its_layout,
        output_type=output_type,
    ).frames
    if output_type == "pt":
        return made.transpose(1, 2)
    if kind == "LTXPipeline":
        return pipe._unpack_latents(made, *noise.shape[2:], 1, 1)
    return made.transpose(1, 2) if kind == "CogVideoXPipeline" else made


def ours(backbone, noise: torch.Tensor, task: Task | None = None) -> torch.Tensor:
    task = task or backbone.text_to_video_task(len(noise), *backbone.frame_shape)
    with torch.no_grad():
        return sample_latents(backbone, backbone.encode_prompts(PROMPTS), task, noise)


def noise_of(backbone) -> torch.Tensor:
    return noise_like([3, 4], backbone.spec.latent_shape(*backbone.frame_shape))


def test_our_euler_loop_equals_the_published_pipeline(backbone, family, pipe_folder):
    pipe = DiffusionPipeline.from_pretrained(pipe_folder(family))
    noise = noise_of(backbone)
    latents = ours(backbone, noise)
    theirs = reference(pipe, backbone, noise, "latent")
    assert (latents - noise).std() > 0.1  # the transformer did something
    torch.testing.assert_close(latents, theirs, atol=TOLERANCE, rtol=0)
    frames = backbone.decode(latents)[0].clamp(0, 1)
    pixels = reference(pipe, backbone, noise, "pt")
    torch.testing.assert_close(frames, pixels, atol=TOLERANCE, rtol=0)


def test_the_spec_states_ratios_and_legal_sizes(backbone, family):
    assert isinstance(backbone, VideoBackbone)
    expected = FAMILIES[family]
    spec = backbone.spec
    assert (spec.channels, spec.temporal_ratio, spec.spatial_ratio) == expected.spec
    for size, proposal in expected.illegal:
        with pytest.raises(UserError, match=proposal):
            spec.check(*size)
    clip = torch.rand(1, 3, *backbone.frame_shape)
    latents = backbone.encode(clip)
    assert latents.shape[1:] == spec.latent_shape(*backbone.frame_shape)
    assert backbone.decode(latents)[0].shape == clip.shape


def test_encoding_inverts_the_normalisation_of_decoding(backbone):
    latents = torch.randn(2, *backbone.spec.latent_shape(*backbone.frame_shape))
    torch.testing.assert_close(backbone.normalise(backbone.denormalise(latents)), latents)


def test_a_reward_on_pixels_reaches_the_transformer(backbone):
    transformer = backbone.denoiser
    task = backbone.text_to_video_task(2, *backbone.frame_shape)
    condition = backbone.encode_prompts(PROMPTS)
    latents = sample_latents(backbone, condition, task, noise_of(backbone))
    frames, _ = backbone.decode(latents)
    gradients = torch.autograd.grad(
        frames.square().mean(), list(transformer.parameters()), allow_unused=True
    )
    found = [gradient for gradient in gradients if gradient is not None]
    assert len(found) >= 0.9 * len(gradients)
    assert all(gradient.isfinite().all() for gradient in found)
    assert sum(gradient.square().sum() for gradient in found) > 0


@pytest.mark.parametrize("family", STREAMING, indirect=True, scope="module")
@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_streaming_equals_one_shot_in_frames_and_gradients(backbone, family, chunk_size):
    latents = noise_of(backbone).requires_grad_()
    whole, _ = backbone.decode(latents)
    weights = torch.randn_like(whole)
    if family.startswith("cogvideox") and chunk_size < 3:
        weights[:, :, :1] = 0  # the first frame is decoded alone, with group norms of its own
    (gradient,) = torch.autograd.grad((whole * weights).sum(), latents)
    passed = two_stage_gradient(
        backbone.decode,
        latents,
        lambda frames: ((frames * weights).flatten(1).sum(1), None),
        chunk_size=chunk_size,
    )
    seen = weights != 0
    torch.testing.assert_close(passed.frames[seen], whole.detach()[seen], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(passed.latent_gradient, gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", STREAMING, indirect=True, scope="module")
def test_a_state_may_be_used_twice(backbone):
    latents = noise_of(backbone)
    _, state = backbone.decode(latents[:, :, :1])
    once = backbone.decode(latents[:, :, 1:], state)[0]
    assert torch.equal(backbone.decode(latents[:, :, 1:], state)[0], once)


def test_a_dropped_prompt_is_the_empty_prompt(backbone):
    noise = noise_of(backbone)
    sigma = torch.full((2,), 0.7)
    task = backbone.text_to_video_task(2, *backbone.frame_shape)

    def velocity(condition: Condition) -> torch.Tensor:
        with torch.no_grad():
            return backbone.velocity(backbone.denoiser, noise, sigma, condition, task)

    given = backbone.encode_prompts(PROMPTS)
    empty = velocity(backbone.encode_prompts(["", ""]))
    torch.testing.assert_close(velocity(given.dropped()), empty)
    mixed = velocity(given.dropped(torch.tensor([True, False])))
    torch.testing.assert_close(mixed[0], empty[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed[1], empty[1], atol=1e-3)
    assert pickle.loads(pickle.dumps(given)).embeds.equal(given.embeds)


def test_in_bfloat16_the_velocity_is_float32_and_nearly_the_same(backbone, family, pipe_folder):
    half = load_diffusers(pipe_folder(family), dtype=torch.bfloat16)
    assert half.pipe.vae.dtype == torch.float32
    noise, sigma = noise_of(backbone), torch.full((2,), 0.7)
    task = backbone.text_to_video_task(2, *backbone.frame_shape)
    with torch.no_grad():
        full, short = (
            model.velocity(model.denoiser, noise, sigma, model.encode_prompts(PROMPTS), task)
            for model in (backbone, half)
        )
    assert short.dtype == torch.float32
    assert 0 < (short - full).norm() < 0.03 * full.norm()


def test_lora_wraps_attention_and_feed_forward(backbone):
    from peft import LoraConfig, inject_adapter_in_model

    targets = backbone.lora_targets()
    assert {name.partition(".")[0] for name in targets} <= {"blocks", "transformer_blocks"}
    assert any(name.endswith("to_q") for name in targets)
    assert any("net.2" in name for name in targets)
    model = copy.deepcopy(backbone.denoiser)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), model)
    wrapped = [name for name, _ in model.named_modules() if name.endswith("lora_A.default")]
    assert len(wrapped) == len(targets)


def test_saved_and_loaded_it_makes_the_same_clip(family, pipe_folder, tmp_path):
    trained = load_generator(pipe_folder(family)).configured(
        frame_shape=FAMILIES[family].frame_shape, num_steps=STEPS, guidance_scale=2.0
    )
    with torch.no_grad():
        next(trained.denoiser.parameters()).mul_(1.5)
    trained.save(tmp_path / "tuned")
    again = load_generator(tmp_path / "tuned")
    assert (again.sampler, again.frame_shape, again.fps) == (
        trained.sampler,
        trained.frame_shape,
        trained.fps,
    )
    clip = sample_frames(trained, PROMPTS[:1], [7])
    assert torch.equal(sample_frames(again, PROMPTS[:1], [7]), clip)
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "tuned"), type(trained.pipe))
    (tmp_path / "tuned" / "reelhf.json").write_text("{}")
    with pytest.raises(UserError, match=r"reelhf\.json"):
        load_generator(tmp_path / "tuned")


def test_without_anything_said_size_and_schedule_are_the_familys(family, pipe_folder):
    own = load_generator(pipe_folder(family))
    own.spec.check(*own.frame_shape)
    assert own.sampler.num_steps == 50
    assert own.sampler.guidance_scale > 1
    assert own.fps > 0


@pytest.mark.parametrize("family", ["wan21", "ltx", "cogvideox_5b"], indirect=True, scope="module")
def test_the_training_engine_stands_in_for_the_transformer(backbone, family, pipe_folder):
    """Through DeepSpeed the velocity is the same, and a loss on pixels moves the weights."""
    trained = load_generator(pipe_folder(family)).configured(
        frame_shape=FAMILIES[family].frame_shape, num_steps=2, guidance_scale=2.0
    )
    engine = Engine(
        trained.denoiser, OptimizerConfig(lr=1e-3), EngineConfig(zero_stage=0, micro_batch_size=2)
    )
    noise = noise_of(trained)
    condition = trained.encode_prompts(PROMPTS)
    task = trained.text_to_video_task(2, *trained.frame_shape)
    latents, before = (
        rollout(
            trained,
            denoiser,
            condition,
            task,
            lambda stream: noise,
            sampler=trained.sampler,
            graded=GradedSteps("last", (1,)),
        )
        for denoiser in (engine, backbone.denoiser)
    )
    torch.testing.assert_close(latents, before, atol=1e-5, rtol=1e-5)
    engine.backward(trained.decode(latents)[0].square().mean())
    assert engine.step()["grad_norm"] > 0
    moved = [
        not torch.equal(new, old)
        for new, old in zip(engine.module.parameters(), backbone.denoiser.parameters(), strict=True)
    ]
    assert sum(moved) > 0.9 * len(moved)

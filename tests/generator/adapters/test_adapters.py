"""What every adapter must do: sample as its own pipeline does, and let gradients through."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from generator import load_generator
from generator.base import Condition, Task, VideoBackbone
from generator.sampling import noise_like, sample_frames, sample_latents
from reelhf.errors import UserError
from rlhf.rollout import two_stage_gradient

PROMPTS = ["a red circle moves left", "two stars"]
STEPS, GUIDANCE = 3, 4.0
TOLERANCE = 1e-4
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
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def backbone(family, pipe_folder):
    loaded = load_generator(pipe_folder(family))
    return loaded.configured(
        frame_shape=FAMILIES[family].frame_shape, num_steps=STEPS, guidance_scale=GUIDANCE
    )


def reference(pipe: Any, noise: torch.Tensor, output_type: str = "latent", **changes: Any) -> Any:
    """The published pipeline's own result for this noise, in its own layout."""
    pipe.set_progress_bar_config(disable=True)
    family = next(f for f in FAMILIES.values() if f.spec[0] == noise.shape[1])
    num_frames, height, width = family.frame_shape
    words = {
        "prompt": PROMPTS,
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "latents": noise,
        "output_type": output_type,
    }
    return pipe(**(words | changes)).frames


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
    theirs = reference(pipe, noise)
    assert (latents - noise).std() > 0.1  # the transformer did something
    torch.testing.assert_close(latents, theirs, atol=TOLERANCE, rtol=0)
    frames = backbone.decode(latents)[0].clamp(0, 1)
    pixels = reference(pipe, noise, "pt").transpose(1, 2)
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


def test_streaming_equals_one_shot_in_frames_and_gradients(backbone, family):
    if not FAMILIES[family].streams:
        pytest.skip("decodes whole clips")
    latents = noise_of(backbone).requires_grad_()
    whole, _ = backbone.decode(latents)
    weights = torch.randn_like(whole)
    (gradient,) = torch.autograd.grad((whole * weights).sum(), latents)
    passed = two_stage_gradient(
        backbone.decode,
        latents,
        lambda frames: ((frames * weights).flatten(1).sum(1), None),
        chunk_size=1,
    )
    torch.testing.assert_close(passed.frames, whole.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(passed.latent_gradient, gradient, atol=1e-4, rtol=1e-4)


def test_a_state_may_be_used_twice(backbone, family):
    if not FAMILIES[family].streams:
        pytest.skip("decodes whole clips")
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


def test_lora_wraps_attention_and_feed_forward(backbone):
    import copy

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

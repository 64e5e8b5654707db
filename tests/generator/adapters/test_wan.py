from __future__ import annotations

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline

from generator import load_generator
from generator.base import Task
from generator.flow import sigma_schedule
from generator.sampling import noise_like, sample_latents
from reelhf.errors import UserError

SIZE = (9, 32, 64)


@pytest.fixture(scope="module")
def ti2v(pipe_folder):
    backbone = load_generator(pipe_folder("wan22"))
    return backbone.configured(frame_shape=SIZE, num_steps=3, guidance_scale=4.0)


def noise_of(backbone, batch: int = 2) -> torch.Tensor:
    return noise_like(range(batch), backbone.spec.latent_shape(*backbone.frame_shape))


def test_ti2v_from_a_first_frame_equals_the_image_pipeline(ti2v):
    """The given frame sits at sigma 0 and stays what it was."""
    pipe = WanImageToVideoPipeline(
        **ti2v.pipe.components, image_encoder=None, image_processor=None, expand_timesteps=True
    )
    pipe.set_progress_bar_config(disable=True)
    noise, image = noise_of(ti2v, 1), torch.rand(1, 3, 32, 64)
    task = ti2v.image_task(image, *SIZE)
    with torch.no_grad():
        condition = ti2v.encode_prompts(["a red circle"])
        latents = sample_latents(ti2v, condition, task, noise)
    num_frames, height, width = SIZE
    theirs = pipe(
        image,
        "a red circle",
        num_frames=num_frames,
        height=height,
        width=width,
        num_inference_steps=3,
        guidance_scale=4.0,
        latents=noise,
        output_type="latent",
    ).frames
    torch.testing.assert_close(latents, theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        latents[:, :, :1], task.condition_latents[:, :, :1], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_one_sigma_per_clip_is_the_same_sigma_on_every_frame(name, pipe_folder):
    backbone = load_generator(pipe_folder(name)).configured(frame_shape=SIZE)
    noise, sigma = noise_of(backbone), torch.tensor([0.9, 0.3])
    task = backbone.text_to_video_task(2, *SIZE)
    condition = backbone.encode_prompts(["a red circle", "two stars"])

    def velocity(sigma: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return backbone.velocity(
                backbone.denoiser, noise, sigma, condition, task, guidance_scale=3.0
            )

    per_clip = velocity(sigma)
    torch.testing.assert_close(velocity(sigma[:, None].expand(-1, 3)), per_clip)
    other = velocity(torch.tensor([[0.9, 0.5, 0.1], [0.3, 0.3, 0.3]]))
    assert not torch.allclose(other[0], per_clip[0], atol=1e-3)
    torch.testing.assert_close(other[1], per_clip[1], atol=1e-5, rtol=1e-5)


def test_the_velocity_of_a_given_frame_points_at_it(ti2v):
    clean, noise = noise_of(ti2v), torch.randn(2, *ti2v.spec.latent_shape(*SIZE))
    mask = torch.zeros_like(clean[:, :1])
    mask[:, :, 0] = 1.0
    noisy = 0.4 * clean + 0.6 * noise
    velocity = ti2v.velocity(
        ti2v.denoiser,
        noisy,
        torch.full((2,), 0.6),
        ti2v.encode_prompts(["a", "b"]),
        Task(clean * mask, mask),
    )
    torch.testing.assert_close(velocity[:, :, 0], (noise - clean)[:, :, 0], atol=1e-5, rtol=1e-5)


def test_text_models_take_no_first_frame(pipe_folder):
    backbone = load_generator(pipe_folder("wan21"))
    with pytest.raises(UserError, match="takes no first frame"):
        backbone.image_task(torch.rand(1, 3, 32, 32), 9, 32, 32)


def test_the_published_unipc_schedule_becomes_its_shift_on_an_even_grid(pipe_folder):
    backbone = load_generator(pipe_folder("wan21"))
    backbone.pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    assert backbone.sigmas(20, SIZE) == sigma_schedule(20, shift=5.0)


def test_decoded_frames_are_not_clamped(pipe_folder):
    backbone = load_generator(pipe_folder("wan21"))
    latents = 40 * torch.randn(1, 16, 2, 4, 4)
    pixels = backbone.pipe.vae.decode(backbone.denormalise(latents)).sample
    frames, _ = backbone.decode(latents)
    torch.testing.assert_close(frames.clamp(0, 1), (pixels + 1) / 2, atol=1e-6, rtol=1e-6)


def test_two_denoisers_are_refused(pipe_folder):
    pipe = load_generator(pipe_folder("wan21")).pipe
    pipe.transformer_2 = pipe.transformer
    from generator.adapters.wan import WanBackbone

    with pytest.raises(UserError, match="two denoisers"):
        WanBackbone(pipe)

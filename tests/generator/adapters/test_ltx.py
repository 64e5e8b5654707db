from __future__ import annotations

import pytest
import torch
from diffusers import LTXImageToVideoPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from generator import load_generator
from generator.sampling import noise_like, sample_latents
from reelhf.errors import UserError

SIZE = (17, 64, 64)


@pytest.fixture(scope="module")
def backbone(pipe_folder):
    loaded = load_generator(pipe_folder("ltx"))
    return loaded.configured(frame_shape=SIZE, num_steps=3, guidance_scale=3.0)


def test_from_a_first_frame_equals_the_image_pipeline(backbone, monkeypatch):
    """The pipeline draws its first frame from the encoder's distribution and we take its mode, so here both take the mode."""
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )
    pipe = LTXImageToVideoPipeline(**backbone.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 64)
    noise = noise_like([3], backbone.spec.latent_shape(*SIZE))
    task = backbone.image_task(image, *SIZE)
    start = noise.clone()
    start[:, :, :1] = task.condition_latents[:, :, :1]
    num_frames, height, width = SIZE
    theirs = pipe(
        image,
        "a red circle",
        num_frames=num_frames,
        height=height,
        width=width,
        num_inference_steps=3,
        guidance_scale=3.0,
        latents=pipe._pack_latents(start, 1, 1),
        output_type="latent",
    ).frames
    with torch.no_grad():
        condition = backbone.encode_prompts(["a red circle"])
        latents = sample_latents(backbone, condition, task, noise)
    theirs = pipe._unpack_latents(theirs, *noise.shape[2:], 1, 1)
    torch.testing.assert_close(latents, theirs, atol=1e-4, rtol=0)


def test_larger_clips_stay_longer_in_the_noise(backbone):
    small, large = backbone.sigmas(8, (17, 64, 64)), backbone.sigmas(8, (161, 512, 704))
    assert all(low < high for low, high in zip(small[1:-2], large[1:-2], strict=True))
    assert backbone.configured(frame_shape=(33, 512, 704)).sampler.sigmas != backbone.sampler.sigmas


def test_the_frame_rate_is_an_input_of_the_transformer(backbone):
    noise = noise_like([3], backbone.spec.latent_shape(*SIZE))
    task = backbone.text_to_video_task(1, *SIZE)
    condition = backbone.encode_prompts(["a red circle"])

    def velocity(fps: float) -> torch.Tensor:
        backbone.fps = fps
        with torch.no_grad():
            return backbone.velocity(
                backbone.denoiser, noise, torch.full((1,), 0.5), condition, task
            )

    slow, usual = velocity(8.0), velocity(25.0)
    assert not torch.allclose(slow, usual, atol=1e-4)


def test_a_clip_is_decoded_whole(backbone):
    latents = noise_like([3], backbone.spec.latent_shape(*SIZE))
    _, state = backbone.decode(latents[:, :, :1])
    with pytest.raises(UserError, match="decode_chunk"):
        backbone.decode(latents[:, :, 1:], state)

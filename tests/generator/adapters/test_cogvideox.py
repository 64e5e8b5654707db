from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from generator import load_generator
from generator.adapters.base import PatchedSpec
from generator.adapters.cogvideox import CogVideoXBackbone, ddpm_of_sigma, sigma_of_ddpm
from generator.flow import add_noise
from reelhf.errors import UserError
from tests.generator.adapters import tiny_pipes


@pytest.fixture(scope="module")
def backbone(pipe_folder):
    return load_generator(pipe_folder("cogvideox_5b"))


def test_sigma_and_alpha_invert_each_other():
    alphas = torch.linspace(0, 1, 101, dtype=torch.float64)
    data, noise = ddpm_of_sigma(sigma_of_ddpm(alphas))
    torch.testing.assert_close(data, alphas.sqrt())
    torch.testing.assert_close(noise, (1 - alphas).sqrt())


def test_timesteps_and_sigmas_invert_each_other(backbone):
    timesteps = torch.tensor([0.0, 1.0, 250.0, 998.0, 999.0])
    sigma = backbone._sigma_table[timesteps.long()].float()
    torch.testing.assert_close(backbone.timestep(sigma), timesteps, atol=1e-2, rtol=0)
    between = backbone.timestep((sigma[2:3] + backbone._sigma_table[251]) / 2)
    assert 250 < between.item() < 251


def test_a_perfect_v_prediction_becomes_noise_minus_clean(backbone):
    """A denoiser that knows the clip: whatever sigma, our velocity is noise - clean."""
    clean, noise = torch.randn(2, 2, 4, 3, 4, 6)
    sigma = torch.tensor([0.2, 1.0])
    data_part, noise_part = (part[:, None, None, None, None] for part in ddpm_of_sigma(sigma))
    asked = {}

    class Perfect(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj_out = torch.nn.Linear(1, 1)

        def forward(self, hidden_states, timestep, **words):
            asked.update(point=hidden_states, timestep=timestep)
            v = data_part * noise - noise_part * clean
            return (v.transpose(1, 2),)

    velocity = backbone.velocity(
        Perfect(),
        add_noise(clean, noise, sigma),
        sigma,
        backbone.encode_prompts(["a", "b"]),
        backbone.text_to_video_task(2, 9, 32, 48),
    )
    torch.testing.assert_close(velocity, noise - clean, atol=1e-5, rtol=1e-4)
    point = data_part * clean + noise_part * noise
    torch.testing.assert_close(asked["point"], point.transpose(1, 2), atol=1e-5, rtol=1e-4)
    assert asked["timestep"][1] == 999


def test_the_schedule_starts_at_pure_noise_and_ends_clean(backbone):
    sigmas = backbone.sampler.sigmas
    assert (len(sigmas), sigmas[0], sigmas[-1]) == (51, 1.0, 0.0)
    with pytest.raises(UserError, match="1000 timesteps"):
        backbone.sigmas(1001, (9, 32, 48))


def test_the_first_frame_comes_at_once_and_pairs_as_they_fill(backbone):
    latents = torch.randn(1, 4, 7, 4, 6)
    counts, state = [], None
    for latent in latents.split(1, dim=2):
        frames, state = backbone.decode(latent, state)
        counts.append(frames.shape[2])
    assert counts == [1, 0, 8, 0, 8, 0, 8]


def test_other_schedules_are_refused():
    pipe = tiny_pipes.cogvideox()
    config = pipe.scheduler.config
    pipe.scheduler = CogVideoXDDIMScheduler.from_config(config, rescale_betas_zero_snr=False)
    with pytest.raises(UserError, match="rescale_betas_zero_snr"):
        CogVideoXBackbone(pipe)


def test_one_sigma_per_clip(backbone):
    noise = torch.randn(1, 4, 3, 4, 6)
    with pytest.raises(ValueError, match="one sigma per clip"):
        backbone.velocity(
            backbone.denoiser,
            noise,
            torch.full((1, 3), 0.5),
            backbone.encode_prompts(["a"]),
            backbone.text_to_video_task(1, 9, 32, 48),
        )


def test_the_published_clip_size_is_legal():
    spec = PatchedSpec(channels=16, temporal_ratio=4, spatial_ratio=8, patch=2, frame_step=8)
    assert spec.latent_shape(49, 480, 720) == (16, 13, 60, 90)

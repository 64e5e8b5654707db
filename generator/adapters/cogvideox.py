"""CogVideoX 2B and 5B (2408.06072), from diffusers' `CogVideoXPipeline`: 16 channels at 4 x 8 x 8, a DDPM in v-prediction.

Converted here and nowhere else. With alpha = alphas_cumprod[t], DDPM's point is x = sqrt(alpha) clean + sqrt(1 - alpha) noise.
Divided by scale = sqrt(alpha) + sqrt(1 - alpha) it is our point at sigma = sqrt(1 - alpha) / scale, so
`noisy = x / scale`, and v = sqrt(alpha) noise - sqrt(1 - alpha) clean gives clean and noise, hence our velocity. An Euler
step between two sigmas is then exactly a DDIM step (eta 0) between the two timesteps. (diffusers' own DDIM aims at
t - 1000 // steps, which is its next timestep only when the number of steps divides 1000.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from generator.adapters.base import DiffusersBackbone, PatchedSpec
from generator.base import Condition
from reelhf.errors import UserError

PAIR = 2
"""Latent frames that the VAE decodes together; the first batch has one more. Its group norms see one batch at a time."""


class CogState(NamedTuple):
    """What the decoder carries to the next latent frames."""

    conv_cache: dict[str, Any]
    """The causal convolutions' own; empty before the first batch."""
    pending: Tensor
    """Latent frames that wait for their batch, [B, C, 0 to 2, h, w]."""
    shown: int
    """Frames of the first batch that were made without waiting for it: 1 or 0."""


def ddpm_of_sigma(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(sqrt(alpha), sqrt(1 - alpha)) of the DDPM point whose ratio of noise to data is that of sigma."""
    length = torch.hypot(1 - sigma, sigma)
    return (1 - sigma) / length, sigma / length


def sigma_of_ddpm(alphas_cumprod: Tensor) -> Tensor:
    """Our sigma of each DDPM timestep; inverse of `ddpm_of_sigma`."""
    data, noise = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    return noise / (data + noise)


@dataclass
class CogVideoXBackbone(DiffusersBackbone):
    """Text to video. Frames come as 8n + 1, since the VAE halves time twice, in pairs of latent frames."""

    pipeline_class = "CogVideoXPipeline"
    default_fps = 8.0
    default_guidance = 6.0

    def make_spec(self) -> PatchedSpec:
        transformer, scheduler = self.pipe.transformer.config, self.pipe.scheduler
        if transformer.patch_size_t is not None:
            raise UserError(
                "this is CogVideoX 1.5, whose transformer pads the clip with frames that are dropped afterwards; "
                "use CogVideoX 2B or 5B"
            )
        if scheduler.config.prediction_type != "v_prediction" or self._alphas[-1] > 1e-6:
            raise UserError(
                f"a CogVideoX scheduler with prediction_type '{scheduler.config.prediction_type}' and alpha "
                f"{self._alphas[-1].item():.2g} at its last timestep; expected 'v_prediction' and 0 "
                "(rescale_betas_zero_snr), where sampling starts from pure noise"
            )
        ratio = self.pipe.vae.config.temporal_compression_ratio
        return PatchedSpec(
            channels=transformer.in_channels,
            temporal_ratio=int(ratio),
            spatial_ratio=self.pipe.vae_scale_factor_spatial,
            patch=transformer.patch_size,
            frame_step=PAIR * int(ratio),
        )

    @property
    def _alphas(self) -> Tensor:
        """alphas_cumprod in float64, falling from timestep 0 to the last."""
        return self.pipe.scheduler.alphas_cumprod.double().cpu()

    @cached_property
    def _sigma_table(self) -> Tensor:
        """Our sigma of every timestep, rising to 1."""
        return sigma_of_ddpm(self._alphas)

    def own_frame_shape(self) -> tuple[int, int, int]:
        config, ratio = self.pipe.transformer.config, self.spec.spatial_ratio
        return (config.sample_frames, config.sample_height * ratio, config.sample_width * ratio)

    def sigmas(self, num_steps: int, frame_shape: tuple[int, int, int]) -> tuple[float, ...]:
        """The sigmas of DDIM's trailing timesteps, from the last one down (2305.08891, table 2)."""
        last = len(self._sigma_table)
        if num_steps > last:
            raise UserError(f"{num_steps} steps; CogVideoX has {last} timesteps")
        grid = torch.arange(num_steps, 0, -1, dtype=torch.float64) * last / num_steps
        table = self._sigma_table.clone()
        table[-1] = 1.0  # alpha is zero there but for rounding
        return (*table[grid.round().long() - 1].tolist(), 0.0)

    def timestep(self, sigma: Tensor) -> Tensor:
        """The timestep, between the integers too, whose noise level is sigma; 0 for what is cleaner than that."""
        table = self._sigma_table.to(sigma.device)
        value = sigma.double().clamp(table[0], table[-1])
        right = torch.searchsorted(table, value.contiguous()).clamp(1, len(table) - 1)
        low, high = table[right - 1], table[right]
        return (right - 1 + (value - low) / (high - low)).float()

    @property
    def max_tokens(self) -> int:
        return self.pipe.transformer.config.max_text_seq_length

    def embed(self, prompts: list[str]) -> Condition:
        """The transformer attends to padding as to words, so every token is marked."""
        embeds, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.max_tokens
        )
        return Condition(embeds.float(), embeds.new_ones(embeds.shape[:2], dtype=torch.bool))

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, sigma: Tensor, condition: Condition
    ) -> Tensor:
        if sigma.ndim != 1:
            raise ValueError(f"CogVideoX has one sigma per clip, [B]; got {tuple(sigma.shape)}")
        data, noise = (part[:, None, None, None, None] for part in ddpm_of_sigma(sigma))
        point = noisy.float() * (data + noise)
        rotary = None
        if self.pipe.transformer.config.use_rotary_positional_embeddings:
            num_frames, *side = noisy.shape[2:]
            height, width = (length * self.spec.spatial_ratio for length in side)
            rotary = self.pipe._prepare_rotary_positional_embeddings(
                height, width, num_frames, noisy.device
            )
        (predicted,) = denoiser(
            hidden_states=point.to(noisy.dtype).transpose(1, 2),  # frames before channels
            encoder_hidden_states=condition.embeds,
            timestep=self.timestep(sigma),
            image_rotary_emb=rotary,
            return_dict=False,
        )
        predicted = predicted.transpose(1, 2).float()
        found_clean = data * point - noise * predicted
        found_noise = noise * point + data * predicted
        return found_noise - found_clean

    def decode(self, latents: Tensor, state: CogState | None = None) -> tuple[Tensor, CogState]:
        """In the VAE's own batches, three latent frames and then two at a time, however the calls divide the clip.

        A latent frame waits in the state until its batch is complete. Only the clip's first frame cannot wait: a first
        call with one or two latent frames decodes it alone, with other group norms than in its batch of three.
        """
        if state is None:
            state = CogState({}, latents[:, :, :0], 0)
        latents = torch.cat((state.pending, latents), dim=2)
        given, cache, shown = latents.shape[2], state.conv_cache, state.shown
        # no frame yet, and still a part of the graph
        frames = [latents.float().sum() * self._frames_like(latents, 0)]
        if cache:
            sizes = [PAIR] * (given // PAIR)
        elif given > PAIR:
            sizes = [PAIR + 1] + [PAIR] * ((given - PAIR - 1) // PAIR)
        else:
            sizes = []
            if not shown:
                frames.append(self._decode_batch(latents[:, :, :1], {})[0])
                shown = 1
        ready = sum(sizes)
        for part in latents[:, :, :ready].split(sizes, dim=2) if sizes else ():
            decoded, cache = self._decode_batch(part, cache)
            frames.append(decoded[:, :, shown:])
            shown = 0
        state = CogState(cache, latents[:, :, ready:], shown)
        return (torch.cat(frames, dim=2) + 1) / 2, state

    def _decode_batch(
        self, latents: Tensor, cache: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        vae = self.pipe.vae
        hidden = self.denormalise(latents).to(vae.dtype)
        if vae.post_quant_conv is not None:
            hidden = vae.post_quant_conv(hidden)
        pixels, cache = vae.decoder(hidden, conv_cache=cache)
        return pixels.float(), cache

    def _frames_like(self, latents: Tensor, num_frames: int) -> Tensor:
        height, width = (length * self.spec.spatial_ratio for length in latents.shape[-2:])
        return torch.zeros(len(latents), 3, num_frames, height, width, device=latents.device)

    def normalise(self, latents: Tensor) -> Tensor:
        return latents * self.pipe.vae.config.scaling_factor

    def denormalise(self, latents: Tensor) -> Tensor:
        return latents / self.pipe.vae.config.scaling_factor

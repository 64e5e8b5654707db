"""LTX-Video (2501.00103), from diffusers' `LTXPipeline`: 128 channels at 8 x 32 x 32, clips of 8n + 1 frames.

Flow matching in our own convention; sigma may differ per latent frame, so a first frame is given by holding it at sigma 0.
The decoder looks ahead, so a clip is decoded whole: there is no streaming, and RLHF needs `decode_chunk` at the number of
latent frames. Checkpoints whose decoder takes a timestep (0.9.1 on) decode at timestep 0 without added noise, the
pipeline's default.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from generator.adapters.base import DiffusersBackbone, PatchedSpec
from generator.base import Condition
from reelhf.errors import UserError

WHOLE = "whole clip decoded"
"""The state after decoding: nothing can follow."""


@dataclass
class LTXBackbone(DiffusersBackbone):
    """Text or a first frame to video. The fps is an input of the transformer's rotary embedding."""

    pipeline_class = "LTXPipeline"
    default_fps = 25.0
    default_guidance = 3.0
    max_tokens = 128
    takes_image = True
    decodes_in_chunks = False

    def make_spec(self) -> PatchedSpec:
        vae, transformer = self.pipe.vae, self.pipe.transformer.config
        if transformer.patch_size_t != 1:
            raise UserError(f"an LTX patch of {transformer.patch_size_t} frames; expected 1")
        return PatchedSpec(
            channels=vae.config.latent_channels,
            temporal_ratio=vae.temporal_compression_ratio,
            spatial_ratio=vae.spatial_compression_ratio,
            patch=transformer.patch_size,
            frame_step=vae.temporal_compression_ratio,
        )

    def own_frame_shape(self) -> tuple[int, int, int]:
        return (161, 512, 704)

    def sigmas(self, num_steps: int, frame_shape: tuple[int, int, int]) -> tuple[float, ...]:
        """The scheduler's, shifted further for larger clips when its config says so."""
        from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

        scheduler = self.pipe.scheduler
        _, *grid = self.spec.latent_shape(*frame_shape)
        config = scheduler.config
        mu = calculate_shift(
            int(np.prod(grid)),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
        return tuple(scheduler.sigmas.tolist())

    def embed(self, prompts: list[str]) -> Condition:
        embeds, mask, *_ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.max_tokens
        )
        return Condition(embeds.float(), mask.bool())

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, sigma: Tensor, condition: Condition
    ) -> Tensor:
        num_frames, height, width = noisy.shape[2:]
        side = self.spec.patch
        timestep = 1000 * sigma
        if sigma.ndim == 2:  # [B, T] -> one per token
            timestep = timestep.repeat_interleave((height // side) * (width // side), dim=1)
        (velocity,) = denoiser(
            hidden_states=self.pipe._pack_latents(noisy, side, 1),
            encoder_hidden_states=condition.embeds,
            timestep=timestep,
            encoder_attention_mask=condition.mask,
            num_frames=num_frames,
            height=height // side,
            width=width // side,
            rope_interpolation_scale=(
                self.spec.temporal_ratio / self.fps,
                self.spec.spatial_ratio,
                self.spec.spatial_ratio,
            ),
            return_dict=False,
        )
        return self.pipe._unpack_latents(
            velocity, num_frames, height // side, width // side, side, 1
        )

    def decode(self, latents: Tensor, state: object | None = None) -> tuple[Tensor, object]:
        if state is not None:
            raise UserError(
                "LTX-Video's decoder looks ahead and decodes whole clips: pass all latent frames at once "
                "(in RLHF, set decode_chunk to the number of latent frames)"
            )
        vae = self.pipe.vae
        timestep = None
        if vae.config.timestep_conditioning:
            timestep = torch.zeros(len(latents), device=latents.device, dtype=vae.dtype)
        (pixels,) = vae.decode(self.denormalise(latents).to(vae.dtype), timestep, return_dict=False)
        return (pixels.float() + 1) / 2, WHOLE

    def normalise(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        return self.pipe._normalize_latents(
            latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        )

    def denormalise(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        return self.pipe._denormalize_latents(
            latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        )

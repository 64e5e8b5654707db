"""Wan 2.1 and Wan 2.2 TI2V-5B (2503.20314), from diffusers' `WanPipeline`: flow matching in our own convention.

Wan 2.1 has 16 channels at 4 x 8 x 8; Wan 2.2 TI2V-5B 48 at 4 x 16 x 16, one sigma per latent frame and so images as
first frames. The VAE decoder streams one latent frame at a time; its cache is handed to it and taken back here, so
nothing is kept on the module and the state is differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from generator.adapters.base import DiffusersBackbone, PatchedSpec
from generator.base import Condition
from generator.flow import sigma_schedule
from reelhf.errors import UserError

WanState = tuple[Tensor | str | None, ...]
"""The last inputs of each causal convolution of the decoder; the string "Rep" after the first frame of an upsampler."""


@dataclass
class WanBackbone(DiffusersBackbone):
    """Text to video, and with TI2V-5B image to video."""

    pipeline_class = "WanPipeline"
    default_fps = 16.0
    default_guidance = 5.0
    max_tokens = 512

    def make_spec(self) -> PatchedSpec:
        if self.pipe.transformer is None or self.pipe.transformer_2 is not None:
            raise UserError(
                "this Wan model has two denoisers (A14B: one for high, one for low sigma), and only one can be trained "
                "at a time here; use Wan 2.1, or Wan 2.2 TI2V-5B"
            )
        vae, transformer = self.pipe.vae.config, self.pipe.transformer.config
        if transformer.patch_size[0] != 1:
            raise UserError(f"a Wan patch of {transformer.patch_size[0]} frames; expected 1")
        return PatchedSpec(
            channels=transformer.in_channels,
            temporal_ratio=vae.scale_factor_temporal,
            spatial_ratio=vae.scale_factor_spatial,
            patch=transformer.patch_size[1],
            frame_step=vae.scale_factor_temporal,
        )

    @property
    def takes_image(self) -> bool:
        return bool(self.pipe.config.expand_timesteps)

    def own_frame_shape(self) -> tuple[int, int, int]:
        return (121, 704, 1280) if self.takes_image else (81, 480, 832)

    def own_fps(self) -> float:
        return 24.0 if self.takes_image else self.default_fps

    def sigmas(self, num_steps: int, frame_shape: tuple[int, int, int]) -> tuple[float, ...]:
        """FlowMatchEuler's own; for UniPC, which the published folders name, its shift on an even grid."""
        scheduler = self.pipe.scheduler
        if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
            scheduler.set_timesteps(num_steps)
            return tuple(scheduler.sigmas.tolist())
        return sigma_schedule(num_steps, shift=scheduler.config.get("flow_shift") or 1.0)

    def embed(self, prompts: list[str]) -> Condition:
        """The pipeline zeroes what follows a prompt, and its transformer attends to those zeros."""
        embeds, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.max_tokens
        )
        return Condition(embeds.float(), embeds.ne(0).any(-1))

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, sigma: Tensor, condition: Condition
    ) -> Tensor:
        timestep = 1000 * sigma
        if sigma.ndim == 2:  # [B, T] -> one per token
            side = self.spec.patch
            tokens_per_frame = (noisy.shape[-2] // side) * (noisy.shape[-1] // side)
            timestep = timestep.repeat_interleave(tokens_per_frame, dim=1)
        (velocity,) = denoiser(
            hidden_states=noisy,
            timestep=timestep,
            encoder_hidden_states=condition.embeds,
            return_dict=False,
        )
        return velocity

    def decode(self, latents: Tensor, state: WanState | None = None) -> tuple[Tensor, WanState]:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify

        vae = self.pipe.vae
        hidden = vae.post_quant_conv(self.denormalise(latents).to(vae.dtype))
        first = state is None
        if state is None:
            state = (None,) * sum(isinstance(m, WanCausalConv3d) for m in vae.decoder.modules())
        frames = []
        for latent in hidden.split(1, dim=2):
            cache = list(
                state
            )  # the decoder replaces entries in place; the caller's state stays as it was
            frames.append(vae.decoder(latent, feat_cache=cache, feat_idx=[0], first_chunk=first))
            state, first = tuple(cache), False
        pixels = torch.cat(frames, dim=2).float()
        if vae.config.patch_size is not None:
            pixels = unpatchify(pixels, vae.config.patch_size)
        return (pixels + 1) / 2, state

    def normalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel, [1, C, 1, 1, 1]."""
        config = self.pipe.vae.config
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std

"""A generator small enough for unit tests: real classes, random weights, clips of five frames at 32x32."""

from __future__ import annotations

from pathlib import Path

import torch

from generator.base import SamplerSpec
from generator.checkpoint import DiTGenerator
from generator.dit import DiT, DiTConfig
from generator.text import TextEncoder, TextEncoderConfig
from generator.toyworld import ToyDatasetConfig, prompt_split, render_dataset
from generator.vae import VAEConfig, VideoVAE

TINY_VAE = VAEConfig(
    channels=8,
    encoder_fine_width=8,
    encoder_width=16,
    encoder_blocks=1,
    decoder_width=16,
    decoder_blocks=1,
    decoder_fine_width=8,
    decoder_fine_blocks=1,
)
TINY_TEXT = TextEncoderConfig(
    vocab_size=300, hidden_size=16, num_layers=2, num_heads=2, num_key_value_heads=1, mlp_size=32
)
TINY_DIT = DiTConfig(channels=8, width=24, num_heads=2, num_pairs=2, text_width=16)
GUIDED_EULER = SamplerSpec("euler", (1.0, 0.6, 0.3, 0.0), guidance_scale=2.0)


def make_vae_and_text() -> tuple[VideoVAE, TextEncoder]:
    """VAE of 8 channels and text encoder of width 16, untrained."""
    torch.manual_seed(0)
    vae = VideoVAE(TINY_VAE)
    text = TextEncoder.build(TINY_TEXT, prompt_split("train", 16))
    return vae.eval(), text.eval()


def make_generator(
    vae: VideoVAE,
    text: TextEncoder,
    role: str = "base",
    size: int = 32,
    *,
    sampler: SamplerSpec = GUIDED_EULER,
    std: float = 0.1,
) -> DiTGenerator:
    """A generator whose every path speaks: what starts at zero is drawn with `std` instead."""
    torch.manual_seed(1)
    denoiser = DiT(TINY_DIT.model_copy(update={"low_res": role == "refiner"}))
    for parameter in denoiser.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=std)
    return DiTGenerator(denoiser, vae, text, sampler, role, (5, size, size), 8.0, vae.spec)


def render_clips(folder: Path) -> Path:
    """24 toy clips of five frames with captions."""
    return render_dataset(ToyDatasetConfig(num_clips=24, num_frames=5, size=64), folder)

"""A generator small enough for unit tests: real classes, random weights, 32x32 clips of five frames."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from generator.base import SamplerSpec
from generator.checkpoint import DiTGenerator
from generator.dit import DiT, DiTConfig
from generator.text import TextEncoder, TextEncoderConfig
from generator.toyworld import ToyDatasetConfig, prompt_split, render_dataset
from generator.vae import VAEConfig, VideoVAE

TINY_DIT = {"channels": 8, "width": 24, "num_heads": 2, "num_pairs": 2, "text_width": 16}


@pytest.fixture(scope="session")
def tiny_parts() -> tuple[VideoVAE, TextEncoder]:
    """VAE of 8 channels and text encoder of width 16, untrained."""
    torch.manual_seed(0)
    vae = VideoVAE(
        VAEConfig(
            channels=8,
            encoder_fine_width=8,
            encoder_width=16,
            encoder_blocks=1,
            decoder_width=16,
            decoder_blocks=1,
            decoder_fine_width=8,
            decoder_fine_blocks=1,
        )
    )
    text = TextEncoder.build(
        TextEncoderConfig(
            vocab_size=300,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            num_key_value_heads=1,
            mlp_size=32,
        ),
        prompt_split("train", 16),
    )
    return vae.eval(), text.eval()


@pytest.fixture
def tiny_generator(tiny_parts):
    """tiny_generator(role="base", size=32) -> DiTGenerator whose every path speaks."""
    vae, text = tiny_parts

    def make(role: str = "base", size: int = 32) -> DiTGenerator:
        torch.manual_seed(1)
        denoiser = DiT(DiTConfig(**TINY_DIT, low_res=role == "refiner"))
        for parameter in denoiser.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        sampler = SamplerSpec("euler", (1.0, 0.6, 0.3, 0.0), guidance_scale=2.0)
        return DiTGenerator(denoiser, vae, text, sampler, role, (5, size, size), 8.0, vae.spec)

    return make


@pytest.fixture(scope="session")
def tiny_clips(tmp_path_factory) -> Path:
    """Sixteen rendered clips of five frames with captions."""
    folder = tmp_path_factory.mktemp("clips")
    return render_dataset(ToyDatasetConfig(num_clips=16, num_frames=5, size=64), folder / "toy")


@pytest.fixture(scope="session")
def tiny_folders(tiny_parts, tmp_path_factory) -> tuple[Path, Path]:
    """The VAE and the text encoder on disk."""
    root = tmp_path_factory.mktemp("parts")
    vae, text = tiny_parts
    vae.save(root / "vae")
    text.save(root / "text")
    return root / "vae", root / "text"

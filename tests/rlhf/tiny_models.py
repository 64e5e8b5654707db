"""A real generator, refiner and rewards, small enough for unit tests: random weights, real code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from generator.base import SamplerSpec
from generator.checkpoint import DiTGenerator
from generator.dit import DiT, DiTConfig
from generator.text import TextEncoder, TextEncoderConfig
from generator.vae import VAEConfig, VideoVAE
from rewards.base import FrameSelection, RewardScores
from rewards.composite import CompositeReward
from rlhf.direct import DirectConfig

PROMPTS = [
    f"a {colour} {shape} moves"
    for colour in ("red", "blue", "green")
    for shape in ("disc", "ring", "star")
]
VALIDATION_PROMPTS = ["a cyan disc rests", "a white ring rests", "a black star rests"]
DIMENSIONS = ("prompt_following", "structural_stability", "motion_quality", "aesthetic_quality")


def tiny_generator(role: str = "base", seed: int = 0) -> DiTGenerator:
    """5 frames of 32 x 32 (base, guided Euler) or 48 x 48 (refiner, four re-noising steps), about 30 k parameters."""
    torch.manual_seed(seed)
    refiner = role == "refiner"
    denoiser = DiT(DiTConfig(width=24, num_heads=2, num_pairs=1, text_width=32, low_res=refiner))
    for (
        parameter
    ) in denoiser.parameters():  # zero-initialised layers would leave nothing to differentiate
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    vae = VideoVAE(
        VAEConfig(
            encoder_fine_width=8,
            encoder_width=16,
            encoder_blocks=1,
            decoder_width=16,
            decoder_blocks=1,
            decoder_fine_width=8,
            decoder_fine_blocks=1,
        )
    )
    text_config = TextEncoderConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_key_value_heads=1,
        mlp_size=48,
        vocab_size=300,
    )
    if refiner:
        sampler = SamplerSpec("renoise", (1.0, 0.75, 0.5, 0.25, 0.0))
    else:
        sampler = SamplerSpec("euler", (1.0, 0.8, 0.6, 0.4, 0.2, 0.0), guidance_scale=2.0)
    return DiTGenerator(
        denoiser=denoiser,
        vae=vae.eval(),
        text=TextEncoder.build(text_config, PROMPTS).eval(),
        sampler=sampler,
        role="refiner" if refiner else "base",
        frame_shape=(5, 48, 48) if refiner else (5, 32, 32),
        fps=8.0,
    )


class TinyReward(nn.Module):
    """A frozen random 3D convolution scored against the prompt's length: the reward protocol and nothing more."""

    def __init__(self, dimensions: Sequence[str], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.dimensions = tuple(dimensions)
        self.register_buffer("kernel", 0.3 * torch.randn(8, 3, 2, 3, 3, generator=generator))
        self.register_buffer("head", torch.randn(8, len(dimensions), generator=generator))
        self.register_buffer("mean", torch.zeros(len(dimensions)))
        self.register_buffer("std", 0.1 * torch.ones(len(dimensions)))
        self.register_buffer("low", -5 * torch.ones(len(dimensions)))
        self.register_buffer("high", 5 * torch.ones(len(dimensions)))

    def select(
        self, num_frames: int, fps: float, generator: torch.Generator | None = None
    ) -> FrameSelection:
        if generator is None:
            return FrameSelection(None)
        kept = torch.randperm(num_frames, generator=generator)[:4].sort().values
        return FrameSelection(kept)

    def encode_prompts(self, prompts: Sequence[str]) -> list[Any]:
        return [torch.tensor(0.01 * len(prompt)) for prompt in prompts]

    def score(
        self,
        frames: Tensor,
        *,
        selection: FrameSelection,
        fps: Any,
        prompts: Sequence[Any],
        **_: Any,
    ) -> RewardScores:
        frames = selection.apply(frames)
        valid = frames.detach().isfinite().flatten(1).all(1)
        frames = torch.where(valid.view(-1, 1, 1, 1, 1), frames, 0.0)
        hidden = nn.functional.silu(nn.functional.conv3d(frames, self.kernel.to(frames))).mean(
            (2, 3, 4)
        )
        values = hidden @ self.head.to(frames) + torch.stack(list(prompts)).to(frames)[:, None]
        return RewardScores(values.masked_fill(~valid[:, None], float("nan")), valid)


def tiny_composite(seed: int = 0) -> CompositeReward:
    """Three tiny rewards over the four dimensions."""
    split = (DIMENSIONS[:2], DIMENSIONS[2:3], DIMENSIONS[3:])
    models = [TinyReward(names, seed + index) for index, names in enumerate(split)]
    return CompositeReward(models, dict.fromkeys(DIMENSIONS, 1.0))


def tiny_config(**changes: Any) -> DirectConfig:
    """A few quick steps."""
    settings: dict[str, Any] = {
        "num_steps": 4,
        "prompts_per_step": 4,
        "rollout_steps": 3,
        "validate_every": 2,
        "checkpoint_every": 1,
        "num_samples": 1,
        "num_low_res_clips": 6,
        "view_noise": 0.02,
        "view_shift": 1,
        "optimizer": {"lr": 1e-3},
    }
    return DirectConfig.model_validate(settings | changes)


def run_tiny(out: Path, role: str = "base", **changes: Any) -> Path:
    """One run from fresh models; returns `out/best`."""
    from rlhf.direct import maximise_reward

    return maximise_reward(
        tiny_config(**changes),
        backbone=tiny_generator(role),
        reward=tiny_composite(0),
        judge=tiny_composite(100),
        prompts=PROMPTS,
        validation_prompts=VALIDATION_PROMPTS,
        base=tiny_generator("base", seed=1) if role == "refiner" else None,
        out=out,
    )

"""Published pipelines shrunk to random weights of a few hundred kilobytes; no file is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

TEXT = {"vocab_size": 384, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
"""ByT5's tokenizer needs no file: its vocabulary is the bytes."""


def loud(module: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """What starts at zero, or whispers, is drawn with `std`, so that a wrong input changes the output."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and parameter.std() < std / 3:
            torch.nn.init.normal_(parameter, std=std)
    return module


def t5() -> dict[str, Any]:
    return {
        "tokenizer": ByT5Tokenizer(),
        "text_encoder": loud(T5EncoderModel(T5Config(**TEXT))).eval(),
    }


def umt5() -> dict[str, Any]:
    encoder = UMT5EncoderModel(UMT5Config(**TEXT))
    return {"tokenizer": ByT5Tokenizer(), "text_encoder": loud(encoder).eval()}


def wan(shift: float = 3.0, *, ti2v: bool = False) -> Any:
    """WanPipeline of 16 channels at 4 x 8 x 8; with `ti2v` of 48 channels at 4 x 16 x 16, a sigma per latent frame."""
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    torch.manual_seed(0)
    channels = 48 if ti2v else 16
    layout: dict[str, Any] = {"z_dim": 16, "dim_mult": [1, 1, 1, 1]}
    if ti2v:
        layout = {
            "z_dim": 48,
            "dim_mult": [1, 2, 4, 4],
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "decoder_base_dim": 8,
            "latents_mean": torch.linspace(-0.5, 0.5, 48).tolist(),
            "latents_std": torch.linspace(0.5, 2.0, 48).tolist(),
        }
    vae = AutoencoderKLWan(
        base_dim=8 if ti2v else 3,
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        **layout,
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=channels,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return WanPipeline(
        **umt5(),
        vae=vae.eval(),
        transformer=loud(transformer).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        expand_timesteps=ti2v,
    )


PIPES = {
    "wan21": wan,
    "wan22": lambda: wan(ti2v=True),
}
"""Family -> its tiny pipeline."""

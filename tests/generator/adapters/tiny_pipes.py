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


def ltx(*, timestep_conditioning: bool = False) -> Any:
    """LTXPipeline of 8 channels at 8 x 32 x 32, its schedule shifted with the clip's size."""
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    torch.manual_seed(0)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        timestep_conditioning=timestep_conditioning,
    )
    vae.latents_mean.copy_(torch.linspace(-0.5, 0.5, 8))
    vae.latents_std.copy_(torch.linspace(0.5, 2.0, 8))
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    return LTXPipeline(
        **t5(), vae=vae.eval(), transformer=loud(transformer).eval(), scheduler=scheduler
    )


def cogvideox(*, rotary: bool = True) -> Any:
    """CogVideoXPipeline of 4 channels at 4 x 8 x 8, zero terminal SNR; `rotary` as in 5B, without as in 2B."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=6,
        sample_height=4,
        sample_frames=9,
        use_rotary_positional_embeddings=rotary,
    )
    scheduler = CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=1.0,
        clip_sample=False,
    )
    return CogVideoXPipeline(
        **t5(), vae=vae.eval(), transformer=loud(transformer).eval(), scheduler=scheduler
    )


PIPES = {
    "wan21": wan,
    "wan22": lambda: wan(ti2v=True),
    "ltx": ltx,
    "ltx_timestep": lambda: ltx(timestep_conditioning=True),
    "cogvideox_2b": lambda: cogvideox(rotary=False),
    "cogvideox_5b": cogvideox,
}
"""Family -> its tiny pipeline."""

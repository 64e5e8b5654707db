"""Decoding chunk by chunk to pictures: the same clip, never whole in memory as float."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from generator.streaming import decode_stream, to_uint8
from generator.tiling import Tiling
from generator.vae import VideoVAE
from tests.generator.tiny_parts import TINY_VAE


@pytest.fixture
def vae() -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(TINY_VAE)


@pytest.mark.parametrize("chunk", [1, 2, 5, 8])
def test_the_stream_is_the_clip(vae, chunk):
    latents = torch.randn(2, 8, 5, 2, 2)
    with torch.no_grad():
        whole = to_uint8(vae.decode(latents)[0])
    parts = list(decode_stream(vae.decode, latents, chunk=chunk))
    assert all(part.dtype == torch.uint8 and not part.requires_grad for part in parts)
    assert len(parts) == -(-5 // chunk)
    difference = (torch.cat(parts, dim=2).int() - whole.int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 1e-3  # rounding at a half


def test_only_one_chunk_is_decoded_ahead_of_the_reader(vae):
    calls = []

    def counting(latents, state):
        calls.append(latents.shape[2])
        return vae.decode(latents, state)

    stream = decode_stream(counting, torch.randn(1, 8, 5, 2, 2), chunk=2)
    next(stream)
    assert calls == [2]
    assert len(list(stream)) == 2
    assert calls == [2, 2, 1]


def test_a_stream_may_be_tiled(vae):
    latents = torch.randn(1, 8, 3, 8, 11)
    tiling = Tiling(size=128, overlap=64)
    tiled = torch.cat(list(decode_stream(partial(vae.decode, tiling=tiling), latents, chunk=1)), 2)
    whole = torch.cat(list(decode_stream(vae.decode, latents)), 2)
    assert (tiled.int() - whole.int()).abs().max() <= 1


def test_pictures_round_and_clamp():
    frames = torch.tensor([-0.5, 0.0, 0.5 / 255 + 1e-4, 1.0, 7.0])
    assert to_uint8(frames).tolist() == [0, 0, 1, 255, 255]

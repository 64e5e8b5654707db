"""Tiles: exact where they overlap by the receptive field, close where less, seams where not at all."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from generator.tiling import Tiling, fade, tile_spans, tile_weight
from generator.vae import VAEConfig, VideoVAE
from reelhf.errors import UserError

NARROW = VAEConfig(
    channels=8,
    encoder_fine_width=8,
    encoder_fine_blocks=2,
    encoder_width=16,
    encoder_blocks=1,
    decoder_width=16,
    decoder_blocks=1,
    decoder_fine_width=8,
    decoder_fine_blocks=2,
)
EXACT = Tiling(size=128, overlap=64)  # it needs 2 * 32: two latent positions to each side


def with_strong_residual(config: VAEConfig) -> VideoVAE:
    """Untrained heads are small; enlarged, what the residual path spoils at a border shows."""
    torch.manual_seed(0)
    vae = VideoVAE(config)
    with torch.no_grad():
        for head in (vae.decoder.head.first, vae.decoder.head.later, vae.encoder.head):
            head.weight.mul_(30)
    return vae


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    return with_strong_residual(NARROW)


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    return torch.rand(1, 3, 5, 144, 176, generator=torch.Generator().manual_seed(0))


def _seen_from(vae: VideoVAE, network: str) -> int:
    """Receptive field to one side in latent positions, measured by gradients."""
    if network == "decoder":
        inputs = torch.randn(1, 8, 2, 13, 13, requires_grad=True)
        output = vae.decode(inputs)[0][:, :, :, 6 * 16 : 7 * 16, 6 * 16 : 7 * 16]
        scale = 1
    else:
        inputs = torch.rand(1, 3, 5, 13 * 16, 13 * 16, requires_grad=True)
        output = vae.encode(inputs)[:, :, :, 6, 6]
        scale = 16
    (output * torch.randn_like(output)).sum().backward()
    rows = inputs.grad.abs().sum((0, 1, 2, 4)).nonzero().flatten() // scale
    return int(max(6 - rows.min(), rows.max() - 6))


@pytest.mark.parametrize(("blocks", "fine_blocks"), [(0, 0), (1, 2), (2, 5), (3, 0)])
def test_the_receptive_field_is_never_more_than_the_network_says(blocks, fine_blocks):
    widths = NARROW.model_dump() | {
        "encoder_blocks": blocks,
        "decoder_blocks": blocks,
        "encoder_fine_blocks": fine_blocks,
        "decoder_fine_blocks": fine_blocks,
    }
    vae = with_strong_residual(VAEConfig(**widths))
    assert _seen_from(vae, "decoder") == vae.decoder.radius
    assert _seen_from(vae, "encoder") == vae.encoder.radius


def test_tiles_that_overlap_by_the_receptive_field_decode_the_same_frames(vae):
    latents = torch.randn(1, 8, 2, 9, 11)
    whole, _ = vae.decode(latents)
    tiled, _ = vae.decode(latents, tiling=EXACT)
    torch.testing.assert_close(
        tiled, whole, rtol=1e-5, atol=1e-5 * float(whole.detach().abs().max())
    )


def test_tiles_that_overlap_by_the_receptive_field_encode_the_same_latents(vae, clip):
    whole = vae.encode(clip)
    torch.testing.assert_close(
        vae.encode(clip, tiling=EXACT),
        whole,
        rtol=1e-5,
        atol=1e-5 * float(whole.detach().abs().max()),
    )


def test_less_overlap_is_close_and_none_leaves_seams(vae):
    latents = torch.randn(1, 8, 2, 9, 11)
    whole, _ = vae.decode(latents)
    errors = [
        (vae.decode(latents, tiling=Tiling(size=96, overlap=overlap))[0] - whole).square().mean()
        for overlap in (0, 32, 48)
    ]
    assert errors[0] > 2 * errors[1] > 2 * errors[2] > 0
    assert errors[2] < 0.02 * whole.var()


def test_gradients_pass_through_tiles(vae):
    latents, weight = torch.randn(1, 8, 2, 9, 11), torch.randn(1, 3, 5, 144, 176)
    gradients = []
    for tiling in (None, EXACT):
        leaf = latents.clone().requires_grad_(True)
        (vae.decode(leaf, tiling=tiling, checkpoint_chunk=1)[0] * weight).sum().backward()
        gradients.append(leaf.grad)
    scale = float(gradients[0].abs().max())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 * scale)


def test_tiled_chunks_carry_every_tiles_state(vae, clip):
    latents = torch.randn(1, 8, 3, 9, 11)
    whole, _ = vae.decode(latents, tiling=EXACT)
    first, state = vae.decode(latents[:, :, :1], tiling=EXACT)
    rest, _ = vae.decode(latents[:, :, 1:], state, tiling=EXACT)
    scale = float(whole.detach().abs().max())
    torch.testing.assert_close(torch.cat([first, rest], 2), whole, rtol=1e-5, atol=1e-5 * scale)
    start, past = vae.encode_chunk(clip[:, :, :1], tiling=EXACT)
    end, _ = vae.encode_chunk(clip[:, :, 1:], past, tiling=EXACT)
    encoded = torch.cat([start, end], 2)
    torch.testing.assert_close(encoded, vae.encode(clip), rtol=1e-4, atol=1e-4)


def test_a_frame_within_one_tile_is_not_touched(vae):
    latents = torch.randn(1, 8, 2, 6, 6)
    assert torch.equal(vae.decode(latents)[0], vae.decode(latents, tiling=EXACT)[0])


@pytest.mark.parametrize("extent", [1, 5, 6, 9, 10, 11, 23])
@pytest.mark.parametrize(("size", "overlap", "halo"), [(6, 2, 0), (6, 2, 1), (6, 3, 1), (5, 0, 1)])
@pytest.mark.parametrize("scale", [1, 16])
def test_weights_sum_to_one_everywhere(extent, size, overlap, halo, scale):
    total = torch.zeros(extent * scale, dtype=torch.float64)
    spans = tile_spans(extent, size, overlap)
    for span in spans:
        total[span.start * scale : span.stop * scale] += tile_weight(span, overlap, halo, scale)
    torch.testing.assert_close(total, torch.ones_like(total))
    assert spans[0].start == 0 and spans[-1].stop == extent
    assert all(later.start == span.stop - overlap for span, later in pairwise(spans))


def test_the_fade_leaves_out_the_halo_and_is_symmetric():
    rising = fade(10, 3)
    assert rising[:3].eq(0).all() and rising[-3:].eq(1).all()
    assert ((rising[3:7] > 0) & (rising[3:7] < 1)).all()
    torch.testing.assert_close(rising + rising.flip(0), torch.ones(10, dtype=torch.float64))
    assert fade(4, 2).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("tiling", "words"),
    [
        (Tiling(size=100, overlap=32), "tile size 100 is not a multiple of 16; use 96 or 112"),
        (Tiling(size=96, overlap=8), "tile overlap 8 is not a multiple of 16"),
        (Tiling(size=96, overlap=96), "tiles of 96 pixels cannot overlap by 96"),
    ],
)
def test_sizes_that_do_not_fit_are_one_clear_line(vae, tiling, words):
    latents = torch.randn(1, 8, 1, 9, 9)
    with pytest.raises(UserError, match=words):
        vae.decode(latents, tiling=tiling)


def test_a_frame_of_an_illegal_size_is_named_before_it_is_cut(vae):
    with pytest.raises(UserError, match="height 150"):
        vae.encode(torch.rand(1, 3, 1, 150, 176), tiling=EXACT)

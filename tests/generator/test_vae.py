"""The VAE: causal, the same in any chunking, differentiable in latents and state, and a file that reads back."""

from __future__ import annotations

import pytest
import torch

from generator.causal import patchify, unpatchify
from generator.vae import VAEConfig, VideoVAE
from reelhf.errors import UserError

TINY = VAEConfig(
    channels=8,
    encoder_fine_width=8,
    encoder_width=16,
    encoder_blocks=1,
    decoder_width=16,
    decoder_blocks=1,
    decoder_fine_width=8,
    decoder_fine_blocks=2,
)
CHUNKINGS = [(1, 3), (1, 1, 1, 1), (2, 2), (3, 1)]
RATIOS = [(4, 16, 2), (4, 8, 4), (2, 8, 4), (8, 16, 4), (4, 4, 4)]  # temporal, spatial, fine size


@pytest.fixture
def vae() -> VideoVAE:
    torch.manual_seed(0)
    vae = VideoVAE(TINY)
    vae.latent_mean.normal_()
    vae.latent_std.uniform_(0.5, 2.0)
    return vae


def _clip(num_frames: int = 13, size: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.rand(
        batch, 3, num_frames, size, size, generator=torch.Generator().manual_seed(num_frames)
    )


def _moving_squares(num_clips: int = 24, num_frames: int = 5, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    clips = torch.full((num_clips, 3, num_frames, size, size), 0.8)
    for clip in clips:
        colour = torch.rand(3, generator=generator)
        top, left = torch.randint(0, size - 16, (2,), generator=generator).tolist()
        for frame in range(num_frames):
            clip[:, frame, top : top + 10, left + frame : left + frame + 10] = colour[:, None, None]
    return clips


def _decode_in_chunks(vae, latents, chunking):
    frames, state = [], None
    for chunk in latents.split(list(chunking), dim=2):
        decoded, state = vae.decode(chunk, state)
        frames.append(decoded)
    return torch.cat(frames, dim=2)


def test_shapes_follow_the_compression(vae):
    assert vae.encode(_clip(13, 32)).shape == (2, 8, 4, 2, 2)
    assert vae.encode(_clip(1, 32)).shape == (2, 8, 1, 2, 2)
    frames, _ = vae.decode(torch.zeros(2, 8, 4, 2, 2))
    assert frames.shape == (2, 3, 13, 32, 32)


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_any_chunking_decodes_the_same_frames_and_gradients(vae, chunking):
    latents = torch.randn(2, 8, 4, 2, 2)
    weight = torch.randn(2, 3, 13, 32, 32)
    results = []
    for parts in ((4,), chunking):
        leaf = latents.clone().requires_grad_(True)
        frames = _decode_in_chunks(vae, leaf, parts)
        vae.zero_grad()
        (frames * weight).sum().backward()
        parameter = vae.decoder.coarse[0].conv.weight.grad.clone()
        results.append((frames.detach(), leaf.grad, parameter))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_any_chunking_encodes_the_same_latents_and_gradients(vae, chunking):
    clip, weight = _clip(13), torch.randn(2, 8, 4, 2, 2)
    sizes = [4 * n for n in chunking]
    sizes[0] -= 3
    results = []
    for parts in ([13], sizes):
        leaf, latents, state = clip.clone().requires_grad_(True), [], None
        for chunk in leaf.split(parts, dim=2):
            encoded, state = vae.encode_chunk(chunk, state)
            latents.append(encoded)
        vae.zero_grad()
        (torch.cat(latents, dim=2) * weight).sum().backward()
        parameters = [vae.encoder.fine[0].conv.weight, vae.encoder.coarse[0].out.weight]
        results.append(
            [torch.cat(latents, dim=2).detach(), leaf.grad, *(p.grad.clone() for p in parameters)]
        )
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize(("group", "size", "fine"), RATIOS)
def test_other_compression_ratios_stream_and_stay_causal(group, size, fine):
    torch.manual_seed(0)
    config = {"temporal_ratio": group, "spatial_ratio": size, "fine_size": fine}
    vae = VideoVAE(VAEConfig(**{**TINY.model_dump(), **config}))
    num_frames, side = 1 + 3 * group, 2 * size
    clip = torch.rand(1, 3, num_frames, side, side)
    latents = vae.encode(clip)
    assert latents.shape == (1, 8, 4, 2, 2)
    assert vae.encode(clip[:, :, :1]).shape == (1, 8, 1, 2, 2)
    start, state = vae.encode_chunk(clip[:, :, : 1 + group])
    rest, _ = vae.encode_chunk(clip[:, :, 1 + group :], state)
    torch.testing.assert_close(torch.cat([start, rest], 2), latents, rtol=1e-5, atol=1e-5)
    later = clip.clone()
    later[:, :, 1 + group :] = 0
    assert torch.equal(vae.encode(later)[:, :, :2], latents[:, :, :2])
    frames, _ = vae.decode(latents)
    assert frames.shape == clip.shape
    chunked = _decode_in_chunks(vae, latents, (1, 2, 1))
    torch.testing.assert_close(chunked, frames, rtol=1e-5, atol=1e-5)


def test_a_fine_size_that_does_not_divide_the_ratio_is_refused():
    with pytest.raises(UserError, match="fine_size 6: it must divide the spatial ratio 16"):
        VideoVAE(VAEConfig(fine_size=6))


def test_the_gradient_reaches_an_earlier_chunk_through_the_state(vae):
    first = torch.randn(1, 8, 1, 2, 2, requires_grad=True)
    _, state = vae.decode(first)
    frames, _ = vae.decode(torch.randn(1, 8, 1, 2, 2), state)
    frames.square().sum().backward()
    assert first.grad.abs().max() > 0


def test_a_chunk_starting_from_cut_state_has_the_gradient_of_the_whole(vae):
    """The reverse pass chunk by chunk, with frame and next-state cotangents, equals one backward pass."""
    latents = torch.randn(1, 8, 3, 2, 2)
    weight = torch.randn(1, 3, 9, 32, 32)
    whole = latents.clone().requires_grad_(True)
    (vae.decode(whole)[0] * weight).sum().backward()

    with torch.no_grad():
        _, state = vae.decode(latents[:, :, :1])
    entry = tuple(tensor.clone().requires_grad_(True) for tensor in state)
    later = latents[:, :, 1:].clone().requires_grad_(True)
    (vae.decode(later, entry)[0] * weight[:, :, 1:]).sum().backward()
    first = latents[:, :, :1].clone().requires_grad_(True)
    frames, exit_state = vae.decode(first)
    torch.autograd.backward(
        [frames, *exit_state], [weight[:, :, :1], *(tensor.grad for tensor in entry)]
    )
    torch.testing.assert_close(
        torch.cat([first.grad, later.grad], dim=2), whole.grad, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_checkpointing_per_chunk_changes_neither_frames_nor_gradients(vae, chunk):
    clip, noise = _clip(13), torch.randn(2, 8, 4, 2, 2)
    results = []
    for checkpoint_chunk in (None, chunk):
        leaf = clip.clone().requires_grad_(True)
        vae.zero_grad()
        reconstruction, posterior = vae(leaf, noise, checkpoint_chunk=checkpoint_chunk)
        (reconstruction.square().sum() + posterior.kl()).backward()
        parameters = [p.grad for p in vae.parameters() if p.grad is not None]
        results.append([reconstruction.detach(), leaf.grad, *parameters])
    assert len(results[0]) == len(results[1]) > 20
    for kept, recomputed in zip(*results, strict=True):
        atol = 1e-5 * float(kept.abs().max())
        torch.testing.assert_close(kept, recomputed, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(("chunk", "forwards"), [(None, 1), (2, 2), (1, 4)])
def test_checkpointing_really_computes_each_chunk_again(vae, chunk, forwards):
    calls = {"encoder": 0, "decoder": 0}
    for (
        name
    ) in calls:  # recomputation stops once it has what backward needs, before the head returns
        getattr(vae, name).coarse[0].register_forward_hook(
            lambda *_, name=name: calls.update({name: calls[name] + 1})
        )
    reconstruction, posterior = vae(_clip(13), torch.randn(2, 8, 4, 2, 2), checkpoint_chunk=chunk)
    assert calls == {"encoder": forwards, "decoder": forwards}
    (reconstruction.sum() + posterior.mean.sum()).backward()
    again = 1 if chunk is None else 2
    assert calls == {"encoder": again * forwards, "decoder": again * forwards}


def test_checkpointing_keeps_fewer_activations(vae):
    def kept(chunk: int | None) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            vae(_clip(13), torch.randn(2, 8, 4, 2, 2), checkpoint_chunk=chunk)
        return sum(sizes)

    assert kept(1) < 0.2 * kept(None)


def test_a_later_frame_changes_no_earlier_latent(vae):
    clip = _clip(13)
    other = clip.clone()
    other[:, :, 5:] = torch.rand_like(other[:, :, 5:])
    before, after = vae.encode(clip), vae.encode(other)
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.allclose(before[:, :, 2], after[:, :, 2])


def test_a_later_latent_changes_no_earlier_frame(vae):
    latents = torch.randn(1, 8, 4, 2, 2)
    other = latents.clone()
    other[:, :, 2:] += 1
    before, after = vae.decode(latents)[0], vae.decode(other)[0]
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.allclose(before[:, :, 5:], after[:, :, 5:])


def test_decoded_frames_are_not_clamped(vae):
    frames, _ = vae.decode(20 * torch.randn(1, 8, 2, 2, 2))
    assert frames.min() < 0 and frames.max() > 1


@pytest.mark.parametrize(
    ("shape", "words"),
    [((12, 32, 32), "12 frames"), ((9, 40, 32), "height 40"), ((9, 32, 24), "width 24")],
)
def test_illegal_sizes_are_named(vae, shape, words):
    with pytest.raises(UserError, match=words):
        vae.encode(torch.zeros(1, 3, *shape))


def test_patchify_is_undone_by_unpatchify():
    clip = _clip(8, 16)
    assert torch.equal(unpatchify(patchify(clip, 4, 8), 4, 8), clip)


def test_save_and_load_give_the_same_latents_and_frames(vae, tmp_path):
    clip = _clip(9)
    loaded = VideoVAE.load(vae.save(tmp_path / "vae"))
    assert torch.equal(loaded.encode(clip), vae.encode(clip))
    assert torch.equal(loaded.decode(vae.encode(clip))[0], vae.decode(vae.encode(clip))[0])
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"vae\.json is missing"):
        VideoVAE.load(tmp_path)


def test_the_closed_form_shortcut_rebuilds_clips_and_has_unit_latents():
    clips = _moving_squares()
    vae = VideoVAE(VAEConfig(**{**TINY.model_dump(), "channels": 24}))
    vae.init_shortcut([clips])
    with torch.no_grad():
        error = (vae.shortcut(clips) - clips).square().mean()
        latents = vae.encoder.shortcut(clips - 0.5, True)
    assert error < 0.1 * clips.var()
    per_channel = latents[:, :, 1:].transpose(0, 1).flatten(1).std(1)
    torch.testing.assert_close(per_channel, torch.ones(24), rtol=0.2, atol=0.2)


def test_a_patch_at_rest_keeps_its_latent_from_the_first_to_later_frames():
    clips = _moving_squares()
    vae = VideoVAE(VAEConfig(**{**TINY.model_dump(), "channels": 24}))
    vae.init_shortcut([clips])
    at_rest = clips[:, :, :1].expand(-1, -1, 5, -1, -1) - 0.5
    with torch.no_grad():
        first, later = vae.encoder.shortcut(at_rest, True).unbind(2)
    similarity = torch.nn.functional.cosine_similarity(first.flatten(), later.flatten(), dim=0)
    assert similarity > 0.8


def test_latent_statistics_normalise_every_channel(vae):
    latents = [3 * torch.randn(40, 8, 2, 2, 2) + 5, 3 * torch.randn(40, 8, 2, 4, 4) + 5]
    vae.set_latent_statistics(latents)
    torch.testing.assert_close(vae.latent_mean, torch.full((8,), 5.0), rtol=0.1, atol=0.1)
    torch.testing.assert_close(vae.latent_std, torch.full((8,), 3.0), rtol=0.1, atol=0.1)

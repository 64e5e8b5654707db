"""Packed attention computes what padded and masked attention does, over the tokens that exist and no others."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from generator import packed
from generator.base import NO_SHOT
from generator.blocks import window_map
from generator.dit import DiT, DiTConfig
from generator.packed import FramePacking, Sequences, WindowPacking, packed_attention

CONFIG = DiTConfig(channels=4, width=24, num_heads=2, num_pairs=3, text_width=8)


def model(**changes: Any) -> DiT:
    torch.manual_seed(0)
    dit = DiT(CONFIG.model_copy(update=changes))
    for parameter in dit.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return dit


def inputs(frames: int, height: int, width: int, *, low_res: bool = False) -> dict[str, Any]:
    """Prompts of 3, 7 and 0 tokens (dropped)."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    size = (frames, height, width)
    mask = torch.tensor([[True] * 3 + [False] * 4, [True] * 7, [False] * 7])
    return {
        "noisy": draw(3, 4, *size),
        "sigma": torch.rand(3, frames, generator=generator),
        "embeds": draw(3, 7, 8),
        "mask": mask,
        "condition_latents": draw(3, 4, *size),
        "condition_mask": torch.ones(3, 1, *size),
        **({"low_res_latents": draw(3, 4, *size)} if low_res else {}),
    }


SHOTS = {
    "token_shots": torch.tensor([[0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 2, 2], [0] * 7]),
    "shot_starts": torch.tensor([[0, 2, NO_SHOT], [0, 1, 3], [0, NO_SHOT, NO_SHOT]]),
}


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((4, 3, 5), {}),  # windows of 2 x 2 that do not divide the frame
        ((4, 3, 5), {"shots": True}),
        ((1, 4, 4), {}),  # images
        ((3, 4, 4), {"low_res": True}),
        ((3, 4, 4), {"checkpointing": "attention", "shots": True}),
        ((3, 3, 4), {"layers": "full", "shots": True}),
    ],
)
def test_packed_and_padded_attention_give_the_same_velocity_and_gradients(size, options):
    options = dict(options)
    given = inputs(*size, low_res=options.get("low_res", False))
    given |= SHOTS if options.pop("shots", False) else {}
    results = []
    for attention in ("sdpa", "packed"):
        dit = model(attention=attention, **options)
        embeds = given["embeds"].clone().requires_grad_(True)
        velocity, hidden = dit(**{**given, "embeds": embeds}, features=(2,))
        (velocity * torch.linspace(-1, 1, velocity.numel()).view_as(velocity)).sum().backward()
        gradients = {name: p.grad for name, p in dit.named_parameters()}
        results.append((velocity, hidden[2], embeds.grad, gradients))
    (velocity, hidden, of_text, gradients), other = results
    assert velocity.abs().mean() > 0.05
    torch.testing.assert_close(other[0], velocity, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other[1], hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other[2], of_text, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        bound = 1e-5 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(other[3][name], gradient, rtol=1e-4, atol=bound, msg=name)


def test_a_sequence_sees_its_own_keys_and_no_others():
    torch.manual_seed(0)
    lengths_q, lengths_k = torch.tensor([2, 0, 3, 1]), torch.tensor([4, 0, 1, 5])
    q, k, v = torch.randn(6, 2, 8), torch.randn(10, 2, 8), torch.randn(10, 2, 8)
    of_queries, of_keys = Sequences.of(lengths_q), Sequences.of(lengths_k)
    assert of_queries.edges.tolist() == [0, 2, 2, 5, 6]
    assert (of_queries.longest, of_keys.longest) == (3, 5)
    result = packed_attention(q, k, v, of_queries, of_keys)
    for index in (0, 2, 3):
        rows = slice(*of_queries.edges[index : index + 2].tolist())
        keys = slice(*of_keys.edges[index : index + 2].tolist())
        alone = F.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (q[rows], k[keys], v[keys]))
        ).transpose(0, 1)
        torch.testing.assert_close(result[rows], alone)


def test_nothing_that_does_not_exist_is_computed():
    """Of text and windows alike: the packed tokens are those that the mask and the border leave."""
    reads = torch.tensor([[[True, True, False]], [[False, False, False]]])
    packing = FramePacking.of(reads, num_frames=2, positions=4)
    assert packing.sequences.edges.diff().tolist() == [6, 6, 4, 4]
    assert packing.tokens.tolist()[:6] == [
        0,
        1,
        6,
        7,
        8,
        9,
    ]  # tokens of the text, then the first frame's
    assert len(packing.tokens) == 20
    members, valid, _ = window_map(2, 3, 3, (2, 2), True)
    windows = WindowPacking.of(members, valid, 2)
    assert sorted(windows.tokens.tolist()) == list(range(18))
    assert windows.sequences.edges.diff().tolist() == 2 * [2, 4, 4, 8]
    assert valid.numel() == 4 * 8


def test_the_flash_kernel_is_given_the_packed_sequences():
    """On a device that has it; what it would be called with is checked here by standing in for it."""
    calls = []

    def kernel(q, k, v, edges_q, edges_k, longest_q, longest_k):
        calls.append((q.shape, edges_q.dtype, longest_q, longest_k))
        return packed.padded_attention(
            q, k, v, Sequences(edges_q, longest_q), Sequences(edges_k, longest_k)
        )

    given = inputs(4, 3, 5) | SHOTS
    expected = model()(**given)
    with (
        mock.patch.object(packed, "has_flash", return_value=True),
        mock.patch("torch.nn.attention.varlen.varlen_attn", kernel),
    ):
        velocity = model(attention="packed")(**given)
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 6
    assert {dtype for _, dtype, *_ in calls} == {torch.int32}
    last_spatial = calls[-2]
    assert last_spatial[2:] == (
        15,
        15 + 3,
    )  # queries are positions alone, keys with their shot's text


@pytest.mark.gpu
def test_flash_agrees_with_padding_in_bfloat16():
    given = {n: x.cuda() for n, x in (inputs(4, 6, 5) | SHOTS).items()}
    config = {"width": 128, "num_heads": 2}
    velocities = []
    for attention in ("sdpa", "packed"):
        dit = model(attention=attention, **config).to("cuda", torch.bfloat16)
        velocities.append(dit(**given))
    torch.testing.assert_close(velocities[1], velocities[0], rtol=5e-2, atol=5e-2)
    exact = model(**config).cuda()(**given)
    errors = [(velocity - exact).square().mean() for velocity in velocities]
    assert errors[1] < 2 * errors[0]


def test_packed_layers_are_traced_whole_for_compilation():
    torch.compiler.reset()
    given = inputs(3, 4, 4) | SHOTS
    plain, traced = model(attention="packed"), model(attention="packed")
    traced.compile_layers(backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(**given), plain(**given))


def test_windows_keep_their_share_of_the_picture():
    fixed = CONFIG.model_copy(update={"window": (4, 4)})
    relative = fixed.model_copy(update={"window_grid": (30, 52)})
    assert fixed.window_for(60, 104) == relative.window_for(30, 52) == (4, 4)
    assert relative.window_for(60, 104) == (8, 8)
    assert relative.window_for(44, 80) == (6, 6)  # 720p
    assert relative.window_for(1, 1) == (1, 1)
    torch.manual_seed(0)
    given = inputs(2, 4, 4)
    wide = model(window=(1, 1), window_grid=(2, 2))(**given)
    torch.testing.assert_close(wide, model(window=(2, 2))(**given))
    assert not torch.allclose(wide, model(window=(1, 1))(**given))

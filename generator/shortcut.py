"""The VAE's linear shortcuts in closed form, within seconds: the encoder's by PCA, the decoder's by regression on its latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generator.base import BackboneSpec
from generator.causal import LappedPatches, PixelsToTokens, patchify
from reelhf.errors import UserError

RIDGE = 1e-3
"""Penalty of the decoder's linear fit, relative to the unit variance of its inputs."""


@torch.no_grad()
def fit_shortcuts(
    encoder: PixelsToTokens,
    decoder: LappedPatches,
    clips: Sequence[Tensor],
    spec: BackboneSpec,
    *,
    max_patches: int,
    seed: int,
) -> None:
    """Fit both in place; see `VideoVAE.init_shortcut`."""
    generator = torch.Generator().manual_seed(seed)
    fit_encoder_shortcut(encoder, clips, spec, max_patches, seed, generator)
    fit_decoder_shortcut(decoder, encoder, clips, spec, max_patches, generator)


def fit_encoder_shortcut(
    encoder: PixelsToTokens,
    clips: Sequence[Tensor],
    spec: BackboneSpec,
    max_patches: int,
    seed: int,
    generator: torch.Generator,
) -> None:
    """Whitened PCA of first-frame and of later patches, so rotated that a patch at rest has nearly the same latent in both."""
    group, size, channels = spec.temporal_ratio, spec.spatial_ratio, spec.channels
    first_rows, later_rows = [], []
    for frames in clips:
        first_patches = patchify(frames[:, :, :1] - 0.5, 1, size)
        first_rows.append(_sample_rows(first_patches, max_patches, generator))
        later_patches = patchify(frames[:, :, 1:] - 0.5, group, size)
        later_rows.append(_sample_rows(later_patches, max_patches, generator))
    first, later = torch.cat(first_rows), torch.cat(later_rows)
    first_basis = _whitened_pca(first, channels, seed)
    later_basis = _whitened_pca(later, channels, seed)

    # a first-frame patch [3 * 1 * s * s] held for four frames [3 * 4 * s * s]
    at_rest = first.unflatten(1, (3, 1, size * size)).expand(-1, -1, group, -1).flatten(1)
    # orthogonal Procrustes
    left, _, right = torch.linalg.svd(first_basis.encode(first).T @ later_basis.encode(at_rest))
    first_basis = first_basis.rotated(left @ right)

    for conv, basis in ((encoder.first, first_basis), (encoder.later, later_basis)):
        conv.weight.copy_(basis.analysis.T[:, :, None, None, None])
        conv.bias.copy_(-basis.mean @ basis.analysis)


def fit_decoder_shortcut(
    decoder: LappedPatches,
    encoder: PixelsToTokens,
    clips: Sequence[Tensor],
    spec: BackboneSpec,
    max_patches: int,
    generator: torch.Generator,
) -> None:
    """Ridge regression of patches on the latents around them."""
    group, size = spec.temporal_ratio, spec.spatial_ratio
    first_rows, later_rows = [], []
    for frames in clips:
        frames = frames - 0.5
        around = _neighbourhoods(encoder(frames, True))  # [B, 9 * C, T, h, w]
        before_and_now = torch.cat([around[:, :, :-1], around[:, :, 1:]], dim=1)
        first_patches = patchify(frames[:, :, :1], 1, size)
        later_patches = patchify(frames[:, :, 1:], group, size)
        for rows, inputs, patches in (
            (first_rows, around[:, :, :1], first_patches),
            (later_rows, before_and_now, later_patches),
        ):
            equations = torch.cat([inputs, torch.ones_like(inputs[:, :1]), patches], dim=1)
            rows.append(_sample_rows(equations, max_patches, generator))
    _solve_ridge(decoder.first, torch.cat(first_rows))
    _solve_ridge(decoder.later, torch.cat(later_rows))


def _solve_ridge(conv: nn.Conv3d, rows: Tensor) -> None:
    """Weights and bias of `conv` from rows (taps * 9 * C inputs, 1, output features)."""
    inputs, patches = rows[:, : -conv.out_channels], rows[:, -conv.out_channels :]
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * len(rows))
    weights = torch.linalg.solve(gram, inputs.T @ patches)  # [taps * 9 * C + 1, features]
    taps = weights[:-1].T.unflatten(1, (conv.kernel_size[0], conv.in_channels, 3, 3))
    conv.weight.copy_(taps.transpose(1, 2))
    conv.bias.copy_(weights[-1])


class PatchBasis(NamedTuple):
    """A linear code of patches: z = (x - mean) @ analysis, x ~ mean + z @ synthesis."""

    mean: Tensor
    """[features]"""
    analysis: Tensor
    """[features, channels]"""
    synthesis: Tensor
    """[channels, features]"""

    def encode(self, patches: Tensor) -> Tensor:
        return (patches - self.mean) @ self.analysis

    def rotated(self, rotation: Tensor) -> PatchBasis:
        """The same code in other axes: z' = z @ rotation, with `rotation` [channels, channels] orthogonal."""
        return PatchBasis(self.mean, self.analysis @ rotation, rotation.T @ self.synthesis)


def _whitened_pca(patches: Tensor, channels: int, seed: int) -> PatchBasis:
    """The `channels` strongest principal components of patches [N, features], scaled to unit variance."""
    mean = patches.mean(0)
    with torch.random.fork_rng(
        devices=[]
    ):  # pca_lowrank draws its test vectors from the global generator
        torch.manual_seed(seed)
        rank = min(channels + 16, *patches.shape)
        _, scale, basis = torch.pca_lowrank(patches - mean, q=rank, center=False, niter=3)
    if rank < channels:
        raise UserError(
            f"{len(patches)} training patches are too few for {channels} latent channels"
        )
    std = (scale[:channels] / len(patches) ** 0.5).clamp_min(
        1e-4
    )  # flat clips have fewer than `channels` components
    basis = basis[:, :channels]
    return PatchBasis(mean, basis / std, (basis * std).T)


def _neighbourhoods(latents: Tensor) -> Tensor:
    """The 3 x 3 positions around each, zeros outside the frame: [B, C, T, h, w] -> [B, C * 9, T, h, w]."""
    batch, _, time, height, width = latents.shape
    around = F.unfold(latents.transpose(1, 2).flatten(0, 1), 3, padding=1)
    return around.reshape(batch, time, -1, height, width).transpose(1, 2)


def _sample_rows(patches: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """At most `limit` positions of [B, features, T, h, w] as rows [N, features]."""
    rows = patches.movedim(1, -1).flatten(0, -2)
    return rows[torch.randperm(len(rows), generator=generator)[:limit]]

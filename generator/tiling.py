"""Large frames through a network in square tiles that overlap, so that memory follows the tile and not the frame.

A convolution sees zeros beyond a tile's inner edge where the whole frame has content. What that spoils reaches as far as the network's
receptive field, its halo. Neighbouring tiles therefore overlap, and inside the overlap one fades into the other:

* overlap >= 2 * halo: the outer `halo` of each tile has weight zero and what lies between fades linearly. Nothing spoiled is kept, so
  the result equals the untiled one up to rounding;
* a smaller overlap fades over all of it: cheaper, close, not equal.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from reelhf.config import Config
from reelhf.errors import UserError

State = tuple[Tensor, ...]


class Tiling(Config):
    """How frames are cut into tiles; both in pixels and multiples of the VAE's spatial ratio."""

    size: PositiveInt = 256
    """Side of a tile, its overlaps included."""
    overlap: NonNegativeInt = 96
    """What two neighbours share, at most half of `size`. Twice the receptive field makes tiling exact."""


class Span(NamedTuple):
    """One tile along one axis, in latent positions, half open, and its weight over the whole positions."""

    start: int
    stop: int
    fade_in: bool
    """Whether another tile lies before it."""
    fade_out: bool
    """Whether another tile lies after it."""


def tile_spans(extent: int, size: int, overlap: int) -> list[Span]:
    """Tiles that cover [0, extent): each `size` long but the last, which may be shorter, and neighbours share `overlap`."""
    starts = range(0, max(extent - overlap, 1), size - overlap)
    return [
        Span(start, min(start + size, extent), start > 0, start + size < extent) for start in starts
    ]


def fade(overlap: int, halo: int) -> Tensor:
    """Weight of the later of two neighbours along their overlap [overlap]: 0 in the first `halo` places, 1 in the last, linear between.

    One minus it is the earlier one's, so the two sum to 1 everywhere.
    """
    middle = overlap - 2 * halo
    places = torch.arange(overlap, dtype=torch.float64)
    if middle == 0:
        return (places >= halo).double()
    return ((places - halo + 0.5) / middle).clamp(0, 1)


def tile_weight(span: Span, overlap: int, halo: int, scale: int) -> Tensor:
    """Weight of a tile along one axis, [(stop - start) * scale]; over all tiles they sum to 1 at every place.

    Args:
        overlap, halo: in latent positions; a halo that does not fit twice into the overlap counts as none.
        scale: places of the output per latent position; the fade has the output's resolution.
    """
    if 2 * halo > overlap:
        halo = 0
    weight = torch.ones((span.stop - span.start) * scale, dtype=torch.float64)
    rising = fade(overlap * scale, halo * scale)
    if span.fade_in and overlap:
        weight[: overlap * scale] *= rising
    if span.fade_out and overlap:
        weight[-overlap * scale :] *= 1 - rising
    return weight


def in_latents(tiling: Tiling, ratio: int) -> tuple[int, int]:
    """(size, overlap) in latent positions. Raises: UserError for sizes that do not fit the VAE."""
    for name, value in (("size", tiling.size), ("overlap", tiling.overlap)):
        if value % ratio:
            lower = value // ratio * ratio
            raise UserError(
                f"tile {name} {value} is not a multiple of {ratio}; use {lower or ratio} or {lower + ratio}"
            )
    if 2 * tiling.overlap > tiling.size:
        raise UserError(
            f"tiles of {tiling.size} pixels cannot overlap by {tiling.overlap}; the overlap is at most half of the tile"
        )
    return tiling.size // ratio, tiling.overlap // ratio


def run_tiled(
    network: Callable[[Tensor, State | None], tuple[Tensor, State]],
    inputs: Tensor,
    state: State | None,
    tiling: Tiling,
    *,
    ratio: int,
    halo: int,
    scale_in: int,
    scale_out: int,
) -> tuple[Tensor, State]:
    """`network(inputs, state)` tile by tile, blended; differentiable like the network itself.

    Args:
        inputs: [B, C, T, h * scale_in, w * scale_in].
        state: of all tiles one after another, or None; a tile's state has its own spatial size.
        ratio: pixels per latent position.
        halo: receptive field to one side, in latent positions.
        scale_in, scale_out: places per latent position of inputs and outputs.
    """
    size, overlap = in_latents(tiling, ratio)
    rows, columns = (tile_spans(extent // scale_in, size, overlap) for extent in inputs.shape[-2:])
    per_tile = 0 if state is None else len(state) // (len(rows) * len(columns))
    states: list[Tensor] = []
    whole: Tensor | None = None
    for index, (row, column) in enumerate(product(rows, columns)):
        part = inputs[
            ...,
            row.start * scale_in : row.stop * scale_in,
            column.start * scale_in : column.stop * scale_in,
        ]
        past = None if state is None else state[index * per_tile : (index + 1) * per_tile]
        tile, tile_state = network(part, past)
        states += tile_state
        if whole is None:
            height, width = (extent // scale_in * scale_out for extent in inputs.shape[-2:])
            whole = tile.new_zeros(*tile.shape[:-2], height, width)
        weight = tile_weight(row, overlap, halo, scale_out).unsqueeze(1) * tile_weight(
            column, overlap, halo, scale_out
        )
        whole[
            ...,
            row.start * scale_out : row.stop * scale_out,
            column.start * scale_out : column.stop * scale_out,
        ] += weight.to(tile) * tile
    assert whole is not None
    return whole, tuple(states)

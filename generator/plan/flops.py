"""FLOPs of the diffusion transformer in closed form: pure functions, equal to what torch counts.

A multiplication and an addition are two. Counted are matrix products, as `torch.utils.flop_counter` does; norms, rotations and
gates are passes over memory, not arithmetic that a peak in FLOP/s speaks of. Letters: d width, T latent frames, S positions
per frame, N = T * S tokens, L text tokens, r hidden width of an MLP over d, M slots of a temporal window.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from generator.blocks import window_edges
from generator.dit import DiTConfig

PLACE_FEATURES = 18
"""Inputs of the projection that tells a token its place (`generator.dit.place_features`)."""
BACKWARD_OF_LINEAR = 2.0
"""Backward over forward: the gradients of the input and of the weight."""
BACKWARD_OF_ATTENTION = 2.5
"""Backward over forward of a fused kernel: four products for q, k, v and the scores, and the scores computed again (2205.14135)."""


class LatentGrid(NamedTuple):
    """Latent positions of a clip: T frames of height x width."""

    frames: int
    height: int
    width: int

    @property
    def positions(self) -> int:
        """Per frame."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        return self.frames * self.positions


class Flops(NamedTuple):
    """Of one forward pass, by the kind of product."""

    linear: float = 0.0
    spatial_attention: float = 0.0
    temporal_attention: float = 0.0

    @property
    def attention(self) -> float:
        return self.spatial_attention + self.temporal_attention

    @property
    def total(self) -> float:
        return self.linear + self.attention

    def plus(self, other: Flops) -> Flops:
        return Flops(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def times(self, count: float) -> Flops:
        return Flops(*(count * value for value in self))


def attention_flops(width: int, queries: int, keys: int) -> float:
    """Scores and their product with the values, all heads together: 4 d * queries * keys."""
    return 4.0 * width * queries * keys


def layer_linear_flops(width: int, hidden: int, tokens: int) -> float:
    """QKV, output projection and a two-layer MLP: (8 + 4 r) d^2 per token."""
    return tokens * (8.0 * width**2 + 4.0 * width * hidden)


def spatial_layer_flops(
    config: DiTConfig, grid: LatentGrid, text_tokens: int, *, text_is_read_only: bool = False
) -> Flops:
    """A frame's positions and the text attend to each other; the text's linear layers run once, not per frame.

    Args:
        text_is_read_only: the text gives keys and values, asks nothing and is not updated (the last spatial layer).
    """
    width = config.width
    linear = layer_linear_flops(width, int(width * config.mlp_ratio), grid.tokens)
    keys = grid.positions + text_tokens
    if text_is_read_only:
        linear += 4.0 * width**2 * text_tokens
        queries = grid.positions
    else:
        hidden = int(width * config.text_mlp_ratio)
        linear += layer_linear_flops(width, hidden, text_tokens)
        queries = keys
    return Flops(linear, spatial_attention=grid.frames * attention_flops(width, queries, keys))


def full_layer_flops(
    config: DiTConfig, grid: LatentGrid, text_tokens: int, *, text_is_read_only: bool = False
) -> Flops:
    """The same layer where all tokens of the clip attend to each other: a spatial layer over one frame of T * S positions."""
    clip = LatentGrid(1, 1, grid.tokens)
    return spatial_layer_flops(config, clip, text_tokens, text_is_read_only=text_is_read_only)


def temporal_layer_flops(config: DiTConfig, grid: LatentGrid, *, shifted: bool) -> Flops:
    """Windows over all frames. Clipped windows are padded to the largest, and the padding is computed too, unless they are packed."""
    width = config.width
    window = config.window_for(grid.height, grid.width)
    rows = window_edges(grid.height, window[0], shifted)
    columns = window_edges(grid.width, window[1], shifted)
    sizes = [(y1 - y0) * (x1 - x0) for y0, y1 in rows for x0, x1 in columns]
    if config.attention == "sdpa":
        sizes = [max(sizes)] * len(sizes)
    return Flops(
        layer_linear_flops(width, int(width * config.mlp_ratio), grid.tokens),
        temporal_attention=math.fsum(
            attention_flops(width, grid.frames * size, grid.frames * size) for size in sizes
        ),
    )


def layers_flops(config: DiTConfig, grid: LatentGrid, text_tokens: int) -> Flops:
    """All spatial and temporal layers: what activation checkpointing computes twice."""
    if config.layers == "full":
        last = full_layer_flops(config, grid, text_tokens, text_is_read_only=True)
        others = full_layer_flops(config, grid, text_tokens).times(2 * config.num_pairs - 1)
        return others.plus(last)
    total = Flops()
    for pair in range(config.num_pairs):
        is_last = pair == config.num_pairs - 1
        total = total.plus(
            spatial_layer_flops(config, grid, text_tokens, text_is_read_only=is_last)
        ).plus(temporal_layer_flops(config, grid, shifted=pair % 2 == 1))
    return total


def edge_flops(config: DiTConfig, grid: LatentGrid, text_tokens: int) -> Flops:
    """Everything before and after the layers, for one clip: input, output, modulation."""
    width, channels = config.width, config.channels
    inputs = 2 * channels + 1 + (channels if config.low_res else 0) + PLACE_FEATURES
    per_position = 2.0 * width * (inputs + channels) * grid.tokens
    text = 2.0 * width * config.text_width * (text_tokens + 1)  # every token, and the pooled prompt
    per_frame = (2 * 2 + 2 * 6 + 2 * 2) * width**2  # sigma's MLP, vision's and output's modulation
    return Flops(per_position + text + per_frame * grid.frames + 12.0 * width**2)


def forward_flops(config: DiTConfig, grid: LatentGrid, text_tokens: int) -> Flops:
    """One denoiser evaluation of one clip."""
    return layers_flops(config, grid, text_tokens).plus(edge_flops(config, grid, text_tokens))


def full_attention_flops(config: DiTConfig, grid: LatentGrid, text_tokens: int) -> Flops:
    """One evaluation by a model of the same width and depth whose every layer attends to all tokens and the text."""
    layers = full_layer_flops(config, grid, text_tokens).times(2 * config.num_pairs)
    return layers.plus(edge_flops(config, grid, text_tokens))


def training_flops(
    config: DiTConfig, grid: LatentGrid, text_tokens: int, *, adapters_only: bool = False
) -> float:
    """Executed by forward and backward of one clip, recomputation included where `config.checkpointing` asks for it.

    Args:
        adapters_only: frozen layers have a gradient of their input only; the adapters' own products, a percent or two, are left out.
    """
    forward = forward_flops(config, grid, text_tokens)
    executed = forward.total
    of_linear = 1.0 if adapters_only else BACKWARD_OF_LINEAR
    executed += of_linear * forward.linear + BACKWARD_OF_ATTENTION * forward.attention
    if config.checkpointing:
        again = layers_flops(config, grid, text_tokens)
        executed += again.linear if config.checkpointing == "attention" else again.total
    return executed


def model_flops(
    config: DiTConfig, grid: LatentGrid, text_tokens: int, *, adapters_only: bool = False
) -> float:
    """What MFU counts of a training step: three forward passes per clip, whatever is recomputed (2204.02311, appendix B); two where
    frozen layers have no gradient of their weights."""
    return (2.0 if adapters_only else 3.0) * forward_flops(config, grid, text_tokens).total

"""Packed attention: sequences of unequal length one after another, without padding and without a mask.

What `scaled_dot_product_attention` computes over padded rows, computed over the tokens that exist: prompts of other lengths, frames
of other shots, windows clipped at the border. In bfloat16 on CUDA that is a flash kernel for sequences of unequal length (2307.08691);
elsewhere the very same packed sequences are padded here, so the packing is the same code on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

HAS_VARLEN = find_spec("torch.nn.attention.varlen") is not None
"""Older versions of torch have no such kernel."""
FLASH_HEAD_DIMS = 8
"""Flash kernels want a head's channels in multiples of this, and at most `FLASH_MAX_HEAD_DIM`."""
FLASH_MAX_HEAD_DIM = 256
FLASH_CAPABILITY = (8, 0)
"""Oldest CUDA devices that have them."""


@dataclass(frozen=True)
class Sequences:
    """Where each of N packed sequences begins."""

    edges: Tensor
    """int32 [N + 1]: sequence i holds the tokens edges[i] to edges[i + 1]."""
    longest: int

    @staticmethod
    def of(lengths: Tensor) -> Sequences:
        """lengths [N], none of them negative."""
        edges = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return Sequences(edges, int(lengths.max()))


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, of_queries: Sequences, of_keys: Sequences
) -> Tensor:
    """Attention of each sequence's queries to its own keys: q [Nq, heads, d] and k, v [Nk, heads, d] -> [Nq, heads, d].

    Every sequence that has queries has keys.
    """
    if has_flash(q):
        from torch.nn.attention.varlen import varlen_attn

        longest = of_queries.longest, of_keys.longest
        attended = varlen_attn(q, k, v, of_queries.edges, of_keys.edges, *longest)
        assert isinstance(attended, Tensor)
        return attended
    return padded_attention(q, k, v, of_queries, of_keys)


def has_flash(x: Tensor) -> bool:
    """Whether a flash kernel takes such a tensor [N, heads, d] here."""
    return (
        x.is_cuda
        and HAS_VARLEN
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.shape[-1] % FLASH_HEAD_DIMS == 0
        and x.shape[-1] <= FLASH_MAX_HEAD_DIM
        and _is_new_enough(x.device.index)
    )


@torch.compiler.assume_constant_result
def _is_new_enough(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index) >= FLASH_CAPABILITY


def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, of_queries: Sequences, of_keys: Sequences
) -> Tensor:
    """`packed_attention` where there is no kernel for it: every sequence padded to the longest, and the padding masked."""
    query_slots, key_slots = _slots(of_queries, len(q)), _slots(of_keys, len(k))

    def padded(x: Tensor, slots: Tensor, sequences: Sequences) -> Tensor:
        rows = (len(sequences.edges) - 1) * sequences.longest
        empty = x.new_zeros(rows, *x.shape[1:])
        filled = empty.index_copy(0, slots, x).unflatten(0, (-1, sequences.longest))
        return filled.transpose(1, 2)  # [N, heads, longest, d]

    lengths = of_keys.edges.diff()
    exists = torch.arange(of_keys.longest, device=q.device) < lengths[:, None]
    # a sequence without keys has no queries either: its rows are padding, and a softmax over nothing would be nan
    exists = exists | (lengths == 0)[:, None]
    attended = F.scaled_dot_product_attention(
        padded(q, query_slots, of_queries),
        padded(k, key_slots, of_keys),
        padded(v, key_slots, of_keys),
        attn_mask=exists[:, None, None, :],
    )
    return attended.transpose(1, 2).flatten(0, 1).index_select(0, query_slots)


def _slots(sequences: Sequences, tokens: int) -> Tensor:
    """Place of each packed token among padded rows, int64 [tokens]."""
    edges = sequences.edges.long()
    position = torch.arange(tokens, device=edges.device)
    number = torch.searchsorted(edges[1:].contiguous(), position, right=True)
    return number * sequences.longest + position - edges[number]


@dataclass(frozen=True)
class FramePacking:
    """Every frame of a batch as one sequence: the text tokens that it reads, then its positions."""

    tokens: Tensor
    """int64 [N]: which rows of the batch's text tokens [B * L] followed by its positions [B * T * S] the sequences hold."""
    sequences: Sequences
    """B * T of them."""
    frames: Sequences
    """The same number, of positions alone: their queries where the text asks nothing."""
    vision: Tensor
    """int64 [B * T * S]: where the positions are among the packed tokens."""
    text: Tensor
    """int64 [n]: where the text tokens are."""
    readings: Tensor
    """int64 [n]: of which frame's reading of which token each of them is the one, a row of [B * T * L]."""

    @staticmethod
    def of(reads: Tensor, num_frames: int, positions: int) -> FramePacking:
        """reads: which tokens each frame reads, [B, 1 or T, L] bool."""
        batch, _, length = reads.shape
        device = reads.device
        every = reads.expand(-1, num_frames, -1).flatten(0, 1)  # [B * T, L]
        exists = F.pad(every, (0, positions), value=True)
        row = torch.arange(batch * num_frames, device=device)[:, None]
        of_text = row // num_frames * length + torch.arange(length, device=device)
        of_vision = batch * length + row * positions + torch.arange(positions, device=device)
        packed_is_text = F.pad(torch.ones_like(every), (0, positions), value=False)[exists]
        return FramePacking(
            tokens=torch.cat((of_text, of_vision), dim=1)[exists],
            sequences=Sequences.of(exists.sum(1)),
            frames=Sequences.of(exists.new_full((len(every),), positions, dtype=torch.int64)),
            vision=(~packed_is_text).nonzero()[:, 0],
            text=packed_is_text.nonzero()[:, 0],
            readings=every.flatten().nonzero()[:, 0],
        )

    def attention(
        self,
        vision: tuple[Tensor, Tensor, Tensor],
        text: tuple[Tensor | None, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """q, k, v of the frames [B, T, heads, S, d] and of the text [B, heads, L, d] -> what frames and each frame's text get.

        Returns: [B, T, heads, S, d], and [B, T, heads, L, d] with zeros where a frame does not read; None where text has no queries.
        """
        batch, frames, _, positions, _ = vision[0].shape
        length = text[1].shape[2]

        def packed(of_text: Tensor, of_vision: Tensor) -> Tensor:
            rows = of_text.transpose(1, 2).flatten(0, 1), of_vision.transpose(2, 3).flatten(0, 2)
            return torch.cat(rows).index_select(0, self.tokens)

        keys, values = packed(text[1], vision[1]), packed(text[2], vision[2])
        if text[0] is None:
            queries = vision[0].transpose(2, 3).flatten(0, 2)
            of_vision = packed_attention(queries, keys, values, self.frames, self.sequences)
            readings = None
        else:
            queries = packed(text[0], vision[0])
            attended = packed_attention(queries, keys, values, self.sequences, self.sequences)
            of_vision = attended.index_select(0, self.vision)
            nothing = attended.new_zeros(batch * frames * length, *attended.shape[1:])
            readings = nothing.index_copy(0, self.readings, attended.index_select(0, self.text))
            readings = readings.unflatten(0, (batch, frames, length)).transpose(2, 3)
        return of_vision.unflatten(0, (batch, frames, positions)).transpose(2, 3), readings


@dataclass(frozen=True)
class WindowPacking:
    """Windows over the positions of a clip, each as one sequence of just the positions it holds."""

    tokens: Tensor
    """int64 [N]: the positions of one window after another, each once."""
    sequences: Sequences
    """The windows of a whole batch."""

    @staticmethod
    def of(members: Tensor, valid: Tensor, batch: int) -> WindowPacking:
        """From the padded windows of `generator.blocks.window_map`."""
        return WindowPacking(members[valid], Sequences.of(valid.sum(1).repeat(batch)))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention inside each window: q, k, v [B, heads, N, d] -> the same."""

        def packed(x: Tensor) -> Tensor:
            return x.transpose(1, 2).index_select(1, self.tokens).flatten(0, 1)

        attended = packed_attention(packed(q), packed(k), packed(v), self.sequences, self.sequences)
        attended = attended.unflatten(
            0, (len(q), -1)
        )  # [B, N, heads, d], in the order of the windows
        whole = torch.empty_like(attended).index_copy(1, self.tokens, attended)
        return whole.transpose(1, 2)

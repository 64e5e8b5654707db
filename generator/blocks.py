"""The two kinds of layer of the diffusion transformer (Seedance 1.0, 2506.09113, section 2.2).

`SpatialBlock`: joint attention of each frame with the text (MMDiT: separate modulation, QKV and MLP per modality).
`TemporalBlock`: vision only, attention over all frames inside small spatial windows.
Modulation is AdaLN-single (PixArt 2310.00426): one shared projection of the conditioning vector, plus a learned table
per layer. Queries and keys are RMS-normalised per head, then rotated.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generator.packed import FramePacking, WindowPacking
from generator.rope import apply_rope

if TYPE_CHECKING:
    from generator.parallel import FrameShards


class Mlp(nn.Module):
    """Two linear layers with a tanh-GELU between."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, int(width * ratio))
        self.down = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class HeadProjection(nn.Module):
    """QKV with per-head RMS norm of queries and keys, and the output projection, of one modality."""

    def __init__(self, width: int, num_heads: int, *, read_only: bool = False) -> None:
        """`read_only`: keys and values, no queries and no output."""
        super().__init__()
        self.num_heads = num_heads
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.norm_k = nn.RMSNorm(width // num_heads, eps=1e-6)
        self.q = None if read_only else nn.Linear(width, width, bias=False)
        self.norm_q = None if read_only else nn.RMSNorm(width // num_heads, eps=1e-6)
        self.out = None if read_only else nn.Linear(width, width)

    def heads(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """x [..., N, width] -> q, k, v each [..., heads, N, head_dim]; q is None where there are no queries."""
        k, v = (self._split(part) for part in self.kv(x).chunk(2, dim=-1))
        q = None if self.q is None else self.norm_q(self._split(self.q(x)))
        return q, self.norm_k(k), v

    def join(self, x: Tensor) -> Tensor:
        """[..., heads, N, head_dim] -> [..., N, width]."""
        return self.out(x.transpose(-2, -3).flatten(-2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)


class Modulation(nn.Module):
    """A layer's own table on top of the shared modulation: (shift, scale, gate) for attention, then for the MLP."""

    def __init__(self, width: int, num_vectors: int = 6) -> None:
        super().__init__()
        table = torch.zeros(num_vectors, width)
        table[2::3] = 1.0  # gates start open: every layer learns from the first step
        self.table = nn.Parameter(table)

    def forward(self, shared: Tensor) -> tuple[Tensor, ...]:
        """shared [..., N, 6, width], N = 1 for all tokens alike -> the tensors [..., N, width]."""
        return (shared[..., : len(self.table), :] + self.table).unbind(-2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters, then shift and scale."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class SpatialBlock(nn.Module):
    """Attention within each frame, jointly with the text of its shot.

    The text is computed once per layer and its outputs are averaged over the shot's frames (as SeedVR does over windows).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        text_mlp_ratio: float,
        *,
        text_is_read_only: bool = False,
        over_clip: bool = False,
    ) -> None:
        """
        Args:
            text_is_read_only: the last layer's text has no reader, so it gives keys and values and is not updated.
            over_clip: full attention in place of attention within each frame: all positions of the clip and all of its text.
        """
        super().__init__()
        self.text_is_read_only = text_is_read_only
        self.over_clip = over_clip
        self.vision_modulation = Modulation(width)
        self.vision_attention = HeadProjection(width, num_heads)
        self.vision_mlp = Mlp(width, mlp_ratio)
        self.text_modulation = Modulation(width, 2 if text_is_read_only else 6)
        self.text_attention = HeadProjection(width, num_heads, read_only=text_is_read_only)
        self.text_mlp = None if text_is_read_only else Mlp(width, text_mlp_ratio)

    def forward(
        self,
        vision: Tensor,
        text: Tensor,
        vision_shared: Tensor,
        text_shared: Tensor,
        vision_angles: Tensor,
        text_angles: Tensor,
        text_mask: Tensor,
        text_share: Tensor | None = None,
        shards: FrameShards | None = None,
        packing: FramePacking | None = None,
    ) -> tuple[Tensor, Tensor]:
        """vision [B, T, S, width] and text [B, L, width] -> the same shapes.

        Args:
            vision_shared [B, T, 1, 6, width], text_shared [B, 1 or L, 6, width]: modulation shared by all layers.
            vision_angles [B, T, S, A], text_angles [L, A] or [B, 1, L, A]: rotary angles.
            text_mask: [B, 1 or T, L], True where a frame reads the token.
            text_share: [B, T, L], how much each frame counts in a token's output; None is the mean over all frames.
            shards: where T is only this process's part of the clip's frames.
            packing: of `text_mask`, to attend without padding; None pads and masks.
        """
        v_shift, v_scale, v_gate, v_shift2, v_scale2, v_gate2 = self.vision_modulation(
            vision_shared
        )
        t_shift, t_scale, *t_rest = self.text_modulation(text_shared)

        # queries, keys and values: [B, T, heads, S, d] of the frames, [B, heads, L, d] of the text
        vq, vk, vv = self.vision_attention.heads(modulate(vision, v_shift, v_scale))
        tq, tk, tv = self.text_attention.heads(modulate(text, t_shift, t_scale))
        vq, vk = (apply_rope(x, vision_angles.unsqueeze(2)) for x in (vq, vk))
        tk = apply_rope(tk, text_angles)

        tq = None if tq is None else apply_rope(tq, text_angles)
        of_frames, of_tokens = (vq, vk, vv), (tq, tk, tv)
        if not self.over_clip:
            of_vision, of_text = joint_attention(of_frames, of_tokens, text_mask, packing)
        elif shards is None:
            of_vision, of_text = clip_attention(of_frames, of_tokens, text_mask, packing)
        else:
            attend = partial(clip_attention, text_mask=text_mask, packing=packing)
            of_vision, of_text = shards.head_attention(of_frames, of_tokens, attend)
        vision = vision + v_gate * self.vision_attention.join(of_vision)
        vision = vision + v_gate2 * self.vision_mlp(modulate(vision, v_shift2, v_scale2))
        if self.text_mlp is None:
            return vision, text
        t_gate, t_shift2, t_scale2, t_gate2 = t_rest
        assert of_text is not None  # [B, T, heads, L, d]
        if text_share is not None:
            of_text = (of_text * text_share[:, :, None, :, None].to(of_text)).sum(dim=1)
            of_text = of_text if shards is None else shards.processes.sum(of_text)
        elif shards is None or self.over_clip:
            of_text = of_text.mean(dim=1)
        else:
            of_text = shards.mean(of_text)
        text = text + t_gate * self.text_attention.join(of_text)
        text = text + t_gate2 * self.text_mlp(modulate(text, t_shift2, t_scale2))
        return vision, text


Vision = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values of the frames, each [B, T, heads, S, d]."""
Text = tuple[Tensor | None, Tensor, Tensor]
"""Those of the text, [B, heads, L, d]; it may ask nothing."""


def clip_attention(
    vision: Vision, text: Text, text_mask: Tensor, packing: FramePacking | None
) -> tuple[Tensor, Tensor | None]:
    """`joint_attention` of a whole clip as one frame; the text's result is [B, 1, heads, L, d]."""
    frames = vision[0].shape[1]
    q, k, v = (x.transpose(1, 2).flatten(2, 3).unsqueeze(1) for x in vision)  # [B, 1, heads, N, d]
    of_vision, of_text = joint_attention((q, k, v), text, text_mask, packing)
    return of_vision.squeeze(1).unflatten(2, (frames, -1)).transpose(1, 2), of_text


def joint_attention(
    vision: Vision, text: Text, text_mask: Tensor, packing: FramePacking | None
) -> tuple[Tensor, Tensor | None]:
    """Attention of every frame with the text that it reads, packed or padded and masked; results as of `FramePacking.attention`."""
    if packing is not None:
        return packing.attention(vision, text)
    (vq, vk, vv), (tq, tk, tv) = vision, text
    batch, frames, _, positions, _ = vq.shape

    # every frame sees the text: [B * T, heads, L + S, d]
    def beside(of_text: Tensor, of_vision: Tensor) -> Tensor:
        repeated = of_text.unsqueeze(1).expand(-1, frames, -1, -1, -1)
        return torch.cat((repeated, of_vision), dim=3).flatten(0, 1)

    queries = vq.flatten(0, 1) if tq is None else beside(tq, vq)
    mask = F.pad(text_mask, (0, positions), value=True)[:, :, None, None, :]
    mask = mask.expand(-1, frames, -1, -1, -1).flatten(0, 1)  # [B * T, 1, 1, L + S]
    attended = F.scaled_dot_product_attention(
        queries, beside(tk, vk), beside(tv, vv), attn_mask=mask
    ).unflatten(0, (batch, frames))
    of_text = None if tq is None else attended[:, :, :, : tk.shape[2]]
    return attended[:, :, :, -positions:], of_text


def window_edges(size: int, window: int, shifted: bool) -> list[tuple[int, int]]:
    """Half-open intervals that tile [0, size): windows of `window`, or moved by half of one and clipped at both ends."""
    offset = window // 2 if shifted else 0
    starts = range(-offset, size, window)
    return [(max(start, 0), min(start + window, size)) for start in starts]


@lru_cache(maxsize=64)
def window_map(
    num_frames: int,
    height: int,
    width: int,
    window: tuple[int, int],
    shifted: bool,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Index maps between positions and windows that span all frames.

    Returns:
        members: flat position of each window slot, [W, M] int64 (padding repeats position 0).
        valid: False where a slot is padding, [W, M] bool.
        slots: flat slot of each position, [T * h * w] int64: `windows.flatten(0, 1)[slots]` undoes the gather.
    """
    grid = torch.arange(num_frames * height * width).view(num_frames, height, width)
    windows = [
        grid[:, y0:y1, x0:x1].reshape(-1)
        for y0, y1 in window_edges(height, window[0], shifted)
        for x0, x1 in window_edges(width, window[1], shifted)
    ]
    longest = max(len(members) for members in windows)
    members = torch.zeros(len(windows), longest, dtype=torch.int64)
    valid = torch.zeros(len(windows), longest, dtype=torch.bool)
    slots = torch.empty(grid.numel(), dtype=torch.int64)
    for row, positions in enumerate(windows):
        members[row, : len(positions)] = positions
        valid[row, : len(positions)] = True
        slots[positions] = row * longest + torch.arange(len(positions))
    return members.to(device), valid.to(device), slots.to(device)


@lru_cache(maxsize=64)
def window_packing(batch: int, *of: Any) -> WindowPacking:
    """The windows of so many clips without their padding; `of`: what `window_map` takes."""
    members, valid, _ = window_map(*of)
    return WindowPacking.of(members, valid, batch)


class TemporalBlock(nn.Module):
    """Vision only: attention over all frames inside windows of each frame.

    Odd layers are given windows moved by half, clipped at the border instead of rolled round it (SeedVR 2501.01320).
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.modulation = Modulation(width)
        self.attention = HeadProjection(width, num_heads)
        self.mlp = Mlp(width, mlp_ratio)

    def forward(
        self,
        vision: Tensor,
        shared: Tensor,
        grid_angles: Tensor,
        members: Tensor,
        valid: Tensor,
        slots: Tensor,
        shards: FrameShards | None = None,
        packing: WindowPacking | None = None,
    ) -> Tensor:
        """vision [B, T, S, width] -> the same shape.

        Args:
            shared: modulation shared by all layers, [B, T, 1, 6, width].
            grid_angles: rotary angles of the positions of these frames, [N, A] or [B, 1, N, A].
            members, valid, slots: `window_map` of this layer's windows; with `shards`, of a single frame.
            shards: where T is only this process's part of the clip's frames; the others' are attended to all the same.
            packing: of the windows, to attend without padding; not with `shards`.
        """
        batch = len(vision)
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(shared)
        q, k, v = self.attention.heads(modulate(vision, shift, scale).flatten(1, 2))
        # grid ids serve as window coordinates: attention sees their differences only
        q, k = (apply_rope(x, grid_angles) for x in (q, k))  # [B, heads, N, d]

        def windows(x: Tensor) -> Tensor:
            """[B, heads, N, d] -> [B * heads, W, M, d]."""
            return x.flatten(0, 1).index_select(1, members.flatten()).unflatten(1, members.shape)

        if packing is not None:
            back = packing.attention(q, k, v)
        elif shards is None:
            attended = F.scaled_dot_product_attention(
                windows(q), windows(k), windows(v), attn_mask=valid[None, :, None, :]
            )
            back = attended.flatten(1, 2).index_select(1, slots).unflatten(0, (batch, -1))
        else:
            back = shards.window_attention(q, k, v, members, valid, slots)
        vision = vision + gate * self.attention.join(back).view_as(vision)
        return vision + gate2 * self.mlp(modulate(vision, shift2, scale2))

"""Sequence parallelism for long clips: several processes share one clip's tokens (DSP, 2403.10266).

Where layers are factorised, each kind is cut along the axis that it does not mix: in spatial layers a process holds some frames, in
temporal layers some windows, and one all-to-all lies between. In layers of full attention it holds some heads (DeepSpeed-Ulysses). Frames and windows that do not divide are padded, and the padding is
never attended to. Everything before the layers and after them is computed by every process for the whole clip.

The collectives are differentiable for the sum of all processes' losses. Where every process computes the same loss, as here, the
sum is `size` times that loss, and the mean of the processes' gradients, which is what DeepSpeed takes, is the gradient of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from reelhf.errors import UserError


class _AllToAll(torch.autograd.Function):
    """Row r of the result comes from process r, which sent it as its row of ours; its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        distributed.all_to_all_single(result, x.contiguous(), group=group)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _AllToAll.apply(gradients[0], ctx.group), None


class _AllReduce(torch.autograd.Function):
    """The sum over processes, on every process; its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.contiguous().clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _AllReduce.apply(gradients[0], ctx.group), None


@dataclass(frozen=True)
class SequenceGroup:
    """The processes that share a clip."""

    group: Any
    """torch's process group; None is all processes."""
    size: int
    rank: int
    """This process's place among them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceGroup:
        return self  # a copy of a network shares its clips with the same processes

    def all_to_all(self, x: Tensor) -> Tensor:
        """x [size, ...]: row r goes to process r, and the rows that came back are by sender."""
        return _AllToAll.apply(x, self.group)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the processes."""
        return _AllReduce.apply(x, self.group)

    def gather(self, x: Tensor) -> Tensor:
        """Every process's x, [size, ...]: an all-to-all of copies, so that the backward pass sums what each process did with ours."""
        return self.all_to_all(x.expand(self.size, *x.shape))


def sequence_group(size: int) -> SequenceGroup | None:
    """This process's group of `size` consecutive processes, None for 1; every process calls it once.

    Raises: UserError when the processes do not divide into such groups.
    """
    if size == 1:
        return None
    processes = distributed.get_world_size()
    if processes % size:
        raise UserError(
            f"sequence_parallel {size} does not divide the {processes} processes; start a multiple of {size}"
        )
    me, own = distributed.get_rank(), None
    for first in range(0, processes, size):  # every process makes every group
        group = distributed.new_group(list(range(first, first + size)))
        if first <= me < first + size:
            own = SequenceGroup(group, size, me - first)
    assert own is not None
    return own


@dataclass(frozen=True)
class FrameShards:
    """One clip's `num_frames` latent frames over a group: `per_process` consecutive ones each, the last ones padded."""

    processes: SequenceGroup
    num_frames: int

    @property
    def per_process(self) -> int:
        return -(-self.num_frames // self.processes.size)

    def local(self, x: Tensor, dim: int) -> Tensor:
        """This process's frames of x, whose axis `dim` counts frames; zeros where there are none."""
        start = self.processes.rank * self.per_process
        held = max(0, min(self.per_process, self.num_frames - start))
        part = x.narrow(dim, min(start, self.num_frames), held)
        return _pad(part, dim, self.per_process)

    def whole(self, x: Tensor) -> Tensor:
        """All frames of a clip from each process's, [B, per_process, ...] -> [B, num_frames, ...]."""
        return self.processes.gather(x).transpose(0, 1).flatten(1, 2)[:, : self.num_frames]

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the clip's frames of x [B, per_process, ...], padding left out."""
        start = self.processes.rank * self.per_process
        held = max(0, min(self.per_process, self.num_frames - start))
        return self.processes.sum(x[:, :held].sum(dim=1)) / self.num_frames

    def head_attention(
        self,
        vision: tuple[Tensor, Tensor, Tensor],
        text: tuple[Tensor | None, Tensor, Tensor],
        attend: Callable[..., tuple[Tensor, Tensor | None]],
    ) -> tuple[Tensor, Tensor | None]:
        """Full attention over the clip (DeepSpeed-Ulysses, 2309.14509): from a part of the frames to a part of the heads, and back.

        Args:
            vision: q, k, v of this process's frames, [B, per_process, heads, S, d].
            text: q (or None), k, v of the text, the same on every process, [B, heads, L, d].
            attend: what to compute of all frames and the text with some of the heads.
        Returns: of this process's frames, and of the text [B, 1, heads, L, d], with all heads.
        """
        processes, frames = self.processes, self.per_process
        # 1. [3, B, t, heads, S, d] -> [r, 3, B, t, heads / P, S, d] -> all frames of our heads.
        x = torch.stack(vision).unflatten(3, (processes.size, -1)).movedim(3, 0)
        x = processes.all_to_all(x).movedim(0, 2).flatten(2, 3)[:, :, : self.num_frames]
        own = [
            None if part is None else part.chunk(processes.size, dim=1)[processes.rank]
            for part in text
        ]

        # 2. Attention of our heads.
        of_vision, of_text = attend(tuple(x.unbind(0)), tuple(own))

        # 3. And back to all heads of our frames.
        y = _pad(of_vision, 1, frames * processes.size).unflatten(1, (processes.size, frames))
        y = processes.all_to_all(y.movedim(1, 0)).movedim(0, 2).flatten(2, 3)
        if of_text is None:
            return y, None
        return y, processes.gather(of_text).movedim(0, 2).flatten(2, 3)

    def window_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        members: Tensor,
        valid: Tensor,
        slots: Tensor,
    ) -> Tensor:
        """What `TemporalBlock` computes, of this process's frames: q, k, v and the result are [B, heads, per_process * h * w, d].

        Args:
            members, valid, slots: `window_map` of a single frame.
        """
        processes, frames = self.processes, self.per_process
        count, slots_each = members.shape
        padded = -(-count // processes.size) * processes.size
        here = slice(
            processes.rank * padded // processes.size,
            (processes.rank + 1) * padded // processes.size,
        )
        # a window that only pads attends to itself: its result is dropped, and a softmax over nothing would be nan
        mask = F.pad(valid, (0, 0, 0, padded - count), value=True)[here]  # [W', M]
        members = F.pad(members, (0, 0, 0, padded - count))

        # 1. From frames to windows: [3, B, heads, t, W, M, d] -> [r, 3, B, heads, t, W', M, d] -> all frames of our windows.
        x = torch.stack((q, k, v)).unflatten(3, (frames, -1))
        x = x.index_select(4, members.flatten()).unflatten(4, members.shape)
        x = processes.all_to_all(x.unflatten(4, (processes.size, -1)).movedim(4, 0))
        x = x.movedim(0, 3).flatten(3, 4)[:, :, :, : self.num_frames]  # [3, B, heads, T, W', M, d]

        # 2. Attention inside each window over all frames.
        q, k, v = x.movedim(4, 3).flatten(4, 5).unbind(0)  # [B, heads, W', T * M, d]
        mask = mask[:, None, :].expand(-1, self.num_frames, -1).flatten(1)  # [W', T * M]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, :])

        # 3. And back to frames, without padding.
        y = attended.unflatten(3, (self.num_frames, slots_each)).movedim(
            3, 2
        )  # [B, heads, T, W', M, d]
        y = _pad(y, 2, frames * processes.size).unflatten(2, (processes.size, frames))
        y = processes.all_to_all(y.movedim(2, 0))  # [r, B, heads, t, W', M, d]
        y = y.movedim(0, 3).flatten(3, 5)  # [B, heads, t, W * M, d]
        return y.index_select(3, slots).flatten(2, 3)


def _pad(x: Tensor, dim: int, length: int) -> Tensor:
    """Zeros after the end of an axis up to a length."""
    missing = length - x.shape[dim]
    if not missing:
        return x
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing))

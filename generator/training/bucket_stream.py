"""Batches of buckets from disk: which windows share a micro-batch, who computes it, and what is read ahead.

Everything is a function of the seed and the step, so a run goes on exactly where it stopped, and a step's micro-batches are the
same on any number of processes that divides them; only who computes which of them differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from generator.data.buckets import Bucket
from generator.data.packing import RuntimeTable, deal
from generator.data.store import LatentStore, Window
from generator.training.latents import Batch, Draws
from generator.training.stages import CaptionMixConfig
from reelhf.engine import device, rank, world_size
from reelhf.errors import UserError
from reelhf.training import position_seed

EPOCHS_BETWEEN = 1_000_003
"""Separates the epochs of one shuffled list from those of another."""


@dataclass(frozen=True)
class Planned:
    """One micro-batch before it is read."""

    bucket: Bucket
    rows: tuple[int, ...]
    """Windows of the stage."""
    as_images: bool
    position: int
    """Of its first sample in the stream."""


class BucketEpochs:
    """Which windows share the micro-batch at a position: every epoch holds all windows once, each time in another order.

    Args:
        groups: rows of each bucket; sizes: samples per micro-batch of each. The last micro-batch of a bucket may be smaller.
        stream: separates the order from that of other lists.
    """

    def __init__(
        self,
        groups: Mapping[Bucket, Sequence[int]],
        sizes: Mapping[Bucket, int],
        seed: int,
        stream: int,
    ) -> None:
        self.groups, self.sizes, self.seed, self.stream = groups, sizes, seed, stream
        self.per_epoch = sum(math.ceil(len(rows) / sizes[b]) for b, rows in groups.items())
        self._epoch: tuple[int, list[tuple[Bucket, tuple[int, ...]]]] | None = None

    def __getitem__(self, position: int) -> tuple[Bucket, tuple[int, ...]]:
        epoch, offset = divmod(position, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._shuffled(epoch)
        return self._epoch[1][offset]

    def _shuffled(self, epoch: int) -> list[tuple[Bucket, tuple[int, ...]]]:
        generator = torch.Generator().manual_seed(
            position_seed(self.seed, self.stream * EPOCHS_BETWEEN + epoch)
        )
        parts = []
        for bucket in sorted(self.groups):
            rows, size = self.groups[bucket], self.sizes[bucket]
            order = torch.randperm(len(rows), generator=generator).tolist()
            for first in range(0, len(rows), size):
                parts.append((bucket, tuple(rows[i] for i in order[first : first + size])))
        return [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]


def images_before(position: int, share: float) -> int:
    """How many of the first `position` micro-batches are images: as near to the share as whole numbers come, at every position."""
    return math.floor(position * share + 1e-9)


def image_groups(windows: Sequence[Window]) -> dict[Bucket, list[int]]:
    """Pictures by size; first frames of clips where there is no picture at all."""
    pictures = [row for row, window in enumerate(windows) if window.num_frames == 1]
    groups: dict[Bucket, list[int]] = {}
    for row in pictures or range(len(windows)):
        window = windows[row]
        groups.setdefault(Bucket(1, window.height, window.width), []).append(row)
    return groups


def video_groups(windows: Sequence[Window]) -> dict[Bucket, list[int]]:
    """Clips of more than one frame by bucket."""
    groups: dict[Bucket, list[int]] = {}
    for row, window in enumerate(windows):
        if window.num_frames > 1:
            groups.setdefault(window.bucket, []).append(row)
    return groups


class BucketStream:
    """One stage's micro-batches.

    Args:
        windows: what the stage trains on.
        sizes, table: samples per micro-batch and cost of a sample, of each bucket and of its single frames.
        micro_batches: per step, over all processes.
        number: of the stage in its run, which separates its order from others'.
        first_position: of its first sample in the run's stream of samples.
        ratio: frames per latent frame.
        low_res: of a refiner, the key of its inputs (`generator.data.low_res`).
        sharing: consecutive processes that share each clip and so compute the same micro-batches.
    Raises: UserError when the processes do not divide the micro-batches, or a share of the tasks has no clips.
    """

    def __init__(
        self,
        store: LatentStore,
        windows: Sequence[Window],
        draws: Draws,
        captions: CaptionMixConfig,
        *,
        sizes: Mapping[Bucket, int],
        table: RuntimeTable,
        micro_batches: int,
        number: int,
        first_position: int,
        name: str,
        ratio: int = 4,
        low_res: str | None = None,
        sharing: int = 1,
    ) -> None:
        self.num_groups, rest = divmod(world_size(), sharing)
        if rest:
            raise UserError(
                f"sequence_parallel {sharing} does not divide the {world_size()} processes"
            )
        if micro_batches % self.num_groups:
            shared = f" of which {sharing} share each clip" * (sharing > 1)
            raise UserError(
                f"micro_batches {micro_batches} cannot be split over {world_size()} processes{shared}; "
                f"use a multiple of {self.num_groups}"
            )
        self.own_group = rank() // sharing
        self.store, self.windows, self.draws, self.captions = store, windows, draws, captions
        self.table, self.per_step, self.first_position = table, micro_batches, first_position
        self.stride, self.ratio, self.low_res = max(sizes.values()), ratio, low_res
        videos, images = video_groups(windows), image_groups(windows)
        self.image_share = draws.tasks.text_to_image
        if not videos and self.image_share < 1:
            raise UserError(
                f"stage {name} has pictures only; set its tasks.text_to_image to 1, or give it clips"
            )
        self._videos = BucketEpochs(videos, sizes, draws.seed, 2 * number)
        self._images = BucketEpochs(images, sizes, draws.seed, 2 * number + 1)
        self._reader = ThreadPoolExecutor(1)
        self._ahead: dict[int, Future[list[Batch]]] = {}

    def planned(self, step: int) -> list[Planned]:
        """A step's micro-batches over all processes."""
        plans = []
        for number in range(step * self.per_step, (step + 1) * self.per_step):
            images = images_before(number, self.image_share)
            as_images = images_before(number + 1, self.image_share) > images
            bucket, rows = self._images[images] if as_images else self._videos[number - images]
            plans.append(
                Planned(bucket, rows, as_images, self.first_position + number * self.stride)
            )
        return plans

    def shares(self, plans: Sequence[Planned]) -> list[list[int]]:
        """Which of a step's micro-batches each process (or group that shares clips) computes: loads as equal as can be."""
        return deal([len(plan.rows) * self.table[plan.bucket] for plan in plans], self.num_groups)

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches of a step; the next step's are read meanwhile."""
        ready = self._ahead.pop(step, None) or self._reader.submit(self._read, step)
        self._ahead = {step + 1: self._reader.submit(self._read, step + 1)}
        for batch in ready.result():
            yield batch.to(device())

    def _read(self, step: int) -> list[Batch]:
        plans = self.planned(step)
        total = sum(len(plan.rows) for plan in plans)
        return [self._batch(plans[index], total) for index in self.shares(plans)[self.own_group]]

    def _batch(self, plan: Planned, total: int) -> Batch:
        windows = [self.windows[row] for row in plan.rows]
        clean = torch.stack([self.store.latents(window) for window in windows])
        low_res = None
        if self.low_res is not None:
            low_res = torch.stack([self.store.low_res(window, self.low_res) for window in windows])
        if plan.as_images:  # the VAE is causal: the first latent frame is the image's own latent
            clean = clean[:, :, :1]
            low_res = None if low_res is None else low_res[:, :, :1]
        positions = range(plan.position, plan.position + len(windows))
        _, uniforms = self.draws.uniforms(positions, 1.0)
        texts = [
            window.captions.get(self.captions.pick(u), window.captions["caption"])
            for window, u in zip(windows, uniforms[:, 2].tolist(), strict=True)
        ]
        lengths = [window.num_frames for window in windows]
        return self.draws.batch(
            clean,
            self.store.condition(texts, lengths, self.ratio),
            positions,
            [str(window) for window in windows],
            texts,
            lengths,
            as_images=plan.as_images,
            samples_of_step=total,
            low_res=low_res,
            weight=len(windows) * self.per_step / total,
        )

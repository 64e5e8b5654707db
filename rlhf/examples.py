"""What a training step reads: prompts in a seeded order, one seed per clip, and everything that can be encoded beforehand.

Every draw belongs to (seed, purpose, step, position in the global batch), never to a process: a clip is the same on 1 or N
processes and in a run that was killed and started again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from generator.base import Condition, Task
from generator.flow import add_noise, flow_matching_loss
from generator.sampling import noise_like, sample_frames
from reelhf.engine import barrier, device, is_main, rank, world_size
from reelhf.errors import UserError

if TYPE_CHECKING:
    from generator.base import VideoBackbone
    from rewards import CompositeReward

ENCODE_BATCH = 32
"""Prompts or clips per call while everything that does not change is encoded once, before training."""
MAX_REAL_WINDOWS = 512
"""Windows of real clips kept as latents for the flow-matching term."""
ANCHOR_STREAM, REAL_STREAM = 900_001, 900_002
"""Noise streams of a clip's seed that no sampler step uses."""


def draw_seed(seed: int, purpose: str, step: int, index: int = 0) -> int:
    """A 63-bit seed for one draw; unrelated for any change of its arguments."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def prompt_rows(cursor: int, count: int, num_prompts: int, seed: int) -> list[int]:
    """Rows of the prompt list for positions cursor .. cursor + count - 1; every epoch is a new seeded permutation."""
    orders: dict[int, list[int]] = {}
    rows = []
    for position in range(cursor, cursor + count):
        epoch, offset = divmod(position, num_prompts)
        if epoch not in orders:
            shuffle = torch.Generator().manual_seed(draw_seed(seed, "epoch", epoch))
            orders[epoch] = torch.randperm(num_prompts, generator=shuffle).tolist()
        rows.append(orders[epoch][offset])
    return rows


def local_part(items: Sequence[Any]) -> list[Any]:
    """This process's contiguous slice of a global batch, whose length is a multiple of the number of processes."""
    per_rank = len(items) // world_size()
    return list(items[rank() * per_rank : (rank() + 1) * per_rank])


@dataclass(frozen=True)
class ClipNoise:
    """The standard normal noise of some clips: `noise(stream)` is [B, C, T, h, w] and depends on each clip's seed only.

    Stream 0 is the starting point, i + 1 the sampler's fresh noise after step i.
    """

    seeds: tuple[int, ...]
    shape: tuple[int, ...]

    def __call__(self, stream: int) -> Tensor:
        return noise_like(self.seeds, self.shape, stream=stream).to(device())

    def generators(self, purpose: str) -> list[torch.Generator]:
        """One generator per clip for draws other than noise."""
        return [torch.Generator().manual_seed(draw_seed(seed, purpose, 0)) for seed in self.seeds]


@dataclass(frozen=True)
class Examples:
    """Prompts with everything about them that training does not change, encoded once."""

    prompts: tuple[str, ...]
    condition: Condition
    task: Task
    reward_prompts: list[Any]
    judge_prompts: list[Any]
    low_res: Tensor | None
    """Refiner: the low-resolution clips, [N, 3, F, h, w] float in [0, 1]."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return tuple(self.task.condition_latents.shape[1:])

    def take(self, rows: Sequence[int]) -> Examples:
        rows = list(rows)
        return Examples(
            tuple(self.prompts[row] for row in rows),
            self.condition[rows],
            self.task[rows],
            [self.reward_prompts[row] for row in rows],
            [self.judge_prompts[row] for row in rows],
            None if self.low_res is None else self.low_res[rows],
        )

    def noise(self, seeds: Sequence[int]) -> ClipNoise:
        """The noise of these clips, one seed each."""
        assert len(seeds) == len(self)
        return ClipNoise(tuple(seeds), self.latent_shape)


@torch.no_grad()
def prepare_examples(
    backbone: VideoBackbone,
    reward: CompositeReward,
    judge: CompositeReward,
    prompts: Sequence[str],
    low_res: Tensor | None,
) -> Examples:
    """Encode prompts for the generator and both rewards, and a refiner's low-resolution clips [N, 3, F, h, w]."""
    num_frames, height, width = backbone.frame_shape
    parts = _slices(len(prompts))
    if low_res is None:
        task = backbone.text_to_video_task(len(prompts), num_frames, height, width)
    else:
        task = Task.cat([backbone.low_res_task(low_res[part], height, width) for part in parts])
        low_res = low_res.to(device())
    return Examples(
        tuple(prompts),
        Condition.cat([backbone.encode_prompts(prompts[part]) for part in parts]).to(device()),
        task.to(device()),
        reward.encode_prompts(prompts),
        judge.encode_prompts(prompts),
        low_res,
    )


def low_res_clips(
    base: VideoBackbone, prompts: Sequence[str], seeds: Sequence[int], path: Path
) -> Tensor:
    """The base's clips [N, 3, F, h, w] in [0, 1] at 8 bits per channel, as a video file has them.

    The first process samples them and keeps them in `path`; a resumed run and the other processes read that file.
    """
    from safetensors.torch import load_file, save_file

    if is_main() and not path.exists():
        clips = sample_frames(base, prompts, seeds, batch_size=ENCODE_BATCH)
        aside = path.with_suffix(".partial")
        save_file({"frames": (clips * 255).round().to(torch.uint8)}, aside)
        os.replace(aside, path)
    barrier()
    frames = load_file(path)["frames"]
    if len(frames) != len(prompts):
        raise UserError(
            f"{path} holds {len(frames)} clips and this run needs {len(prompts)}: it belongs to another run; "
            "delete it or choose another folder"
        )
    return frames.float() / 255


def training_examples(
    backbone: VideoBackbone,
    reward: CompositeReward,
    judge: CompositeReward,
    prompts: Sequence[str],
    base: VideoBackbone | None,
    *,
    seed: int,
    num_low_res_clips: int,
    cache: Path,
) -> Examples:
    """The training prompts; for a refiner, `num_low_res_clips` of them (in turn) with a low-resolution clip each, kept in `cache`."""
    if base is None:
        return prepare_examples(backbone, reward, judge, prompts, None)
    prompts = [prompts[index % len(prompts)] for index in range(num_low_res_clips)]
    seeds = [draw_seed(seed, "low_res/train", 0, i) for i in range(len(prompts))]
    low_res = low_res_clips(base, prompts, seeds, cache / "low_res_train.safetensors")
    return prepare_examples(backbone, reward, judge, prompts, low_res)


def validation_examples(
    backbone: VideoBackbone,
    reward: CompositeReward,
    judge: CompositeReward,
    prompts: Sequence[str],
    base: VideoBackbone | None,
    *,
    seed: int,
    cache: Path,
) -> Examples:
    """The validation prompts; for a refiner, each with one low-resolution clip, kept in `cache`."""
    low_res = None
    if base is not None:
        seeds = [draw_seed(seed, "low_res/validation", 0, i) for i in range(len(prompts))]
        low_res = low_res_clips(base, prompts, seeds, cache / "low_res_validation.safetensors")
    return prepare_examples(backbone, reward, judge, prompts, low_res)


@dataclass(frozen=True)
class RealLatents:
    """Real clips for the flow-matching term, encoded once."""

    latents: Tensor
    """[N, C, T, h, w]."""
    condition: Condition
    task: Task

    def loss(
        self,
        backbone: VideoBackbone,
        denoiser: nn.Module,
        rows: Sequence[int],
        seeds: Sequence[int],
    ) -> Tensor:
        """Flow matching per clip [B] at a logit-normal sigma, on these rows with these seeds."""
        rows = list(rows)
        clean = self.latents[rows]
        noise = ClipNoise(tuple(seeds), tuple(clean.shape[1:]))
        sigma = torch.stack(
            [torch.randn((), generator=g).sigmoid() for g in noise.generators("real")]
        )
        sigma, target = sigma.to(clean), noise(REAL_STREAM)
        velocity = backbone.velocity(
            denoiser,
            add_noise(clean, target, sigma),
            sigma,
            self.condition[rows],
            self.task[rows],
        )
        return flow_matching_loss(velocity, clean, target)


@torch.no_grad()
def real_latents(backbone: VideoBackbone, clips: Path, seed: int) -> RealLatents:
    """Windows of a folder of captioned clips at the generator's own size and rate, encoded."""
    from reelhf.clips import load_folder_windows

    num_frames, height, width = backbone.frame_shape
    windows = load_folder_windows(
        clips,
        frame_shape=backbone.frame_shape,
        fps=backbone.fps,
        max_windows=MAX_REAL_WINDOWS,
        seed=seed,
    )
    parts = _slices(len(windows.captions))
    frames = [windows.frames[part].float() / 255 for part in parts]
    if backbone.role == "refiner":  # its condition is the clip itself, shrunk to half
        shrunk = [nn.functional.avg_pool3d(part, (1, 2, 2)) for part in frames]
        task = Task.cat([backbone.low_res_task(part, height, width) for part in shrunk])
    else:
        task = backbone.text_to_video_task(len(windows.captions), num_frames, height, width)
    return RealLatents(
        torch.cat([backbone.encode(part) for part in frames]).to(device()),
        Condition.cat([backbone.encode_prompts(windows.captions[part]) for part in parts]).to(
            device()
        ),
        task.to(device()),
    )


def _slices(length: int) -> list[slice]:
    return [slice(begin, begin + ENCODE_BATCH) for begin in range(0, length, ENCODE_BATCH)]

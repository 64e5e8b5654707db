"""Segment-wise consistency distillation of the refiner (TSCD, Hyper-SD 2404.13686).

The teacher's 20 Euler steps are cut into 4 segments of 5. From any point of a segment the student jumps to the segment's lower
edge in one step, and is trained to land where the teacher's trajectory passes. Its sampler is therefore plain Euler over the
segment edges: 4 evaluations, each of them a jump it was trained for. The student has weights of its own, that start as the teacher's.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from distill.losses import (
    paired_bootstrap,
    segment_consistency_loss,
    segment_edges,
    segment_projection,
)
from generator.base import Condition, SamplerSpec, Task
from generator.checkpoint import DiTGenerator, load_generator
from generator.flow import euler_step
from generator.sampling import noise_like, sample_frames, sample_latents
from reelhf.clips import load_clip_folder
from reelhf.config import Config
from reelhf.engine import (
    EngineConfig,
    OptimizerConfig,
    all_reduce_sum,
    device,
    init_distributed,
    is_main,
    seed_everything,
)
from reelhf.errors import UserError
from reelhf.progress import track
from reelhf.run import RunFolder, write_text_atomic
from reelhf.training import BatchSplit, TrainLoop, run_identity
from reelhf.video import write_video

FREE_TO_CHANGE = frozenset({"num_samples", "num_held_out", "sampling_batch_size"})
"""Keys that a resumed run may have otherwise."""
_STREAM = 4_000_037  # separates the positions of neighbouring seeds


class ConsistencyConfig(Config):
    """Distillation of a refiner into a student of few evaluations."""

    num_segments: PositiveInt = 4
    """Evaluations of the student; must divide the teacher's steps."""
    num_trajectories: PositiveInt = 192
    """Teacher trajectories to learn from, each on a clip that the base makes for a training prompt."""
    num_held_out: PositiveInt = 48
    """Prompts kept out of training, on which student and teacher are compared."""
    target: Literal["trajectory", "ema"] = "trajectory"
    """Where a jump should land. `trajectory`: where the teacher's own steps arrive at the edge. `ema`: where the averaged
    student lands from the teacher's next step (plain TSCD; needs no whole trajectory, but one evaluation more per step)."""
    edge_fraction: float = Field(0.6, ge=0, le=1)
    """Share of samples at the upper edge of a segment, where the deployed student is evaluated; the rest lie inside."""
    num_steps: PositiveInt = 150
    """Optimizer steps."""
    batch_size: PositiveInt = 16
    """Samples per optimizer step over all processes."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-4, warmup_steps=10)
    """AdamW."""
    ema_decay: float = Field(0.95, ge=0, lt=1)
    """Of the averaged student, which is what is kept."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO stage."""
    save_every: PositiveInt = 100
    """Steps between two checkpoints; the last step is always saved."""
    num_samples: int = Field(4, ge=0)
    """Held-out clips drawn by student and teacher at the end."""
    sampling_batch_size: PositiveInt = 16
    """Clips per forward pass where nothing is trained."""
    seed: int = 0
    """Of noise and order."""


@dataclass(frozen=True)
class Trajectories:
    """The teacher's way from noise to clean latents, on the CPU."""

    states: Tensor
    """[S + 1, N, C, T, h, w] at the teacher's sigmas."""
    condition: Condition
    task: Task
    """N rows, with low-resolution latents."""

    def __len__(self) -> int:
        return self.states.shape[1]


def distill_refiner(
    config: ConsistencyConfig, teacher: Path, base: Path, clips: Path, out: Path
) -> Path:
    """Train a student of the refiner; resumes from the run folder's last checkpoint.

    Args:
        teacher: the refiner's generator folder; base: the generator whose clips it enlarges.
        clips: a folder of captioned clips, of which the captions are used.
    Returns: the student's generator folder, `out/generator`; the comparison is in `out/distill.json`.
    """
    init_distributed()
    seed_everything(config.seed)
    started = time.monotonic()
    split = BatchSplit(config.batch_size)
    refiner, base_generator = (load_generator(path).to(device()) for path in (teacher, base))
    edges = student_edges(config, refiner)

    # 1. The teacher's trajectories, on clips of the base for training prompts.
    train_prompts, held_out_prompts = split_prompts(config, clips)
    trajectories = record_trajectories(
        config, refiner, base_generator, train_prompts, first_seed=0, label="teacher trajectories"
    )

    # 2. Train the student to jump to each segment's lower edge.
    run = RunFolder.open(out, config)
    loop = TrainLoop(
        run,
        config,
        copy.deepcopy(refiner.denoiser),
        EngineConfig(zero_stage=config.zero_stage, micro_batch_size=split.micro_batch_size),
        ema_decay=config.ema_decay,
        identity=run_identity(
            config, weight_sums(refiner.denoiser), train_prompts, free=FREE_TO_CHANGE
        ),
    )
    for step in loop.steps("distilling the refiner"):
        batch = draw_batch(config, trajectories, refiner.sampler.sigmas, split.positions(step))
        velocity = refiner.velocity(
            loop.engine, batch.noisy, batch.sigma, batch.condition, batch.task
        )
        target = batch.at_edge
        if config.target == "ema":
            target = ema_target(refiner, loop.averaged, batch)
        loss = segment_consistency_loss(batch.noisy, velocity, batch.sigma, batch.edge, target)
        update = loop.update(loss.mean())
        mean_loss = all_reduce_sum(loss.detach().sum()).item() / config.batch_size
        loop.end_step(step, {"loss": mean_loss, **update})

    # 3. Keep the student with its own sampler, and compare it with the teacher at equal noise.
    sampler = SamplerSpec("euler", edges, guidance_scale=1.0)
    distilled = replace(refiner, denoiser=loop.averaged, sampler=sampler)
    folder = loop.save_model("generator", distilled.save)
    if is_main():
        report = compare_students(config, refiner, distilled, base_generator, held_out_prompts, run)
        report["seconds"] = round(time.monotonic() - started, 1)
        write_text_atomic(run.path / "distill.json", json.dumps(report, indent=2) + "\n")
    return folder


def student_edges(config: ConsistencyConfig, teacher: DiTGenerator) -> tuple[float, ...]:
    """Sigmas of the student's sampler; UserError where the teacher cannot have such a student."""
    if teacher.role != "refiner":
        raise UserError(f"the teacher is a {teacher.role}; expected a refiner to distil")
    if teacher.sampler.kind != "euler":
        raise UserError(
            f"the teacher samples with '{teacher.sampler.kind}'; distillation follows Euler steps: set its sampler kind to 'euler'"
        )
    try:
        return segment_edges(teacher.sampler.sigmas, config.num_segments)
    except ValueError as error:
        raise UserError(f"num_segments: {error}") from None


def split_prompts(config: ConsistencyConfig, clips: Path) -> tuple[list[str], list[str]]:
    """Different captions of the folder in a seeded order: (training, held out); at most half are held out."""
    captions = sorted({entry.caption for entry in load_clip_folder(clips)})
    if len(captions) < 2:
        raise UserError(f"{clips} holds {len(captions)} caption; distillation needs at least 2")
    order = torch.randperm(
        len(captions), generator=torch.Generator().manual_seed(config.seed)
    ).tolist()
    shuffled = [captions[index] for index in order]
    num_held_out = min(config.num_held_out, len(captions) // 2)
    rest = shuffled[num_held_out:]
    repeats = -(-config.num_trajectories // len(rest))
    return (rest * repeats)[: config.num_trajectories], shuffled[:num_held_out]


@torch.no_grad()
def low_res_tasks(
    config: ConsistencyConfig,
    refiner: DiTGenerator,
    base: DiTGenerator,
    prompts: list[str],
    seeds: list[int],
) -> Iterator[tuple[slice, Condition, Task]]:
    """Batches of prompts with the base's clips as the refiner's low-resolution input."""
    _, height, width = refiner.frame_shape
    for first in range(0, len(prompts), config.sampling_batch_size):
        rows = slice(first, first + config.sampling_batch_size)
        low_res = sample_frames(
            base, prompts[rows], seeds[rows], batch_size=config.sampling_batch_size
        )
        yield (
            rows,
            refiner.encode_prompts(prompts[rows]),
            refiner.low_res_task(low_res, height, width),
        )


@torch.no_grad()
def record_trajectories(
    config: ConsistencyConfig,
    refiner: DiTGenerator,
    base: DiTGenerator,
    prompts: list[str],
    *,
    first_seed: int,
    label: str,
) -> Trajectories:
    """Every state of the teacher's sampler for every prompt."""
    shape = refiner.spec.latent_shape(*refiner.frame_shape)
    seeds = [first_seed + index for index in range(len(prompts))]
    states, conditions, tasks = [], [], []
    num_batches = -(-len(prompts) // config.sampling_batch_size)
    batches = low_res_tasks(config, refiner, base, prompts, seeds)
    for rows, condition, task in track(batches, label=label, total=num_batches):
        latents = noise_like(seeds[rows], shape).to(device())
        path = [latents.cpu()]
        for high, low in pairwise(refiner.sampler.sigmas):
            now, then = (latents.new_full((len(latents),), value) for value in (high, low))
            velocity = refiner.velocity(
                refiner.denoiser,
                latents,
                now,
                condition,
                task,
                **refiner.sampler.guidance,
            )
            latents = euler_step(latents, velocity, now, then)
            path.append(latents.cpu())
        states.append(torch.stack(path))
        conditions.append(condition.to("cpu"))
        tasks.append(task.to("cpu"))
    return Trajectories(torch.cat(states, dim=1), Condition.cat(conditions), Task.cat(tasks))


@dataclass(frozen=True)
class ConsistencyBatch:
    """Points of teacher trajectories, on the training device."""

    noisy: Tensor
    """The student's input, [B, C, T, h, w]."""
    sigma: Tensor
    next_noisy: Tensor
    """One teacher step further."""
    next_sigma: Tensor
    at_edge: Tensor
    """The trajectory at the segment's lower edge."""
    edge: Tensor
    condition: Condition
    task: Task


def draw_batch(
    config: ConsistencyConfig,
    trajectories: Trajectories,
    sigmas: tuple[float, ...],
    positions: range,
) -> ConsistencyBatch:
    """The samples at these positions of the stream; everything random belongs to the position."""
    steps_per_segment = (len(sigmas) - 1) // config.num_segments
    rows, starts, ends = [], [], []
    for position in positions:
        generator = torch.Generator().manual_seed(config.seed * _STREAM + position)
        rows.append(int(torch.randint(len(trajectories), (), generator=generator)))
        at_edge = torch.rand((), generator=generator).item() < config.edge_fraction
        segment = position % config.num_segments  # every batch holds every segment
        inside = int(torch.randint(steps_per_segment, (), generator=generator))
        starts.append(segment * steps_per_segment + (0 if at_edge else inside))
        ends.append((segment + 1) * steps_per_segment)
    schedule = torch.tensor(sigmas)
    here, after, edge = (torch.tensor(index) for index in (starts, [s + 1 for s in starts], ends))
    return ConsistencyBatch(
        noisy=trajectories.states[here, rows].to(device()),
        sigma=schedule[here].to(device()),
        next_noisy=trajectories.states[after, rows].to(device()),
        next_sigma=schedule[after].to(device()),
        at_edge=trajectories.states[edge, rows].to(device()),
        edge=schedule[edge].to(device()),
        condition=trajectories.condition[rows].to(device()),
        task=trajectories.task[rows].to(device()),
    )


@torch.no_grad()
def ema_target(refiner: DiTGenerator, averaged: nn.Module, batch: ConsistencyBatch) -> Tensor:
    """Where the averaged student lands at the edge from the teacher's next step; that step itself if it is the edge."""
    velocity = refiner.velocity(
        averaged, batch.next_noisy, batch.next_sigma, batch.condition, batch.task
    )
    return segment_projection(batch.next_noisy, velocity, batch.next_sigma, batch.edge)


class CountedDenoiser(nn.Module):
    """Counts the evaluations of a denoiser per sample, so that a reported NFE is a measured one."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.num_samples = 0

    def forward(self, noisy: Tensor, *inputs: Tensor, **options: Any) -> Any:
        self.num_samples += len(noisy)
        return self.denoiser(noisy, *inputs, **options)


@torch.no_grad()
def compare_students(
    config: ConsistencyConfig,
    teacher: DiTGenerator,
    student: DiTGenerator,
    base: DiTGenerator,
    prompts: list[str],
    run: RunFolder,
) -> dict[str, Any]:
    """Distance to the teacher's full output at equal noise: the student against the teacher with as few steps.

    Distances are root mean squares over normalised latents, one per held-out prompt; `interval` is the paired bootstrap's
    95 % interval of (teacher's distance - student's distance), so above zero the student is closer.
    """
    shape = teacher.spec.latent_shape(*teacher.frame_shape)
    few = replace(student.sampler, **teacher.sampler.guidance)
    routes = {
        "teacher": (teacher, teacher.sampler),
        "teacher_few_steps": (teacher, few),
        "student": (student, student.sampler),
    }
    counted = {name: CountedDenoiser(route[0].denoiser) for name, route in routes.items()}
    seeds = [10_000_000 + index for index in range(len(prompts))]
    distances: dict[str, list[Tensor]] = {"teacher_few_steps": [], "student": []}
    num_batches = -(-len(prompts) // config.sampling_batch_size)
    batches = low_res_tasks(config, teacher, base, prompts, seeds)
    for rows, condition, task in track(
        batches, label="comparing with the teacher", total=num_batches
    ):
        noise = noise_like(seeds[rows], shape).to(device())
        latents = {
            name: sample_latents(
                backbone, condition, task, noise, denoiser=counted[name], sampler=sampler
            )
            for name, (backbone, sampler) in routes.items()
        }
        for name, found in distances.items():
            gap = latents[name] - latents["teacher"]
            found.append(gap.square().flatten(1).mean(1).sqrt().cpu())
        for index in range(rows.start, min(rows.start + len(noise), config.num_samples)):
            for name, sampled in latents.items():
                frames = teacher.decode(sampled[index - rows.start, None])[0][0].clamp(0, 1).cpu()
                path = run.sample_path(config.num_steps, f"{index:02d}_{name}.mp4")
                write_video(path, frames, teacher.fps)
    of_teacher, of_student = (
        torch.cat(distances[name]) for name in ("teacher_few_steps", "student")
    )
    low, high = paired_bootstrap(of_teacher - of_student)
    return {
        "num_prompts": len(prompts),
        "nfe": {name: net.num_samples / len(prompts) for name, net in counted.items()},
        "distance_to_teacher": {
            "teacher_few_steps": of_teacher.mean().item(),
            "student": of_student.mean().item(),
        },
        "difference": (of_teacher - of_student).mean().item(),
        "interval": [low, high],
        "student_is_closer": low > 0,
        "target": config.target,
    }


def weight_sums(module: nn.Module) -> list[float]:
    """One number per parameter: tells one teacher from another."""
    return [p.detach().double().sum().item() for p in module.parameters()]

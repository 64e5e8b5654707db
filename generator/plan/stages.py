"""The plan of a training in stages: each stage by the bucket that needs most, then the run as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from generator.data.buckets import Bucket, BucketConfig, size_of
from generator.data.packing import samples_per_micro_batch
from generator.plan.devices import DEVICES, DeviceSpec
from generator.plan.flops import LatentGrid, model_flops
from generator.plan.planner import MAX_DEVICES, Plan, count_of_devices, words_of
from generator.training.denoiser import DenoiserTrainConfig
from generator.training.stages import StageConfig
from reelhf.errors import UserError

MAX_SHARED = 8
"""Most devices of one machine that a remedy has share a clip."""


def buckets_of(config: BucketConfig, *, images: bool) -> list[Bucket]:
    """Every size that clips of these buckets may have, and of single frames."""
    lengths = (*config.num_frames, *((1,) if images else ()))
    sizes = {size_of(aspect, config) for aspect in config.aspects}
    return sorted({Bucket(frames, *size) for frames in lengths for size in sizes})


def stage_plan(plan: StagedPlan, stage: StageConfig) -> Plan:
    """A stage as if all its micro-batches were of the bucket that has most latent positions in one; they take about as long."""
    config, spec = plan.config, stage.buckets.spec
    tasks = stage.tasks or config.tasks
    buckets = buckets_of(stage.buckets, images=tasks.text_to_image > 0)
    if tasks.text_to_image == 1:
        buckets = [bucket for bucket in buckets if bucket.num_frames == 1]

    def flops(bucket: Bucket) -> float:
        shape = spec.latent_shape(bucket.num_frames, bucket.height, bucket.width)
        return model_flops(config.architecture, LatentGrid(*shape[1:]), plan.text_tokens)

    table = {bucket: flops(bucket) for bucket in buckets}
    counts = samples_per_micro_batch(table, spec, stage.micro_batch_tokens)
    fullest = max(buckets, key=lambda bucket: (counts[bucket] * bucket.tokens(spec), bucket))
    validation = min(config.num_validation, counts[fullest])
    one_size = {
        "num_frames": fullest.num_frames,
        "height": fullest.height,
        "width": fullest.width,
        "fps": stage.buckets.fps,
        "num_steps": stage.num_steps,
        "batch_size": counts[fullest] * config.micro_batches,
        "gradient_accumulation_steps": config.micro_batches // plan.groups,
        "num_validation": validation,
        "num_samples": min(config.num_samples, validation),
        "stages": (),
    }
    return Plan(
        config.model_copy(update=one_size),
        plan.device,
        plan.devices,
        plan.text_tokens,
        plan.utilisation,
    )


@dataclass(frozen=True)
class StagedPlan:
    """A training config with stages on so many devices of one kind."""

    config: DenoiserTrainConfig
    device: DeviceSpec
    devices: int
    text_tokens: int
    utilisation: float

    def __post_init__(self) -> None:
        shared, micro_batches = self.config.sequence_parallel, self.config.micro_batches
        if self.devices % shared:
            raise UserError(
                f"sequence_parallel {shared} does not divide {self.devices} devices; use a multiple of it"
            )
        if micro_batches % self.groups:
            raise UserError(
                f"micro_batches {micro_batches} cannot be split over {self.groups} devices; use a multiple of {self.groups}"
            )

    @property
    def groups(self) -> int:
        """Of devices that share their clips."""
        return self.devices // self.config.sequence_parallel

    @cached_property
    def stages(self) -> list[tuple[str, Plan]]:
        return [(stage.name, stage_plan(self, stage)) for stage in self.config.stages]

    @property
    def fits(self) -> bool:
        return all(plan.fits for _, plan in self.stages)

    @property
    def worst(self) -> Plan:
        """Of the stage that needs most memory."""
        return max((plan for _, plan in self.stages), key=lambda plan: plan.memory.peak)

    @property
    def seconds(self) -> float:
        """Of all stages, without validation and sample clips."""
        return sum(plan.step_seconds * plan.config.num_steps for _, plan in self.stages)

    def changed(self, devices: int | None = None, **keys: Any) -> StagedPlan:
        """With other keys; `tokens=i` divides every stage's `micro_batch_tokens` by 2^i, down to one clip of its largest bucket."""
        tokens = keys.pop("tokens", 0)
        architecture = {
            key.partition(".")[2]: keys.pop(key) for key in list(keys) if key.startswith("arch")
        }
        config = self.config.model_copy(
            update={
                **keys,
                "architecture": self.config.architecture.model_copy(update=architecture),
                "stages": tuple(
                    stage.model_copy(update={"micro_batch_tokens": fewer_tokens(stage, tokens)})
                    for stage in self.config.stages
                ),
            }
        )
        return replace(self, config=config, devices=devices or self.devices)

    def as_json(self) -> dict[str, Any]:
        """Every figure of every stage."""
        return {
            "stages": [{"name": name, **plan.as_json()} for name, plan in self.stages],
            "seconds": self.seconds,
            "fits": self.fits,
            "remedies": [] if self.fits else staged_remedies(self),
        }


def fewer_tokens(stage: StageConfig, halvings: int) -> int:
    """Positions per micro-batch after so many halvings, at least one clip of the largest bucket; what has one already stays."""
    spec = stage.buckets.spec
    one = max(bucket.tokens(spec) for bucket in buckets_of(stage.buckets, images=False))
    return min(stage.micro_batch_tokens, max(one, stage.micro_batch_tokens >> halvings))


def staged_remedies(plan: StagedPlan) -> list[str]:
    """Changes that make every stage fit, as words for the command line: on the same devices, on more, on another kind."""
    found = []
    if plan.worst.memory.start <= plan.device.usable_bytes:
        for candidate, words in _savings(plan):
            if candidate.fits:
                found.append(f"on the same {count_of_devices(plan.devices)}: {words}")
                break
        else:
            found += _on_more_devices(plan)
    elsewhere = [
        device.name
        for device in DEVICES.values()
        if device.name not in (plan.device.name, "cpu") and replace(plan, device=device).fits
    ]
    if elsewhere:
        found.append(f"as it is on another device: --device {' or '.join(elsewhere)}")
    return found or [
        "nothing here makes it fit: one clip of the largest bucket is too much, or the weights are; smaller buckets or a narrower model are needed"
    ]


def _savings(plan: StagedPlan) -> Iterator[tuple[StagedPlan, str]]:
    """What saves memory without another model or clip, the cheapest changes first."""
    config = plan.config
    now = config.architecture.checkpointing
    choices = sorted(
        product(
            range(config.zero_stage, 4) if plan.devices > 1 else [config.zero_stage],
            (0, 1, 2, 4, 8),
            sorted({config.bf16, True}),
            [now] if now is True else [now, True],
            _shared(plan),
        ),
        key=lambda c: (
            0.5 * (c[0] - config.zero_stage)
            + 0.3 * c[1]
            + 1.5 * (c[2] != config.bf16)
            + 1.0 * (c[3] != now)
            + 0.7 * (c[4] - config.sequence_parallel)
        ),
    )
    tried: set[str] = set()
    for stage, halvings, bf16, checkpointing, shared in choices:
        keys = {
            "zero_stage": stage,
            "bf16": bf16,
            "architecture.checkpointing": checkpointing,
            "sequence_parallel": shared,
        }
        flat = {**config.model_dump(), "architecture.checkpointing": now}
        different = {key: value for key, value in keys.items() if value != flat[key]}
        candidate = plan.changed(tokens=halvings, **different)
        words = words_of(different)
        for index, (old, new) in enumerate(
            zip(config.stages, candidate.config.stages, strict=True)
        ):
            if old.micro_batch_tokens != new.micro_batch_tokens:
                words.append(f"stages.{index}.micro_batch_tokens={new.micro_batch_tokens}")
        if " ".join(words) not in tried:
            tried.add(" ".join(words))
            yield candidate, " ".join(words)


def _shared(plan: StagedPlan) -> list[int]:
    """Numbers of devices that may share a clip."""
    own = plan.config.sequence_parallel
    return [
        n for n in (1, 2, 4, MAX_SHARED) if n == own or (n > own and plan.devices % n == 0)
    ] or [own]


def _on_more_devices(plan: StagedPlan) -> list[str]:
    devices = plan.devices
    while (devices := 2 * devices) <= MAX_DEVICES:
        groups = devices // plan.config.sequence_parallel
        keys = {} if plan.config.micro_batches % groups == 0 else {"micro_batches": groups}
        for candidate, words in _savings(plan.changed(devices=devices, **keys)):
            if candidate.fits:
                changes = " ".join((f"--devices {devices}", *words_of(keys), words)).strip()
                return [f"on more devices: {changes}"]
    return []

"""Direct reward maximisation: the reward's gradient goes through the VAE decoder and the sampler into the denoiser.

One trainer for the base generator and for the accelerated refiner; each samples as its own checkpoint says (`SamplerSpec`).
Per step: roll out, score, carry the gradient back from pixels to latents, anchor to the frozen reference, one backward.
Sources: Seedance 1.0 (2506.09113, 4.4.3 and 4.4.4), DRaFT (2309.17400), DRTune (2405.00760), SRPO (2509.06942).

A run that was killed and started again, on the same number of processes, ends bit-equal to one that was not.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from generator.flow import add_noise
from reelhf.config import Config
from reelhf.engine import (
    Ema,
    Engine,
    EngineConfig,
    OptimizerConfig,
    all_reduce_sum,
    barrier,
    device,
    global_mean_scale,
    init_distributed,
    is_main,
    rng_state,
    seed_everything,
    set_rng_state,
    world_size,
)
from reelhf.errors import UserError
from reelhf.hashing import content_hash
from reelhf.progress import track
from reelhf.run import RunFolder
from reelhf.video import write_video
from rlhf.examples import (
    ANCHOR_STREAM,
    ClipNoise,
    Examples,
    draw_seed,
    local_part,
    low_res_clips,
    prepare_examples,
    prompt_rows,
    real_latents,
)
from rlhf.hacking import HackingConfig, HackingMonitor, motion_amplitude
from rlhf.losses import (
    low_res_consistency_loss,
    out_of_range_loss,
    surrogate_loss,
    valid_sum,
    velocity_anchor_loss,
)
from rlhf.rollout import (
    GradientMode,
    anchor_sigmas,
    draw_graded_steps,
    jitter,
    rollout,
    shorter_sampler,
    two_stage_gradient,
)
from rlhf.validation import KeepBest, keep_best_score, validate

if TYPE_CHECKING:
    from generator.base import VideoBackbone
    from rewards import CompositeReward
    from rewards.base import CompositeScores


class DirectConfig(Config):
    """One run of direct reward maximisation."""

    type: Literal["direct"] = "direct"
    seed: NonNegativeInt = 0
    num_steps: PositiveInt = 40
    """Optimizer steps."""
    prompts_per_step: PositiveInt = 8
    """Clips per step over all processes; a multiple of the number of processes."""
    rollout_steps: PositiveInt | None = None
    """Denoiser steps of a training rollout, a subset of the checkpoint's own schedule; None uses all of it."""

    gradient: GradientMode = "drtune"
    """How the gradient reaches the denoiser: `last`, `drtune`, `x0` or `direct_align`, see `rlhf.rollout`."""
    graded_steps: PositiveInt = 1
    """Sampler steps with a gradient, K; `x0` and `direct_align` have one."""
    gradient_band: tuple[float, float] = (0.0, 1.0)
    """Sigmas, lowest and highest, at which graded steps may start; `last` ignores it. High ones change layout and motion,
    low ones texture."""
    decode_chunk: PositiveInt = 1
    """Latent frames per decoder call: the memory of the reward gradient."""
    truncate_state: bool = False
    """Stop the gradient at each decoder chunk's edge."""

    reward_weights: dict[str, float] = Field(
        default_factory=lambda: {
            "prompt_following": 1.0,
            "structural_stability": 1.0,
            "motion_quality": 1.0,
            "aesthetic_quality": 1.0,
        }
    )
    """Dimension -> weight of its bounded z-score."""
    reward_cap: float = Field(2.0, gt=0)
    """Bound of each z-score above zero."""
    max_reward_gradient: float | None = Field(None, gt=0)
    """Largest L2 norm of d total / d pixels of one clip; None is off."""
    view_noise: NonNegativeFloat = 0.0
    """Standard deviation of pixel noise added to what the rewards see: a gain that noise undoes is not worth having."""
    view_shift: NonNegativeInt = 0
    """Largest shift in pixels, either way and per clip, of what the rewards see; the border is repeated."""
    anchor_weight: NonNegativeFloat = 1.0
    """Weight of the velocity's squared distance to the frozen reference."""
    low_res_weight: NonNegativeFloat = 0.0
    """Refiner: weight of the squared distance between the shrunk clip and its low-resolution condition."""
    range_weight: NonNegativeFloat = 0.0
    """Weight of the squared overshoot of pixels outside [0, 1]."""
    flow_matching_weight: NonNegativeFloat = 0.0
    """Weight of flow matching on real clips beside the reward; needs `clips`."""

    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4)
    zero_stage: Literal[0, 1, 2, 3] = 0
    bf16: bool = False
    ema_decay: float = Field(0.9, ge=0, lt=1)
    """Decay of the weights' moving average, which is what is validated and saved."""

    validate_every: PositiveInt = 10
    validation_batch: PositiveInt = 16
    checkpoint_every: PositiveInt = 10
    keep_checkpoints: PositiveInt = 2
    keep_best: KeepBest = "balanced_gain"
    """What the best validation has most of. `balanced_gain`: the smaller of the gains of the training composite and of the
    held-out composite. `every_dimension`: the smallest gain of any weighted dimension, averaged over both rewards. A
    validation with a hacking alarm, or whose held-out total is below its start, is never the best."""
    hacking: HackingConfig = HackingConfig()
    num_samples: NonNegativeInt = 4
    """Validation clips saved as videos at each validation."""
    num_low_res_clips: PositiveInt = 64
    """Refiner: low-resolution clips sampled from the base beforehand and used in turn."""
    wandb: bool = False
    """Mirror the metrics to wandb, offline unless WANDB_MODE says otherwise."""

    @model_validator(mode="after")
    def _band_is_ordered(self) -> DirectConfig:
        low, high = self.gradient_band
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"gradient_band is [{low}, {high}]: expected 0 <= lowest < highest <= 1"
            )
        return self


class DirectRun(DirectConfig):
    """The same with the paths of what it reads: one YAML, one run."""

    generator: Path
    """Folder of the generator to improve: a base, or an accelerated refiner."""
    rewards: Path
    """Folder of the rewards that are maximised."""
    held_out: Path
    """Folder of rewards trained with another seed on other annotators and prompts: watched, never differentiated."""
    prompts: Path
    """Text file, one training prompt per line."""
    validation_prompts: Path
    """Text file, one validation prompt per line; none of them may be a training prompt."""
    low_res_generator: Path | None = None
    """Refiner: the base generator that makes its low-resolution clips."""
    clips: Path | None = None
    """Folder of captioned clips for `flow_matching_weight`."""


def run_direct(run: DirectRun, *, out: Path) -> Path:
    """`train_direct` from one config with paths; what `reelhf rlhf train` calls."""
    settings = run.model_dump(include=set(DirectConfig.model_fields))
    return train_direct(
        DirectConfig.model_validate(settings),
        generator=run.generator,
        rewards=run.rewards,
        held_out=run.held_out,
        prompts=read_prompts(run.prompts),
        validation_prompts=read_prompts(run.validation_prompts),
        low_res_generator=run.low_res_generator,
        clips=run.clips,
        out=out,
    )


def read_prompts(path: Path) -> list[str]:
    """The non-empty lines of a text file."""
    if not path.is_file():
        raise UserError(f"no prompt file at {path}; expected a text file with one prompt per line")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"{path} holds no prompt; expected one per line")
    return prompts


def train_direct(
    config: DirectConfig,
    *,
    generator: Path,
    rewards: Path,
    held_out: Path,
    prompts: Sequence[str],
    validation_prompts: Sequence[str],
    out: Path,
    low_res_generator: Path | None = None,
    clips: Path | None = None,
) -> Path:
    """Load everything, maximise the reward, and return `out/best`, a generator folder; `out/last` lies beside it."""
    from generator import load_generator
    from rewards import load_composite

    init_distributed()
    settings = (config.reward_weights, config.reward_cap, config.max_reward_gradient)
    folders = {"generator": generator, "rewards": rewards, "held_out": held_out}
    folders |= {"low_res_generator": low_res_generator} if low_res_generator else {}
    folders |= {"clips": clips} if clips else {}
    return maximise_reward(
        config,
        backbone=load_generator(generator),
        reward=load_composite(rewards, *settings).to(device()),
        judge=load_composite(held_out, *settings).to(device()),
        prompts=prompts,
        validation_prompts=validation_prompts,
        base=None if low_res_generator is None else load_generator(low_res_generator),
        clips=clips,
        inputs={name: content_hash(folder) for name, folder in folders.items()},
        out=out,
    )


def maximise_reward(
    config: DirectConfig,
    *,
    backbone: VideoBackbone,
    reward: CompositeReward,
    judge: CompositeReward,
    prompts: Sequence[str],
    validation_prompts: Sequence[str],
    out: Path,
    base: VideoBackbone | None = None,
    clips: Path | None = None,
    inputs: Mapping[str, str] | None = None,
) -> Path:
    """The run itself, on models in memory. `DirectRun` says what the arguments are; returns `out/best`.

    `inputs` (name -> content hash) are kept in every checkpoint: a run goes on only with what it began with.
    """
    check_inputs(config, backbone, prompts, validation_prompts, base, clips)
    init_distributed()
    seed_everything(config.seed)
    run = RunFolder.open(out, config)
    mirror = wandb_mirror(run) if config.wandb else None
    for model in (backbone, base):
        move_to_device(model)
    examples = training_examples(config, backbone, reward, judge, prompts, base, run)
    validation = validation_examples(config, backbone, reward, judge, validation_prompts, base, run)
    real = None if clips is None else real_latents(backbone, clips, config.seed)

    sampler = shorter_sampler(backbone.sampler, config.rollout_steps)
    reference = deepcopy(backbone.denoiser).requires_grad_(False)
    ema = Ema(backbone.denoiser, config.ema_decay)  # before the engine: ZeRO-3 splits the weights
    batch_size = config.prompts_per_step // world_size()
    engine = Engine(
        backbone.denoiser,
        config.optimizer,
        EngineConfig(zero_stage=config.zero_stage, bf16=config.bf16, micro_batch_size=batch_size),
    )
    monitor = HackingMonitor(config.hacking, validation_ranges(reward))
    prompt_hashes = {"prompts": content_hash([list(prompts), list(validation_prompts)])}
    state = load_state(run, engine, ema, monitor, {**(inputs or {}), **prompt_hashes})

    def velocity(
        denoiser: nn.Module | Engine, noisy: Tensor, sigma: Tensor, batch: Examples
    ) -> Tensor:
        """What the sampler follows, guidance included."""
        scale = sampler.guidance_scale
        return backbone.velocity(
            denoiser, noisy, sigma, batch.condition, batch.task, guidance_scale=scale
        )

    def validate_and_keep_best(step: int) -> dict[str, float]:
        found = validate(
            backbone,
            ema.module,
            reward,
            judge,
            validation,
            seed=config.seed,
            batch_size=config.validation_batch,
            num_samples=config.num_samples,
        )
        for index, clip in enumerate(found.samples):
            write_video(run.sample_path(step, f"validation_{index:02d}.mp4"), clip, backbone.fps)
        alarms = monitor.observe(found.reading(reward.dimensions))
        state.first = state.first or found.metrics
        score = keep_best_score(
            config.keep_best, found.metrics, state.first, config.reward_weights, alarms
        )
        if score is not None and (state.best_score is None or score > state.best_score):
            state.best_score, state.best_step = score, step
            save_policy(backbone, ema.module, run.path / "best")
        return found.metrics | {
            "hacking/alarms": float(len(alarms)),
            "best/score": state.best_score or 0.0,
            "best/step": float(state.best_step),
        }

    if state.step == 0:
        run.log(0, validate_and_keep_best(0))
    steps = range(state.step + 1, 1 + (state.step if monitor.should_stop else config.num_steps))
    for step in track(steps, label=f"direct RLHF of the {backbone.role}"):
        clock = Clock()

        # 1. Roll out this process's part of the global batch, with a gradient through the graded steps only.
        draws = torch.Generator().manual_seed(draw_seed(config.seed, "step", step))
        graded = draw_graded_steps(
            sampler, config.gradient, config.graded_steps, config.gradient_band, draws
        )
        selections = reward.select(backbone.frame_shape[0], backbone.fps, draws)
        seeds = local_part(
            [draw_seed(config.seed, "clip", step, i) for i in range(config.prompts_per_step)]
        )
        rows = prompt_rows(state.cursor, config.prompts_per_step, len(examples), config.seed)
        batch = examples.take(local_part(rows))
        noise = batch.noise(seeds)
        with clock("rollout"):
            latents = rollout(
                backbone,
                engine,
                batch.condition,
                batch.task,
                noise,
                sampler=sampler,
                graded=graded,
            )

        # 2. Score what a viewer would see; carry the gradient from the pixels back to the latents.
        with clock("reward"):
            pixels = two_stage_gradient(
                backbone.decode,
                latents,
                Objective(config, reward, batch, selections, backbone.fps, noise),
                chunk_size=config.decode_chunk,
                truncate_state=config.truncate_state,
            )
        scores: CompositeScores = pixels.scores
        with clock("update"):
            surrogate = surrogate_loss(latents, pixels.latent_gradient)

            # 3. Anchor the velocity to the frozen reference, at a random sigma of the clips just made.
            sigma = anchor_sigmas(sampler, noise.generators("anchor")).to(latents)
            noisy = add_noise(latents.detach(), noise(ANCHOR_STREAM), sigma)
            with torch.no_grad():
                reference_velocity = velocity(reference, noisy, sigma, batch)
            anchor = velocity_anchor_loss(velocity(engine, noisy, sigma, batch), reference_velocity)

            # 4. One loss, one backward, one step: a mean over the valid clips of all processes.
            scale = global_mean_scale(scores.valid.sum())
            loss = scale * valid_sum(surrogate + config.anchor_weight * anchor, scores.valid)
            if real is not None:
                cursor = prompt_rows(
                    state.cursor, config.prompts_per_step, len(real.latents), config.seed
                )
                flow_matching = real.loss(backbone, engine, local_part(cursor), seeds).mean()
                loss = loss + config.flow_matching_weight * flow_matching
            engine.backward(loss)
            update = engine.step()
            ema.update(engine.module)
        state.step, state.cursor = step, state.cursor + config.prompts_per_step

        # 5. Report; validate and keep the best; save.
        metrics = batch_metrics(scores, anchor, pixels.latent_gradient, pixels.frames) | update
        is_last = step == config.num_steps
        if is_last or step % config.validate_every == 0:
            with clock("validation"):
                metrics |= validate_and_keep_best(step)
        run.log(step, metrics | clock.metrics())
        if mirror is not None:
            mirror(step, metrics)
        stopping = is_last or monitor.should_stop
        if stopping or step % config.checkpoint_every == 0:
            run.save_checkpoint(
                step,
                lambda folder: save_state(folder, engine, ema, monitor, state),
                keep=config.keep_checkpoints,
            )
        if stopping:
            break

    save_policy(backbone, ema.module, run.path / "last")
    return run.path / "best"


@dataclass(frozen=True)
class Objective:
    """Frames [B, 3, F, H, W], unclamped -> (loss per clip [B], scores): minus the bounded composite, plus pixel penalties."""

    config: DirectConfig
    reward: CompositeReward
    batch: Examples
    selections: Sequence[Any]
    fps: float
    noise: ClipNoise

    def __call__(self, frames: Tensor) -> tuple[Tensor, CompositeScores]:
        generators = self.noise.generators("view")
        viewed = jitter(
            frames, generators, noise=self.config.view_noise, shift=self.config.view_shift
        )
        scores = self.reward.score(
            viewed, selections=self.selections, fps=self.fps, prompts=self.batch.reward_prompts
        )
        loss = -scores.total
        if self.config.range_weight:
            loss = loss + self.config.range_weight * out_of_range_loss(frames)
        if self.config.low_res_weight and self.batch.low_res is not None:
            distance = low_res_consistency_loss(frames, self.batch.low_res)
            loss = loss + self.config.low_res_weight * distance
        return loss.masked_fill(~scores.valid, 0.0), scores


def check_inputs(
    config: DirectConfig,
    backbone: VideoBackbone,
    prompts: Sequence[str],
    validation_prompts: Sequence[str],
    base: VideoBackbone | None,
    clips: Path | None,
) -> None:
    """Refuse what would otherwise fail late, or quietly be wrong."""
    if not prompts or not validation_prompts:
        raise UserError("RLHF needs at least one training prompt and one validation prompt")
    shared = set(prompts) & set(validation_prompts)
    if shared:
        raise UserError(
            f"{len(shared)} validation prompts are also training prompts, such as '{min(shared)}'"
        )
    if config.prompts_per_step % world_size():
        raise UserError(
            f"prompts_per_step is {config.prompts_per_step}: expected a multiple of the {world_size()} processes"
        )
    if backbone.role == "refiner" and base is None:
        raise UserError("a refiner needs low_res_generator: the base whose clips it refines")
    if backbone.role == "base" and base is not None:
        raise UserError("low_res_generator is for a refiner; this generator is a base")
    if (config.flow_matching_weight > 0) != (clips is not None):
        raise UserError("flow_matching_weight and clips go together: give both or neither")


def training_examples(
    config: DirectConfig,
    backbone: VideoBackbone,
    reward: CompositeReward,
    judge: CompositeReward,
    prompts: Sequence[str],
    base: VideoBackbone | None,
    run: RunFolder,
) -> Examples:
    """The training prompts; for a refiner, `num_low_res_clips` of them (in turn) with a low-resolution clip each."""
    if base is None:
        return prepare_examples(backbone, reward, judge, prompts, None)
    prompts = [prompts[index % len(prompts)] for index in range(config.num_low_res_clips)]
    seeds = [draw_seed(config.seed, "low_res/train", 0, i) for i in range(len(prompts))]
    low_res = low_res_clips(base, prompts, seeds, run.path / "low_res_train.safetensors")
    return prepare_examples(backbone, reward, judge, prompts, low_res)


def validation_examples(
    config: DirectConfig,
    backbone: VideoBackbone,
    reward: CompositeReward,
    judge: CompositeReward,
    prompts: Sequence[str],
    base: VideoBackbone | None,
    run: RunFolder,
) -> Examples:
    """The validation prompts; for a refiner, each with one low-resolution clip."""
    low_res = None
    if base is not None:
        seeds = [draw_seed(config.seed, "low_res/validation", 0, i) for i in range(len(prompts))]
        low_res = low_res_clips(base, prompts, seeds, run.path / "low_res_validation.safetensors")
    return prepare_examples(backbone, reward, judge, prompts, low_res)


def validation_ranges(reward: CompositeReward) -> dict[str, tuple[float, float]]:
    """Dimension -> range of the raw reward on its validation clips, as frozen with each reward model."""
    ranges: dict[str, tuple[float, float]] = {}
    for model in reward.models:
        bounds = zip(model.low.tolist(), model.high.tolist(), strict=True)
        ranges |= dict(zip(model.dimensions, bounds, strict=True))
    return ranges


@torch.no_grad()
def batch_metrics(
    scores: CompositeScores, anchor: Tensor, latent_gradient: Tensor, frames: Tensor
) -> dict[str, float]:
    """Means over the valid clips of the global batch."""
    columns = {f"reward/{name}": scores.values[:, i] for i, name in enumerate(scores.dimensions)}
    columns |= {f"z/{name}": scores.z[:, i] for i, name in enumerate(scores.dimensions)}
    columns |= {
        "reward/total": scores.total,
        "anchor": anchor,
        "latent_gradient_norm": latent_gradient.flatten(1).norm(dim=1),
        "motion_amplitude": motion_amplitude(frames),
    }
    table = torch.stack([column.double() for column in columns.values()], dim=1)
    sums = table.masked_fill(~scores.valid[:, None], 0.0).sum(0)
    counts = torch.tensor([float(scores.valid.sum()), float(len(scores.valid))]).to(sums)
    *totals, num_valid, num_clips = all_reduce_sum(torch.cat([sums, counts])).tolist()
    means = [total / max(num_valid, 1.0) for total in totals]
    return dict(zip(columns, means, strict=True)) | {"valid_fraction": num_valid / num_clips}


# What is saved


@dataclass
class TrainState:
    """What a resumed run must know beside weights, optimizer, EMA, RNG and the monitor."""

    step: int = 0
    cursor: int = 0
    """Clips taken from the prompt list so far, over all processes."""
    best_score: float | None = None
    best_step: int = 0
    first: dict[str, float] | None = None
    """Validation metrics at the start: gains are measured from here."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Content hashes of the generator, the rewards, and whatever else the run began with."""


def save_state(
    folder: Path, engine: Engine, ema: Ema, monitor: HackingMonitor, state: TrainState
) -> None:
    """One checkpoint: weights and optimizer, the RNG of every process, counters, monitor, EMA."""
    client = {"state": asdict(state), "monitor": monitor.state_dict(), "rng": rng_state()}
    engine.save(folder, client)
    if is_main():
        torch.save(ema.state_dict(), folder / "ema.pt")


def load_state(
    run: RunFolder, engine: Engine, ema: Ema, monitor: HackingMonitor, inputs: dict[str, str]
) -> TrainState:
    """The state of the newest checkpoint, or a fresh one; UserError if the run began with other inputs."""
    found = run.latest_checkpoint()
    if found is None:
        return TrainState(inputs=inputs)
    _, folder = found
    client = engine.load(folder)
    state = TrainState(**client["state"])
    for name in sorted(inputs.keys() | state.inputs.keys()):
        if inputs.get(name) != state.inputs.get(name):
            raise UserError(
                f"{run.path} holds a run that began with another '{name}'; choose another --out, or give it the same"
            )
    ema.load_state_dict(torch.load(folder / "ema.pt", weights_only=True))
    monitor.load_state_dict(client["monitor"])
    set_rng_state(client["rng"])
    return state


def save_policy(backbone: VideoBackbone, denoiser: nn.Module, folder: Path) -> None:
    """Write a generator folder with these weights: aside, then swapped in."""
    if is_main():
        aside, old = (
            folder.with_name(f".{folder.name}.new"),
            folder.with_name(f".{folder.name}.old"),
        )
        for leftover in (aside, old):  # of an attempt that was killed here
            shutil.rmtree(leftover, ignore_errors=True)
        trained, backbone.denoiser = backbone.denoiser, denoiser
        try:
            backbone.save(aside)
        finally:
            backbone.denoiser = trained
        if folder.exists():
            os.replace(folder, old)
        os.replace(aside, folder)
        shutil.rmtree(old, ignore_errors=True)
    barrier()


def move_to_device(model: VideoBackbone | None) -> None:
    """Our generators know how to move; an adapter that does not stays where it was built."""
    if model is not None and hasattr(model, "to"):
        model.to(device())


class Clock:
    """Seconds per phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        return {f"seconds/{phase}": seconds for phase, seconds in self.seconds.items()}


def wandb_mirror(run: RunFolder) -> Callable[[int, Mapping[str, float]], None] | None:
    """A wandb run whose id survives a resume, offline unless WANDB_MODE says otherwise; on the first process only."""
    if not is_main():
        return None
    import wandb

    identity = hashlib.blake2b(str(run.path.resolve()).encode(), digest_size=8).hexdigest()
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    mirror = wandb.init(project="reelhf", id=identity, resume="allow", dir=run.path, mode=mode)
    return lambda step, metrics: mirror.log(dict(metrics), step=step)

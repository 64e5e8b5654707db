"""Direct reward maximisation: the reward's gradient goes through the VAE decoder and the sampler into the denoiser.

One trainer for the base generator and for the accelerated refiner; each samples as its own checkpoint says (`SamplerSpec`).
Per step: roll out, score, carry the gradient back from pixels to latents, anchor to the frozen reference, one backward.
Sources: Seedance 1.0 (2506.09113, 4.4.3 and 4.4.4), DRaFT (2309.17400), DRTune (2405.00760), SRPO (2509.06942).

A run that was killed and started again, on the same number of processes, ends bit-equal to one that was not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
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
    device,
    global_mean_scale,
    init_distributed,
    seed_everything,
    world_size,
)
from reelhf.errors import UserError
from reelhf.hashing import content_hash
from reelhf.progress import track
from reelhf.run import RunFolder
from reelhf.video import write_video
from rewards.gradients import reward_log
from rlhf.examples import (
    ANCHOR_STREAM,
    ClipNoise,
    Examples,
    RealLatents,
    draw_seed,
    local_part,
    prompt_rows,
    real_latents,
    training_examples,
    validation_examples,
)
from rlhf.hacking import HackingConfig, HackingMonitor, validation_ranges
from rlhf.losses import (
    low_res_consistency_loss,
    out_of_range_loss,
    surrogate_loss,
    valid_sum,
    velocity_anchor_loss,
)
from rlhf.policy import load_state, move_to_device, save_policy, save_state
from rlhf.rollout import (
    GradedSteps,
    GradientMode,
    anchor_sigmas,
    draw_graded_steps,
    jitter,
    rollout,
    shorter_sampler,
    two_stage_gradient,
)
from rlhf.telemetry import Clock, batch_metrics, wandb_mirror
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
    reward_pessimism: NonNegativeFloat = 0.0
    """How many standard deviations, of rewards that know their own such as ensembles, come off each z-score."""
    log_reward_gradients_every: NonNegativeInt = 0
    """Steps between measurements of each reward's pixel gradient and of the angles between them; 0 is never."""
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
        reward=load_composite(rewards, *settings, pessimism=config.reward_pessimism).to(device()),
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
    """The run itself, on models in memory. `rlhf.direct_run.DirectRun` says what the arguments are; returns `out/best`.

    `inputs` (name -> content hash) are kept in every checkpoint: a run goes on only with what it began with.
    """
    check_inputs(config, backbone, prompts, validation_prompts, base, clips)
    init_distributed()
    seed_everything(config.seed)
    run = RunFolder.open(out, config)
    mirror = wandb_mirror(run) if config.wandb else None
    for model in (backbone, base):
        move_to_device(model)
    given = backbone, reward, judge
    examples = training_examples(
        *given,
        prompts,
        base,
        seed=config.seed,
        num_low_res_clips=config.num_low_res_clips,
        cache=run.path,
    )
    validation = validation_examples(
        *given, validation_prompts, base, seed=config.seed, cache=run.path
    )
    real = None if clips is None else real_latents(backbone, clips, config.seed)
    prompt_hash = {"prompts": content_hash([list(prompts), list(validation_prompts)])}
    policy = Policy(config, backbone, reward, judge, run, {**(inputs or {}), **prompt_hash})
    state = policy.state

    if state.step == 0:
        run.log(0, policy.validate_and_keep_best(0, validation))
    last = state.step if policy.monitor.should_stop else config.num_steps
    for step in track(range(state.step + 1, last + 1), label=f"direct RLHF of the {backbone.role}"):
        clock = Clock()

        metrics = learn_step(policy, examples, real, step, clock)
        state.step, state.cursor = step, state.cursor + config.prompts_per_step

        # Validate and keep the best; report; save.
        is_last = step == config.num_steps
        if is_last or step % config.validate_every == 0:
            with clock("validation"):
                metrics |= policy.validate_and_keep_best(step, validation)
        run.log(step, metrics | clock.metrics())
        if mirror is not None:
            mirror(step, metrics)
        stopping = is_last or policy.monitor.should_stop
        if stopping or step % config.checkpoint_every == 0:
            run.save_checkpoint(step, policy.save, keep=config.keep_checkpoints)
        if stopping:
            break

    save_policy(backbone, policy.ema.module, run.path / "last")
    return run.path / "best"


def learn_step(
    policy: Policy, examples: Examples, real: RealLatents | None, step: int, clock: Clock
) -> dict[str, float]:
    """One update of the denoiser on this step's prompts; its metrics."""
    config, backbone, reward = policy.config, policy.backbone, policy.reward

    # 1. Roll out this process's part of the global batch, with a gradient through the graded steps only.
    draws = torch.Generator().manual_seed(draw_seed(config.seed, "step", step))
    graded = draw_graded_steps(
        policy.sampler, config.gradient, config.graded_steps, config.gradient_band, draws
    )
    selections = reward.select(backbone.frame_shape[0], backbone.fps, draws)
    seeds = local_part(
        [draw_seed(config.seed, "clip", step, i) for i in range(config.prompts_per_step)]
    )
    rows = prompt_rows(policy.state.cursor, config.prompts_per_step, len(examples), config.seed)
    batch = examples.take(local_part(rows))
    noise = batch.noise(seeds)
    with clock("rollout"):
        latents = policy.roll_out(batch, noise, graded)

    # 2. Score what a viewer would see; carry the gradient from the pixels back to the latents.
    with clock("reward"):
        pixels = two_stage_gradient(
            backbone.decode,
            latents,
            Objective(config, reward, batch, selections, backbone.fps, noise),
            chunk_size=config.decode_chunk,
            truncate_state=config.truncate_state,
        )
    valid = pixels.scores.valid
    with clock("update"):
        surrogate = surrogate_loss(latents, pixels.latent_gradient)

        # 3. Anchor the velocity to the frozen reference, at a random sigma of the clips just made.
        anchor = policy.anchor(latents.detach(), noise, batch)

        # 4. One loss, one backward, one step: a mean over the valid clips of all processes.
        scale = global_mean_scale(valid.sum())
        loss = scale * valid_sum(surrogate + config.anchor_weight * anchor, valid)
        if real is not None:
            cursor = prompt_rows(
                policy.state.cursor, config.prompts_per_step, len(real.latents), config.seed
            )
            flow_matching = real.loss(backbone, policy.engine, local_part(cursor), seeds).mean()
            loss = loss + config.flow_matching_weight * flow_matching
        update = policy.update(loss)
    metrics = batch_metrics(pixels.scores, anchor, pixels.latent_gradient, pixels.frames) | update
    if config.log_reward_gradients_every and step % config.log_reward_gradients_every == 0:
        seen = {"fps": backbone.fps, "prompts": batch.reward_prompts, "selections": selections}
        metrics |= reward_log(reward, pixels.frames, **seen)
    return metrics


class Policy:
    """The denoiser in training beside its frozen start: how it samples, moves, is validated, kept and restored."""

    def __init__(
        self,
        config: DirectConfig,
        backbone: VideoBackbone,
        reward: CompositeReward,
        judge: CompositeReward,
        run: RunFolder,
        inputs: dict[str, str],
    ) -> None:
        self.config, self.backbone, self.run = config, backbone, run
        self.reward, self.judge = reward, judge
        self.sampler = shorter_sampler(backbone.sampler, config.rollout_steps)
        self.reference = deepcopy(backbone.denoiser).requires_grad_(False)
        # before the engine: ZeRO-3 splits the weights
        self.ema = Ema(backbone.denoiser, config.ema_decay)
        own_batch = config.prompts_per_step // world_size()
        self.engine = Engine(
            backbone.denoiser,
            config.optimizer,
            EngineConfig(
                zero_stage=config.zero_stage, bf16=config.bf16, micro_batch_size=own_batch
            ),
        )
        self.monitor = HackingMonitor(config.hacking, validation_ranges(reward))
        self.state = load_state(run, self.engine, self.ema, self.monitor, inputs)

    def roll_out(self, batch: Examples, noise: ClipNoise, graded: GradedSteps) -> Tensor:
        """Clean latents [B, C, T, h, w] with the graph that `graded` asks for."""
        return rollout(
            self.backbone,
            self.engine,
            batch.condition,
            batch.task,
            noise,
            sampler=self.sampler,
            graded=graded,
        )

    def anchor(self, clean: Tensor, noise: ClipNoise, batch: Examples) -> Tensor:
        """Squared distance of what the sampler follows, guidance included, to the reference's, per clip [B]."""
        sigma = anchor_sigmas(self.sampler, noise.generators("anchor")).to(clean)
        noisy = add_noise(clean, noise(ANCHOR_STREAM), sigma)
        with torch.no_grad():
            wanted = self._velocity(self.reference, noisy, sigma, batch)
        return velocity_anchor_loss(self._velocity(self.engine, noisy, sigma, batch), wanted)

    def _velocity(
        self, denoiser: nn.Module | Engine, noisy: Tensor, sigma: Tensor, batch: Examples
    ) -> Tensor:
        return self.backbone.velocity(
            denoiser, noisy, sigma, batch.condition, batch.task, **self.sampler.guidance
        )

    def update(self, loss: Tensor) -> dict[str, float]:
        """One backward, one step, one step of the moving average."""
        self.engine.backward(loss)
        metrics = self.engine.step()
        self.ema.update(self.engine.module)
        return metrics

    def validate_and_keep_best(self, step: int, validation: Examples) -> dict[str, float]:
        """Measure the moving average on the validation clips; write it to `best` if it is."""
        config, state = self.config, self.state
        found = validate(
            self.backbone,
            self.ema.module,
            self.reward,
            self.judge,
            validation,
            seed=config.seed,
            batch_size=config.validation_batch,
            num_samples=config.num_samples,
        )
        for index, clip in enumerate(found.samples):
            path = self.run.sample_path(step, f"validation_{index:02d}.mp4")
            write_video(path, clip, self.backbone.fps)
        alarms = self.monitor.observe(found.reading(self.reward.dimensions))
        state.first = state.first or found.metrics
        score = keep_best_score(
            config.keep_best, found.metrics, state.first, config.reward_weights, alarms
        )
        if score is not None and (state.best_score is None or score > state.best_score):
            state.best_score, state.best_step = score, step
            save_policy(self.backbone, self.ema.module, self.run.path / "best")
        return found.metrics | {
            "hacking/alarms": float(len(alarms)),
            "best/score": state.best_score or 0.0,
            "best/step": float(state.best_step),
        }

    def save(self, folder: Path) -> None:
        """One checkpoint."""
        save_state(folder, self.engine, self.ema, self.monitor, self.state)


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
    if backbone.sampler.kind == "adams":
        raise UserError(
            "the generator samples with 'adams', whose steps look back; RLHF differentiates through single steps: set its sampler "
            "kind to 'euler'"
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

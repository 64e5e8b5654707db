"""Training the denoiser by flow matching: the base from noise, the refiner from its base, in one stage or in several.

One page, `train_denoiser`: draw a batch, noise it, compare velocities, step, average. A run of one size reads a folder of clips
(`train_base`, `train_refiner`); one of several stages reads encoded buckets (`generator.training.progressive`).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from generator.base import BackboneSpec, SamplerSpec
from generator.checkpoint import DiTGenerator, load_generator
from generator.dit import DiT, DiTConfig
from generator.flow import add_noise, flow_matching_loss, sigma_schedule
from generator.parallel import sequence_group
from generator.plan.devices import peak_flops_here
from generator.plan.flops import LatentGrid, model_flops
from generator.refiner import (
    LowResConfig,
    check_sizes,
    downsample_frames,
    low_res_consistency,
    low_res_inputs,
    refiner_from_base,
)
from generator.sampling import noise_like, sample_frames
from generator.text import TextEncoder
from generator.training.latents import (
    Batch,
    BatchStream,
    LatentSet,
    SigmaConfig,
    TaskMixConfig,
    encode_clips,
    text_task,
    training_windows,
)
from generator.training.lora import LoraSettings, add_lora, merged, save_lora
from generator.training.stages import EarlyStop, EarlyStopConfig, StageConfig, check_stages
from generator.training.text_tuning import TextTuner
from generator.vae import VideoVAE
from reelhf.clips import cache_folder
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
from reelhf.run import RunFolder
from reelhf.training import TrainLoop, run_identity
from reelhf.video import write_video

VALIDATION_SIGMAS = (0.2, 0.4, 0.6, 0.8)
FREE_TO_CHANGE = frozenset(
    {"validate_every", "sample_every", "num_samples", "num_validation", "sequence_parallel"}
)
"""Keys that a resumed run may have otherwise."""
MAX_NAMES_SHOWN = 5


class DenoiserTrainConfig(Config):
    """Training of a base or a refiner: one stage of one size by itself, or the `stages` it names."""

    stage: Literal["base", "refiner"] = "base"
    """Which of the two the command line trains."""
    architecture: DiTConfig = DiTConfig()
    """Of a base; a refiner takes its base's but for checkpointing, compile and attention. Channels and text width follow the VAE and the
    text encoder."""
    num_frames: PositiveInt = 9
    """Frames per clip, 1 + 4n."""
    height: PositiveInt = 64
    """Pixels, a multiple of 16."""
    width: PositiveInt = 64
    """Pixels, a multiple of 16."""
    fps: PositiveFloat = 8.0
    """Frames per second of the clips."""
    max_clips: PositiveInt = 2048
    """Training windows cut from the clip folder, encoded once and kept in memory."""
    num_validation: PositiveInt = 32
    """Windows kept out of training, for the validation loss and the sample clips; at most a quarter of them."""

    num_steps: PositiveInt = 600
    """Optimizer steps."""
    batch_size: PositiveInt = 32
    """Samples per optimizer step over all processes."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes per optimizer step and process."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO stage."""
    bf16: bool = False
    """bfloat16 weights and activations with float32 master weights."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, warmup_steps=30)
    """AdamW."""
    ema_decay: float = Field(0.99, ge=0, lt=1)
    """Of the averaged weights, which are what is kept; about 1 - 10 / num_steps."""
    sigma: SigmaConfig = SigmaConfig()
    """Noise levels."""
    tasks: TaskMixConfig = TaskMixConfig()
    """Shares of text-to-image and image-to-video."""
    prompt_dropout: float = Field(0.1, ge=0, le=1)
    """Share of samples without a prompt, for guidance."""
    channel_weight_power: float = Field(1.0, ge=0)
    """Loss weight of a latent channel: how much it moves pixels, to this power. Normalised latents hide that a few channels
    carry colour and outline and the rest fine detail; 0 weighs them alike."""
    low_res: LowResConfig = LowResConfig()
    """Refiner only: how its input is made."""

    sampler_steps: PositiveInt = 20
    """Euler steps of the sampler that the checkpoint carries."""
    guidance_scale: float = Field(2.0, ge=0)
    """Its classifier-free guidance; 1 is none."""
    save_every: PositiveInt = 200
    """Steps between two checkpoints; the last step is always saved."""
    validate_every: PositiveInt = 100
    """Steps between two validation losses of the averaged weights."""
    sample_every: PositiveInt = 300
    """Steps between two sets of sample clips."""
    num_samples: int = Field(4, ge=0)
    """Sample clips per set."""
    seed: int = 0
    """Of weights, noise and order."""

    stages: tuple[StageConfig, ...] = ()
    """Stages one after another, from encoded buckets (`--data`). The size above is then what the checkpoint samples, and
    `num_steps`, `batch_size`, `gradient_accumulation_steps` and `max_clips` are not used."""
    micro_batches: PositiveInt = 1
    """With stages: forward passes per optimizer step over all processes, a multiple of their number; each of one bucket."""
    sequence_parallel: PositiveInt = 1
    """With stages: consecutive processes that share each clip, for clips too long for one."""
    balance: Literal["measured", "flops"] = "measured"
    """With stages: what a sample of a bucket costs. `measured`: timed at the start of the run and kept in its folder; `flops`: counted."""
    text_tuning: OptimizerConfig | None = None
    """Of a base: train the text encoder along, with this optimizer (a rate well below the denoiser's, such as lr: 1e-5); it is saved
    inside the generator. None keeps it as it is."""
    cache_prompts: bool = False
    """Keep embeddings of captions in the cache folder (`REELHF_CACHE`), for every run with this text encoder. A run with `stages` has
    them with its encoded clips already."""
    lora: LoraSettings | None = None
    """With stages and a generator to start from: train adapters in place of all weights."""

    @property
    def total_steps(self) -> int:
        """Of all stages."""
        return sum(stage.num_steps for stage in self.stages) if self.stages else self.num_steps

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        return self.num_frames, self.height, self.width

    @property
    def sampler(self) -> SamplerSpec:
        return self.sampler_for(self.frame_shape, self.sigma)

    def sampler_for(self, frame_shape: tuple[int, int, int], sigma: SigmaConfig) -> SamplerSpec:
        """For clips of another size, trained at these noise levels."""
        shift = sigma.shift
        if sigma.base_tokens is not None:
            spec = BackboneSpec(channels=self.architecture.channels)
            shift = sigma.shift_for(math.prod(spec.latent_shape(*frame_shape)[1:]))
        return SamplerSpec(
            "euler", sigma_schedule(self.sampler_steps, shift=shift), self.guidance_scale
        )

    @model_validator(mode="after")
    def _stages_make_sense(self) -> DenoiserTrainConfig:
        check_stages(self.stages)
        if self.stage == "base" and any(stage.low_res is not None for stage in self.stages):
            raise ValueError("low_res of a stage is a refiner's input; this is a base")
        if self.text_tuning is not None and any(stage.early_stop for stage in self.stages):
            raise ValueError(
                "text_tuning goes without early_stop, which brings back the denoiser's best weights only"
            )
        if self.text_tuning is not None and (self.stage == "refiner" or self.cache_prompts):
            raise ValueError(
                "text_tuning is for a base, whose text encoder a refiner takes over, and goes without cache_prompts, which keeps embeddings of "
                "weights that stay"
            )
        if self.lora is not None and not self.stages:
            raise ValueError("lora needs stages: it adapts a generator to what they name")
        if self.sequence_parallel > 1 and not self.stages:
            raise ValueError("sequence_parallel needs stages: a run of one size shares no clips")
        return self

    @model_validator(mode="after")
    def _accumulation_divides_the_batch(self) -> DenoiserTrainConfig:
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps}"
            )
        return self


def train_base(config: DenoiserTrainConfig, clips: Path, vae: Path, text: Path, out: Path) -> Path:
    """Train a base generator from a folder of captioned clips; resumes from the run folder's last checkpoint.

    Returns: the generator folder, `out/generator`.
    """
    init_distributed()
    seed_everything(config.seed)
    backbone = new_base(config, VideoVAE.load(vae), TextEncoder.load(text)).to(device())
    if config.cache_prompts:
        backbone.text.use_cache(cache_folder() / "prompts", text)
    data = encode_clips(backbone, training_windows(config, clips))
    prompts = data.condition.to(device())
    backbone.denoiser.fit_pooled_text(prompts.embeds, prompts.mask, prompts.token_shots)
    return train_denoiser(config, backbone, [one_stage(config, backbone, data)], out)


def new_base(config: DenoiserTrainConfig, vae: VideoVAE, text: TextEncoder) -> DiTGenerator:
    """A base generator that has learned nothing yet."""
    sizes = {"channels": vae.spec.channels, "text_width": text.embed_size, "low_res": False}
    return DiTGenerator(
        denoiser=DiT(config.architecture.model_copy(update=sizes)),
        vae=vae,
        text=text,
        sampler=config.sampler,
        role="base",
        frame_shape=config.frame_shape,
        fps=config.fps,
        spec=vae.spec,
    )


def train_refiner(config: DenoiserTrainConfig, clips: Path, base: Path, out: Path) -> Path:
    """Train a refiner that starts as its base; resumes from the run folder's last checkpoint.

    Returns: the generator folder, `out/generator`.
    """
    init_distributed()
    seed_everything(config.seed)
    base_generator = load_generator(base).to(device())
    if config.cache_prompts:
        base_generator.text.use_cache(cache_folder() / "prompts", base / "text")
    check_sizes(base_generator.spec, base_generator.frame_shape, config.frame_shape)
    backbone = refiner_from_base(base_generator, config.frame_shape, config.sampler)
    backbone.denoiser.run_as(config.architecture)
    windows = training_windows(config, clips)
    data = encode_clips(backbone, windows)
    low_res = low_res_inputs(
        base_generator, backbone, windows.frames, data.condition, config.low_res, seed=config.seed
    )
    _, *low_size = base_generator.frame_shape
    pairs = replace(data, low_res_latents=low_res)
    stage = one_stage(config, backbone, pairs, (low_size[0], low_size[1]))
    return train_denoiser(config, backbone, [stage], out)


class Stream(Protocol):
    """Where a stage's samples come from: a function of the step, so that nothing has to be remembered."""

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """This process's, as many on every process and at every step."""
        ...


@dataclass(frozen=True)
class Stage:
    """One stage as the loop sees it."""

    name: str
    num_steps: int
    stream: Stream
    validation: list[LatentSet]
    """Clips never trained on, one set per size; of the first one sample clips are drawn."""
    sampled: DiTGenerator
    """The backbone at the size, rate and sampler of the sample clips."""
    identity: tuple[Any, ...]
    """Of what it learns from, as `content_hash` takes it."""
    micro_batch_size: int = 1
    """Samples per forward pass, about."""
    accumulation_steps: int = 1
    """Forward passes per step and process, the same for all stages."""
    learning_rate: Callable[[int], float] | None = None
    """Of each of its steps; the optimizer's by default."""
    early_stop: EarlyStopConfig | None = None
    low_size: tuple[int, int] | None = None
    """Of a refiner: sides of the clips that the sample clips are made from."""


def one_stage(
    config: DenoiserTrainConfig,
    backbone: DiTGenerator,
    data: LatentSet,
    low_size: tuple[int, int] | None = None,
) -> Stage:
    """A run of one size from clips in memory; `low_size` as in `Stage`."""
    validation, training = data.split(config.num_validation)
    stream = BatchStream(config, training)
    return Stage(
        name=config.stage,
        num_steps=config.num_steps,
        stream=stream,
        validation=[validation],
        sampled=replace(backbone, fps=config.fps),
        identity=(data.captions, len(data)),
        micro_batch_size=stream.split.micro_batch_size,
        accumulation_steps=config.gradient_accumulation_steps,
        low_size=low_size,
    )


def train_denoiser(
    config: DenoiserTrainConfig, backbone: DiTGenerator, stages: Sequence[Stage], out: Path
) -> Path:
    """The loop; identical for base and refiner, one stage or several."""
    first = stages[0]
    weights = channel_weights(
        backbone, first.validation[0].latents[:4], config.channel_weight_power
    )
    if config.lora is not None:
        add_lora(backbone.denoiser, config.lora, backbone.lora_targets())
    run = RunFolder.open(out, config)
    engine = EngineConfig(
        zero_stage=config.zero_stage,
        bf16=config.bf16,
        micro_batch_size=first.micro_batch_size,
        gradient_accumulation_steps=first.accumulation_steps,
    )
    tuner = text_tuner(config, backbone, engine)
    loop = TrainLoop(
        run,
        config.model_copy(update={"num_steps": config.total_steps}),
        backbone.denoiser,
        engine,
        ema_decay=config.ema_decay,
        others={} if tuner is None else {"text": tuner.engine},
        averages={} if tuner is None else {"text": tuner.ema},
        identity=run_identity(
            config, *(part for s in stages for part in s.identity), free=FREE_TO_CHANGE
        ),
        learning_rate=rate_of_run(config, stages),
    )
    if config.sequence_parallel > 1:
        loop.engine.module.sequence_group = sequence_group(config.sequence_parallel)
    best = BestWeights(stages[-1].early_stop, loop.resumed)

    for step in loop.steps(f"training the {backbone.role}"):
        if best.stop.stopped:
            break
        stage, local = stage_at(stages, step)
        started = time.monotonic()

        # 1. Noise clean latents and compare the predicted velocity with the true one.
        loss_sum = torch.zeros((), device=device())
        seen: list[tuple[Batch, Tensor]] = []
        for batch in stage.stream.micro_batches(local):
            if tuner is not None:
                batch = tuner.show(batch)
            noisy = add_noise(batch.clean, batch.noise, batch.sigma)
            velocity = backbone.velocity(
                loop.engine, noisy, batch.sigma, batch.condition, batch.task
            )
            loss = flow_matching_loss(
                velocity, batch.clean, batch.noise, channel_weights=weights
            )  # [b]
            update = loop.update(loss.mean() * batch.weight)  # the last one moves the weights
            if tuner is not None:
                update |= tuner.learn()
            loss_sum += loss.detach().sum()
            seen.append((batch, loss.detach()))

        # 2. Report; validate, sample and save when due.
        total = all_reduce_sum(loss_sum).item() / config.sequence_parallel
        metrics = {"loss": total / batch.samples_of_step, **update}
        metrics |= speed_metrics(config, backbone, [b for b, _ in seen], time.monotonic() - started)
        if len(stages) > 1:
            metrics["stage"] = stages.index(stage)
        if update["skipped"]:
            name_bad_samples(step, seen)
        ends = local + 1 == stage.num_steps
        if ends or loop.is_due(step, config.validate_every):
            metrics["validation/loss"] = mean_validation_loss(
                backbone, loop.averaged, evaluated(tuner, stage.validation), weights
            )
            if stage.early_stop is not None:
                best.observe(step + 1, metrics["validation/loss"], loop.averaged)
        if config.num_samples and (ends or loop.is_due(step, config.sample_every)):
            sampled = replace(stage, sampled=with_text(tuner, stage.sampled))
            metrics |= save_samples(config, sampled, loop.averaged, run, step + 1)
        loop.end_step(step, metrics, kept=best.state_dict(), save=best.stop.stopped)

    # 3. Keep the averaged weights, after an early stop the best of them.
    if best.weights is not None:
        loop.averaged.load_state_dict(best.weights)
    averaged = loop.averaged
    if config.lora is not None:
        settings = config.lora
        loop.save_model("lora", lambda folder: save_lora(averaged, settings, folder))
        averaged = merged(averaged)
    kept = with_text(tuner, replace(backbone, denoiser=averaged))
    return loop.save_model("generator", kept.save)


def text_tuner(
    config: DenoiserTrainConfig, backbone: DiTGenerator, engine: EngineConfig
) -> TextTuner | None:
    """What trains the text encoder along, if the config asks for it."""
    if config.text_tuning is None:
        return None
    ratio = backbone.spec.temporal_ratio
    return TextTuner(
        backbone.text, config.text_tuning, engine, ema_decay=config.ema_decay, ratio=ratio
    )


def evaluated(tuner: TextTuner | None, sets: list[LatentSet]) -> list[LatentSet]:
    """Clips kept out of training as the text encoder now reads their prompts."""
    return sets if tuner is None else [tuner.encoded(data) for data in sets]


def with_text(tuner: TextTuner | None, backbone: DiTGenerator) -> DiTGenerator:
    """The generator with the text encoder as it now is."""
    return backbone if tuner is None else replace(backbone, text=tuner.averaged)


def stage_at(stages: Sequence[Stage], step: int) -> tuple[Stage, int]:
    """The stage of a step of the run, and which of its steps that is."""
    for stage in stages:
        if step < stage.num_steps:
            return stage, step
        step -= stage.num_steps
    raise ValueError(f"the stages end {step + 1} steps earlier")


def rate_of_run(
    config: DenoiserTrainConfig, stages: Sequence[Stage]
) -> Callable[[int], float] | None:
    """The learning rate of every step of the run; None where the optimizer's own holds throughout."""
    if all(stage.learning_rate is None for stage in stages):
        return None

    def rate(step: int) -> float:
        stage, local = stage_at(stages, min(step, config.total_steps - 1))
        return config.optimizer.lr if stage.learning_rate is None else stage.learning_rate(local)

    return rate


class BestWeights:
    """The averaged weights at the best validation so far, for a stage that may stop early; they travel with the checkpoint."""

    def __init__(self, config: EarlyStopConfig | None, resumed: dict[str, Any]) -> None:
        self.stop = EarlyStop(config)
        self.weights: dict[str, Tensor] | None = resumed.get("weights")
        if resumed:
            self.stop.load_state_dict(resumed["stop"])

    def observe(self, step: int, loss: float, averaged: DiT) -> None:
        """After a validation."""
        if self.stop.observe(step, loss):
            self.weights = {n: t.detach().cpu().clone() for n, t in averaged.state_dict().items()}
        if self.stop.stopped and is_main():
            print(
                f"stopped early at step {step}: the validation loss was best at step {self.stop.best_step} "
                f"({self.stop.best_loss:.5f})",
                file=sys.stderr,
            )

    def state_dict(self) -> dict[str, Any] | None:
        if self.stop.config is None:
            return None
        return {"stop": self.stop.state_dict(), "weights": self.weights}


def speed_metrics(
    config: DenoiserTrainConfig, backbone: DiTGenerator, batches: Sequence[Batch], seconds: float
) -> dict[str, float]:
    """Model FLOP/s of this process, and their share of the device's peak where that is known."""
    flops = 0.0
    for batch in batches:
        grid = LatentGrid(*batch.clean.shape[2:])
        flops += len(batch) * model_flops(
            backbone.denoiser.config,
            grid,
            batch.condition.embeds.shape[1],
            adapters_only=config.lora is not None,
        )
    flops /= config.sequence_parallel
    metrics = {"speed/step_seconds": seconds, "speed/flops_per_second": flops / seconds}
    peak = peak_flops_here(config.bf16)
    if peak is not None:
        metrics["speed/mfu"] = flops / seconds / peak
    return metrics


def name_bad_samples(step: int, seen: Sequence[tuple[Batch, Tensor]]) -> None:
    """On stderr: which samples of this process had a loss that is not finite."""
    bad = [
        f"{name} (loss {value:g})"
        for batch, loss in seen
        for name, value in zip(batch.names, loss.tolist(), strict=True)
        if not math.isfinite(value)
    ]
    if bad:
        more = f" and {len(bad) - MAX_NAMES_SHOWN} more" if len(bad) > MAX_NAMES_SHOWN else ""
        print(
            f"step {step + 1}: {', '.join(bad[:MAX_NAMES_SHOWN])}{more}",
            file=sys.stderr,
        )


@torch.no_grad()
def channel_weights(backbone: DiTGenerator, latents: Tensor, power: float) -> Tensor:
    """Pixel change (RMS) per unit change of each latent channel around `latents`, to `power`, with mean 1; [C]."""
    latents = latents.to(backbone.device)
    plain = backbone.decode(latents)[0]
    gains = []
    for channel in range(latents.shape[1]):
        moved = latents.clone()
        moved[:, channel] += 1.0
        gains.append((backbone.decode(moved)[0] - plain).square().mean().sqrt())
    weights = torch.stack(gains) ** power
    return weights / weights.mean()


@torch.no_grad()
def validation_loss(
    backbone: DiTGenerator, denoiser: DiT, data: LatentSet, weights: Tensor
) -> float:
    """Velocity error on clips never trained on, at fixed noise and four sigmas."""
    clean = data.latents.to(device())
    noise = noise_like(range(len(data)), tuple(clean.shape[1:])).to(device())
    task = text_task(data.latents, data.low_res_latents).to(device())
    condition = data.condition.to(device())
    losses = []
    for value in VALIDATION_SIGMAS:
        sigma = clean.new_full((len(data),), value)
        velocity = backbone.velocity(
            denoiser, add_noise(clean, noise, sigma), sigma, condition, task
        )
        losses.append(flow_matching_loss(velocity, clean, noise, channel_weights=weights).mean())
    return torch.stack(losses).mean().item()


def mean_validation_loss(
    backbone: DiTGenerator, denoiser: DiT, sets: Sequence[LatentSet], weights: Tensor
) -> float:
    """`validation_loss` over sets of several sizes, every clip counting alike."""
    losses = [validation_loss(backbone, denoiser, data, weights) for data in sets]
    if len(losses) == 1:
        return losses[0]
    counts = [len(data) for data in sets]
    return math.fsum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)


def save_samples(
    config: DenoiserTrainConfig, stage: Stage, denoiser: DiT, run: RunFolder, step: int
) -> dict[str, float]:
    """Clips of the first validation prompts from fixed seeds; a refiner enlarges the first validation clips.

    Returns: of a refiner, on rank 0, how well its clips show those they were made from (`low_res_consistency`, mean in dB).
    """
    if not is_main():
        return {}
    backbone, data = stage.sampled, stage.validation[0]
    chosen = data.rows(range(min(config.num_samples, len(data))))
    task = None
    if chosen.low_res_latents is not None:
        task = text_task(chosen.latents, chosen.low_res_latents).to(device())
    frames = sample_frames(
        backbone, chosen.captions, list(range(len(chosen))), task=task, denoiser=denoiser
    )
    for index, clip in enumerate(frames):
        write_video(run.sample_path(step, f"{index:02d}.mp4"), clip, backbone.fps)
    captions = "".join(f"{index:02d}.mp4\t{text}\n" for index, text in enumerate(chosen.captions))
    run.sample_path(step, "captions.tsv").write_text(captions, encoding="utf-8")
    if task is None or stage.low_size is None:
        return {}
    assert task.low_res_latents is not None
    enlarged = backbone.decode(task.low_res_latents)[0].clamp(0, 1)
    low_res = downsample_frames(enlarged, *stage.low_size).cpu()
    return {"samples/low_res_psnr": low_res_consistency(frames, low_res).mean().item()}

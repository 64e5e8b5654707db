"""The plan of one denoiser training: what it costs, what it needs, whether it fits, and the smallest change if it does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from generator.base import BackboneSpec
from generator.dit import DiTConfig
from generator.plan.devices import DEVICES, DeviceSpec
from generator.plan.flops import (
    LatentGrid,
    forward_flops,
    full_attention_flops,
    model_flops,
    training_flops,
)
from generator.plan.memory import (
    StateBytes,
    buffer_bytes,
    count_parameters,
    count_trained,
    effective_stage,
    peak_bytes,
    start_bytes,
    state_bytes,
    update_bytes,
)
from generator.training.denoiser import DenoiserTrainConfig
from generator.training.text import TextTrainConfig
from generator.training.vae import VAETrainConfig
from reelhf.config import Config, load_config
from reelhf.errors import UserError

PRESETS = {name: f"configs/generator/plan_{name}.yaml" for name in ("tiny", "1b", "7b")}
SIZES = {"480p": (480, 832), "720p": (704, 1280), "1080p": (1088, 1920)}
"""Height and width: the multiples of 16 (and of 32 where the picture allows) nearest to what the name says."""
PLANNED: dict[str, type[Config]] = {
    "base": DenoiserTrainConfig,
    "refiner": DenoiserTrainConfig,
    "vae": VAETrainConfig,
    "text": TextTrainConfig,
}
"""What can be planned, by the `stage:` of a YAML."""
MAX_DEVICES = 1024
MIN_TRACED_WIDTH = 1024
"""Narrower models spend their time on launching kernels, not on arithmetic: no share of a GPU's peak describes them."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device. Whatever happens in a step happens beside the states, one thing after another."""

    states: StateBytes
    activations: float
    """Forward and backward of one micro-batch."""
    buffers: float
    """DeepSpeed's; ZeRO-1 and 2 release theirs after the backward pass, ZeRO-3 does not, and all are counted throughout."""
    update: float
    """The optimizer's step."""
    evaluation: float
    """Validation and sample clips, through the averaged weights in float32."""
    start: float
    """Before ZeRO splits anything; nothing else is there yet."""

    @property
    def peak(self) -> float:
        beside = max(self.activations, self.update, self.evaluation)
        return max(self.states.total + self.buffers + beside, self.start)

    @property
    def reason(self) -> str:
        """What the peak is made of."""
        if self.start >= self.peak:
            return "the start, with whole float32 weights and their average"
        moments = {
            "the backward pass": self.activations,
            "the optimizer's step": self.update,
            "validation and sample clips": self.evaluation,
        }
        return max(moments, key=lambda name: moments[name])


@dataclass(frozen=True)
class Plan:
    """A training config on so many devices of one kind; every figure is computed when asked for."""

    config: DenoiserTrainConfig
    device: DeviceSpec
    devices: int
    text_tokens: int
    utilisation: float
    """Share of the peak that executed FLOPs reach."""

    def __post_init__(self) -> None:
        if self.devices % self.config.sequence_parallel:
            raise UserError(
                f"sequence_parallel {self.config.sequence_parallel} does not divide {self.devices} devices; use a multiple of it"
            )
        parts = self.groups * self.config.gradient_accumulation_steps
        if self.config.batch_size % parts:
            raise UserError(
                f"batch_size {self.config.batch_size} cannot be split over {self.groups} devices x "
                f"{self.config.gradient_accumulation_steps} accumulation steps; use a multiple of {parts}"
            )

    @property
    def groups(self) -> int:
        """Of devices that share their clips; as many as there are devices, unless they do."""
        return self.devices // self.config.sequence_parallel

    @property
    def architecture(self) -> DiTConfig:
        """As the trainer builds it: a refiner has one more input."""
        low_res = self.config.stage == "refiner"
        return self.config.architecture.model_copy(update={"low_res": low_res})

    @cached_property
    def grid(self) -> LatentGrid:
        spec = BackboneSpec(channels=self.architecture.channels)
        return LatentGrid(*spec.latent_shape(*self.config.frame_shape)[1:])

    @property
    def zero_stage(self) -> int:
        """The stage that DeepSpeed runs."""
        return effective_stage(self.config.zero_stage, self.config.bf16)

    @property
    def micro_batch(self) -> int:
        parts = self.groups * self.config.gradient_accumulation_steps
        return self.config.batch_size // parts

    @cached_property
    def num_parameters(self) -> int:
        return count_parameters(self.architecture, self.config.lora)

    @cached_property
    def num_trained(self) -> int:
        return count_trained(self.architecture, self.config.lora)

    @property
    def evaluated_clips(self) -> int:
        """In one forward pass of the averaged weights: the validation clips, or the sample clips with their guidance."""
        guided = 2 if self.config.guidance_scale != 1 else 1
        return max(self.config.num_validation, self.config.num_samples * guided)

    @cached_property
    def memory(self) -> DeviceMemory:
        config, parameters = self.config, self.num_parameters
        zero: dict[str, Any] = {"zero_stage": config.zero_stage, "bf16": config.bf16}
        size = self.architecture, self.grid, self.text_tokens
        without_gradients = self.architecture.model_copy(update={"checkpointing": False})
        return DeviceMemory(
            states=state_bytes(parameters, devices=self.devices, trained=self.num_trained, **zero),
            # clips that several devices share are split over them, but for what is computed before and after the layers
            activations=self.micro_batch
            * peak_bytes(*size, training=True, bf16=config.bf16, lora=config.lora)
            / config.sequence_parallel,
            buffers=buffer_bytes(parameters, **zero),
            update=update_bytes(self.num_trained, devices=self.devices, **zero),
            evaluation=self.evaluated_clips
            * peak_bytes(without_gradients, *size[1:], training=False, bf16=False),
            start=start_bytes(parameters),
        )

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.device.usable_bytes

    @property
    def speed(self) -> float:
        """Assumed FLOP/s of one device in training."""
        return self.utilisation * self.device.peak_flops(self.config.bf16)

    @property
    def clips_per_device(self) -> float:
        return self.config.batch_size / self.devices

    @property
    def step_seconds(self) -> float:
        """Forward, backward and recomputation of a device's share; nothing for communication, data and saving."""
        executed = training_flops(
            self.architecture,
            self.grid,
            self.text_tokens,
            adapters_only=self.config.lora is not None,
        )
        return self.clips_per_device * executed / self.speed

    @property
    def mfu(self) -> float:
        """Model FLOPs over peak: below the assumed share where layers are computed twice."""
        adapters = self.config.lora is not None
        size = self.architecture, self.grid, self.text_tokens
        useful = self.clips_per_device * model_flops(*size, adapters_only=adapters)
        return useful / self.step_seconds / self.device.peak_flops(self.config.bf16)

    @property
    def evaluations_per_sample(self) -> int:
        """Denoiser evaluations for one clip: steps, twice with guidance."""
        return self.config.sampler_steps * (2 if self.config.guidance_scale != 1 else 1)

    @property
    def sample_seconds(self) -> float:
        """One clip's denoising on one device at the training precision, without its decoding."""
        once = forward_flops(self.architecture, self.grid, self.text_tokens).total
        return self.evaluations_per_sample * once / self.speed

    def changed(self, devices: int | None = None, **keys: Any) -> Plan:
        """The same plan with other keys of its config; dots reach inside, as on the command line."""
        data = self.config.model_dump()
        for key, value in keys.items():
            *parents, last = key.split(".")
            node = data
            for parent in parents:
                node = node[parent]
            node[last] = value
        return replace(
            self,
            config=DenoiserTrainConfig.model_validate(data),
            devices=devices or self.devices,
        )

    def as_json(self) -> dict[str, Any]:
        """Every figure: bytes, FLOPs and seconds."""
        size = self.architecture, self.grid, self.text_tokens
        forward = forward_flops(*size)
        return {
            "config": self.config.model_dump(mode="json"),
            "device": asdict(self.device),
            "devices": self.devices,
            "text_tokens": self.text_tokens,
            "latent_grid": list(self.grid),
            "tokens": self.grid.tokens,
            "parameters": self.num_parameters,
            "trained_parameters": self.num_trained,
            "flops": {
                "forward": forward.total,
                **{f"forward_{kind}": value for kind, value in forward._asdict().items()},
                "forward_full_attention": full_attention_flops(*size).total,
                "training": training_flops(*size, adapters_only=self.config.lora is not None),
                "training_model": model_flops(*size, adapters_only=self.config.lora is not None),
            },
            "memory": {
                **{f"states_{name}": value for name, value in asdict(self.memory.states).items()},
                **{k: v for k, v in asdict(self.memory).items() if k != "states"},
                "peak": self.memory.peak,
                "usable": self.device.usable_bytes,
            },
            "time": {
                "assumed_utilisation": self.utilisation,
                "step": self.step_seconds,
                "mfu": self.mfu,
                "sample": self.sample_seconds,
            },
            "fits": self.fits,
            "remedies": [] if self.fits else remedies(self),
        }


def read_training_config(words: Sequence[str], size: str | None) -> Config:
    """The config, one of `PLANNED`, that `PRESET|CONFIG.yaml [key=value ...]` and `--size` stand for; keys win over the size."""
    if not words or "=" in words[0]:
        raise UserError(
            f"no config to plan: give a preset ({', '.join(PRESETS)}) or a YAML of `reelhf generator train`, "
            "such as configs/generator/base_toy.yaml"
        )
    path = PRESETS.get(words[0].lower(), words[0])
    if path == words[0] and "/" not in path and not path.endswith((".yaml", ".yml")):
        raise UserError(
            f"no preset '{path}'; expected {', '.join(PRESETS)}, or a YAML of `reelhf generator train`"
        )
    overrides = list(words[1:])
    if size is not None:
        height, width = frame_size(size)
        overrides = [f"height={height}", f"width={width}", *overrides]
    config = load_config(_class_of(path), path, overrides)
    if size is not None and getattr(config, "stages", ()):
        raise UserError(f"--size {size}: {path} has stages, and each has sizes of its own")
    return config


def frame_size(name: str) -> tuple[int, int]:
    """Height and width of a size's name. Raises: UserError naming the ones there are."""
    if name.lower() not in SIZES:
        known = ", ".join(f"{key} ({h}x{w})" for key, (h, w) in SIZES.items())
        raise UserError(f"--size {name}: expected {known}; or give height=H width=W")
    return SIZES[name.lower()]


def remedies(plan: Plan) -> list[str]:
    """Changes that make it fit, as words for the command line: on the same devices, on more, on another kind, or smaller."""
    found = []
    can_start = plan.memory.start <= plan.device.usable_bytes  # no key changes that
    if can_start:
        for candidate, words in _savings(plan):
            if candidate.fits:
                found.append(f"on the same {count_of_devices(plan.devices)}: {words}")
                break
        else:
            found += _on_more_devices(plan)
    mended = bool(found)
    elsewhere = [
        device.name
        for device in DEVICES.values()
        if device.name not in (plan.device.name, "cpu") and replace(plan, device=device).fits
    ]
    if elsewhere:
        found.append(f"as it is on another device: --device {' or '.join(elsewhere)}")
    if mended:
        return found
    return found + (_shorter_clips(plan) if can_start else [_too_large(plan)])


def _savings(plan: Plan) -> Iterator[tuple[Plan, str]]:
    """Every combination of what saves memory without another model, clip or batch, the fewest and cheapest changes first."""
    config = plan.config
    stages = range(config.zero_stage, 4) if plan.devices > 1 else [config.zero_stage]
    micro_batches = [n for n in range(plan.micro_batch, 0, -1) if plan.micro_batch % n == 0]
    evaluations = {
        (config.num_validation, config.num_samples): 0,
        (min(config.num_validation, 2), min(config.num_samples, 1)): 1,
        (1, 0): 2,
    }
    choices = sorted(  # by price: what costs nothing but messages, then recomputation, then what is measured less or less exactly
        product(
            stages, micro_batches, evaluations, {config.bf16, True}, {True, _checkpoints(plan)}
        ),
        key=lambda c: (
            0.5 * (c[0] - config.zero_stage)
            + 0.3 * micro_batches.index(c[1])
            + evaluations[c[2]]
            + 1.5 * (c[3] != config.bf16)
            + 1.0 * (c[4] != _checkpoints(plan))
        ),
    )
    now = config.model_dump() | {"architecture.checkpointing": _checkpoints(plan)}
    for stage, micro_batch, (validation, samples), bf16, checkpointing in choices:
        steps = config.gradient_accumulation_steps * plan.micro_batch // micro_batch
        keys = {
            "zero_stage": stage,
            "gradient_accumulation_steps": steps,
            "num_validation": validation,
            "num_samples": samples,
            "bf16": bf16,
            "architecture.checkpointing": checkpointing,
        }
        different = {key: value for key, value in keys.items() if value != now[key]}
        yield plan.changed(**different), " ".join(words_of(different))


def _on_more_devices(plan: Plan) -> list[str]:
    devices = plan.devices
    while (devices := 2 * devices) <= MAX_DEVICES:
        parts = devices * plan.config.gradient_accumulation_steps
        keys = {"batch_size": parts} if plan.config.batch_size % parts else {}
        for candidate, words in _savings(plan.changed(devices=devices, **keys)):
            if candidate.fits:
                changes = " ".join((f"--devices {devices}", *words_of(keys), words)).strip()
                return [f"on more devices: {changes}"]
    return []


def _shorter_clips(plan: Plan) -> list[str]:
    """Half as many frames, and half again, when everything else has been tried."""
    num_frames = plan.config.num_frames
    while num_frames > 1:
        num_frames = 1 + (num_frames - 1) // 8 * 4
        for candidate, words in _savings(plan.changed(num_frames=num_frames)):
            if candidate.fits:
                return [f"shorter clips: num_frames={num_frames} {words}".strip()]
    return ["nothing here makes it fit: not even single frames do; a smaller size is needed"]


def _too_large(plan: Plan) -> str:
    return (
        "nothing here makes it fit: before ZeRO splits anything, float32 weights and their average take "
        f"{plan.memory.start / 1e9:.0f} GB on every device; a narrower model is needed"
    )


def _checkpoints(plan: Plan) -> bool | str:
    return plan.config.architecture.checkpointing


def words_of(keys: dict[str, Any]) -> list[str]:
    """Keys as the command line has them."""
    return [f"{key}={str(value).lower()}" for key, value in keys.items()]


def count_of_devices(devices: int) -> str:
    return f"{devices} device{'s' * (devices > 1)}"


def _class_of(path: str) -> type[Config]:
    """Other configs have other keys: say what can be planned rather than which key is unknown."""
    import yaml

    from reelhf.config import find_config

    found = find_config(path)
    try:
        data = yaml.safe_load(found.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return DenoiserTrainConfig  # load_config says what is wrong with it
    stage = data.get("stage") if isinstance(data, dict) else None
    if stage not in PLANNED:
        came = "no `stage:`" if stage is None else f"`stage: {stage}`"
        known = ", ".join(f"`stage: {name}`" for name in PLANNED)
        raise UserError(f"{found} has {came}; a plan is of a generator's training: {known}")
    return PLANNED[stage]

"""Plans of what is not a denoiser: a VAE with what it trains against, and a text encoder.

Both are run as they are, forward and backward, on meta tensors: parameters, FLOPs and live bytes are counted, not worked out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from generator.plan.devices import DeviceSpec
from generator.plan.memory import LiveBytes, StateBytes, buffer_bytes, state_bytes
from generator.plan.planner import words_of
from generator.text import TextEncoderConfig, language_model_config
from generator.training.discriminators import HybridDiscriminator, adversarial_loss
from generator.training.text import TextTrainConfig
from generator.training.vae import VAETrainConfig
from generator.vae import VideoVAE
from reelhf.config import Config
from reelhf.errors import UserError

MEASURED_AT_ONCE = 8
"""Held-out clips in one pass of the VAE (`generator.reconstruction`)."""


@dataclass(frozen=True)
class Cost:
    """Of one pass."""

    flops: float
    peak: float
    """Bytes alive at most, beside the weights."""


def traced(run: Callable[[], object], modules: list[nn.Module]) -> Cost:
    """FLOPs and live bytes of what `run` does with modules on meta tensors."""
    for module in modules:
        for parameter in filter(lambda p: p.requires_grad, module.parameters()):
            # gradients are states
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    known = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    live = LiveBytes("meta", known)
    with FlopCounterMode(display=False) as counter:
        run()
    with live:  # apart: the counter's hooks on modules keep tensors alive
        run()
    return Cost(counter.get_total_flops(), live.peak)


@dataclass(frozen=True)
class NetworkPlan:
    """One training of a VAE or a text encoder on so many devices of one kind."""

    config: VAETrainConfig | TextTrainConfig
    device: DeviceSpec
    devices: int
    text_tokens: int
    utilisation: float

    def __post_init__(self) -> None:
        if self.config.batch_size % self.devices:
            raise UserError(
                f"batch_size {self.config.batch_size} cannot be split over {self.devices} devices; use a multiple of {self.devices}"
            )

    @property
    def samples(self) -> int:
        """Per device and step."""
        return self.config.batch_size // self.devices

    @cached_property
    def networks(self) -> dict[str, int]:
        """Trained parameters by network."""
        return _networks(self.config)

    @cached_property
    def passes(self) -> dict[str, Cost]:
        """What happens in a step, one after another, and at the end of a run."""
        if isinstance(self.config, VAETrainConfig):
            return vae_passes(self.config, self.samples)
        return text_passes(self.config, self.samples, self.text_tokens)

    @cached_property
    def states(self) -> StateBytes:
        each = []
        for name, count in self.networks.items():
            zero = (
                min(self.config.zero_stage, 2)
                if name == "discriminators"
                else self.config.zero_stage
            )
            states = state_bytes(count, zero_stage=zero, devices=self.devices, bf16=False)
            averaged = name == "VAE"
            each.append(states if averaged else replace(states, average=0.0))
        sums = {key: sum(asdict(one)[key] for one in each) for key in asdict(each[0])}
        return StateBytes(**sums)

    @property
    def buffers(self) -> float:
        return max(
            buffer_bytes(count, zero_stage=self.config.zero_stage, bf16=False)
            for count in self.networks.values()
        )

    @property
    def peak(self) -> float:
        """Bytes on one device."""
        return self.states.total + self.buffers + max(cost.peak for cost in self.passes.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.device.usable_bytes

    @property
    def flops_per_step(self) -> float:
        """Of one device."""
        return sum(cost.flops for name, cost in self.passes.items() if name != "held-out clips")

    @property
    def step_seconds(self) -> float:
        return self.flops_per_step / (self.utilisation * self.device.peak_flops(False))

    def changed(self, devices: int | None = None, **keys: Any) -> NetworkPlan:
        config = self.config.model_copy(update=keys)
        return replace(self, config=config, devices=devices or self.devices)

    def as_json(self) -> dict[str, Any]:
        """Every figure: bytes, FLOPs and seconds."""
        return {
            "config": self.config.model_dump(mode="json"),
            "device": asdict(self.device),
            "devices": self.devices,
            "parameters": self.networks,
            "passes": {name: asdict(cost) for name, cost in self.passes.items()},
            "states": asdict(self.states),
            "memory": {"peak": self.peak, "usable": self.device.usable_bytes},
            "time": {"assumed_utilisation": self.utilisation, "step": self.step_seconds},
            "fits": self.fits,
            "remedies": [] if self.fits else network_remedies(self),
        }


def vae_passes(config: VAETrainConfig, samples: int) -> dict[str, Cost]:
    """The passes of a VAE's step over so many crops, and of its held-out clips."""
    ratio = config.vae.spatial_ratio
    side = min(config.crop, config.height // 2 // ratio * ratio, config.width // 2 // ratio * ratio)
    with torch.device("meta"):
        vae = VideoVAE(config.vae)
        frames = torch.zeros(samples, 3, config.num_frames, side, side)
        noise = torch.zeros(samples, *vae.spec.latent_shape(*frames.shape[2:]))
    vae.encoder.shortcut.requires_grad_(False)
    vae.decoder.shortcut.requires_grad_(False)

    def rebuild() -> None:
        made, posterior = vae(frames, noise, checkpoint_chunk=config.checkpoint_chunk)
        ((made - frames).square().mean() + posterior.kl()).backward()

    passes = {"forward and backward": traced(rebuild, [vae])}
    if config.adversarial.weight:
        with torch.device("meta"):
            opponent = HybridDiscriminator(config.adversarial.discriminators)
            picks = torch.zeros(samples, dtype=torch.long)

        def pull() -> None:
            leaf = frames.detach().requires_grad_(True)
            verdict = opponent.verdict(leaf, picks)
            if config.perceptual.weight:
                with torch.no_grad():
                    opponent.verdict(frames, picks)
            adversarial_loss(verdict.logits).backward()

        def learn() -> None:
            opponent(frames, frames, picks)[0].backward()

        passes["pull of the discriminators"] = traced(pull, [opponent.eval().requires_grad_(False)])
        passes["their own turn"] = traced(learn, [opponent.train().requires_grad_(True)])
    with torch.device("meta"):
        held_out = torch.zeros(
            min(MEASURED_AT_ONCE, config.num_held_out),
            3,
            config.num_frames,
            config.height,
            config.width,
        )
    plain = vae.requires_grad_(False).eval()
    passes["held-out clips"] = traced(lambda: plain.reconstruct(held_out), [plain])
    return passes


def text_passes(config: TextTrainConfig, samples: int, tokens: int) -> dict[str, Cost]:
    """Forward and backward of a text encoder over so many captions."""
    length = min(tokens, config.text.max_tokens)
    with torch.device("meta"):
        model = _language_model(config.text)
        ids = torch.zeros(samples, length, dtype=torch.long)

    def learn() -> Tensor:
        # made masks, that is none: making one looks at values, which meta tensors lack
        masks = {"full_attention": None, "sliding_attention": None}
        logits = model(input_ids=ids, attention_mask=masks, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
        loss.backward()
        return loss

    return {"forward and backward": traced(learn, [model])}


def _networks(config: Config) -> dict[str, int]:
    with torch.device("meta"):
        if isinstance(config, TextTrainConfig):
            modules: dict[str, nn.Module] = {"text encoder": _language_model(config.text)}
        else:
            assert isinstance(config, VAETrainConfig)
            modules = {"VAE": VideoVAE(config.vae)}
            if config.adversarial.weight:
                modules["discriminators"] = HybridDiscriminator(config.adversarial.discriminators)
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}


def _language_model(config: TextEncoderConfig) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(
        language_model_config(config), attn_implementation="sdpa"
    )


def network_remedies(plan: NetworkPlan) -> list[str]:
    """Changes that make it fit, as words for the command line."""
    for candidate, words in _savings(plan):
        if candidate.fits:
            return [words]
    return [
        "nothing here makes it fit: smaller crops, shorter clips or a narrower network are needed"
    ]


def _savings(plan: NetworkPlan) -> Iterator[tuple[NetworkPlan, str]]:
    config = plan.config
    splits = [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
    for devices in [n for n in splits if n >= plan.devices]:
        words = f"--devices {devices}" if devices != plan.devices else ""
        choices: list[dict[str, Any]] = [{"zero_stage": s} for s in range(config.zero_stage, 4)]
        if isinstance(config, VAETrainConfig) and config.checkpoint_chunk != 1:
            choices += [{**choice, "checkpoint_chunk": 1} for choice in choices]
        for keys in choices:
            different = {key: value for key, value in keys.items() if getattr(config, key) != value}
            yield (
                plan.changed(devices=devices, **different),
                " ".join([words, *words_of(different)]).strip(),
            )
    for size in reversed(splits[:-1]):
        if size % plan.devices == 0:
            yield plan.changed(batch_size=size), f"batch_size={size}"

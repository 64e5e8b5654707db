"""What the diffusers adapters share: a pipeline's modules behind the `VideoBackbone` protocol.

A pipeline is only a bag of modules here: its `__call__` runs without gradients and its scheduler counts steps, so neither
is used. Each family's file says how its transformer is called, how its VAE is normalised and decoded, and which sigmas
its own schedule walks; another convention than ours (`generator.base`) is converted there.

Unconditional rows (guidance, dropped prompts) carry the embedding of the empty prompt, as in these families' training.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from generator.base import BackboneSpec, Condition, Role, SamplerSpec, Task
from generator.flow import expand_sigma
from generator.guidance import GuidedVelocity
from generator.sampling import SamplesClips
from reelhf.errors import UserError
from reelhf.progress import silence_transformers
from reelhf.run import seal

CARD = "reelhf.json"
"""Beside `model_index.json` in a folder that we saved: sampler, frame shape, fps."""

_LORA_TARGET = re.compile(
    r"(transformer_)?blocks\..*(to_[qkv]|to_out\.0|ffn?\.net\.0\.proj|ffn?\.net\.2)"
)

Backbone = TypeVar("Backbone", bound="DiffusersBackbone")


@dataclass(frozen=True)
class PatchedSpec(BackboneSpec):
    """Latents of a VAE whose legal clip sizes are coarser than its ratios."""

    patch: int = 1
    """Side of the transformer's patch, in latent pixels: H and W are multiples of spatial_ratio * patch."""
    frame_step: int = 4
    """F = 1 + frame_step * n."""

    def check(self, num_frames: int, height: int, width: int) -> None:
        legal = BackboneSpec(self.channels, self.frame_step, self.spatial_ratio * self.patch)
        legal.check(num_frames, height, width)


@dataclass
class DiffusersBackbone(GuidedVelocity, SamplesClips):
    """`VideoBackbone` made of a diffusers pipeline. The VAE and the text encoder are frozen here."""

    pipe: Any
    """The pipeline: tokenizer, text_encoder, transformer, vae, scheduler."""
    denoiser: nn.Module = None  # type: ignore[assignment]  # the pipeline's transformer
    sampler: SamplerSpec = None  # type: ignore[assignment]  # the family's own schedule
    frame_shape: tuple[int, int, int] = None  # type: ignore[assignment]  # the family's own
    fps: float = 0.0
    role: Role = "base"
    spec: PatchedSpec = field(init=False)

    pipeline_class: ClassVar[str]
    default_fps: ClassVar[float]
    default_steps: ClassVar[int] = 50
    default_guidance: ClassVar[float]

    def __post_init__(self) -> None:
        self.spec = self.make_spec()
        if self.denoiser is None:
            self.denoiser = self.pipe.transformer
        self.frame_shape = tuple(self.frame_shape or self.own_frame_shape())
        self.spec.check(*self.frame_shape)
        self.fps = self.fps or self.own_fps()
        self.sampler = self.sampler or SamplerSpec(
            "euler", self.sigmas(self.default_steps, self.frame_shape), self.default_guidance
        )
        for module in (self.pipe.vae, self.pipe.text_encoder):
            module.eval().requires_grad_(False)

    # What a family says of itself.

    @abstractmethod
    def make_spec(self) -> PatchedSpec:
        """Raises UserError for a relative of the family that this adapter does not cover."""

    @abstractmethod
    def own_frame_shape(self) -> tuple[int, int, int]:
        """(F, H, W) that the published pipeline makes by default."""

    def own_fps(self) -> float:
        return self.default_fps

    @abstractmethod
    def sigmas(self, num_steps: int, frame_shape: tuple[int, int, int]) -> tuple[float, ...]:
        """The schedule of the pipeline, num_steps + 1 edges from 1.0 to 0.0."""

    @property
    def takes_image(self) -> bool:
        """Whether the transformer was trained with clean first frames at sigma 0."""
        return False

    @abstractmethod
    def embed(self, prompts: list[str]) -> Condition:
        """Prompts as the transformer wants them, [B, max_tokens, E]; a row's mask has a True."""

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, noisy: Tensor, sigma: Tensor, condition: Condition
    ) -> Tensor:
        """Velocity in our convention; every argument in the denoiser's dtype but sigma, [B] or [B, T] float32."""

    @abstractmethod
    def decode(self, latents: Tensor, state: object | None = None) -> tuple[Tensor, object]: ...

    @abstractmethod
    def normalise(self, latents: Tensor) -> Tensor:
        """What the VAE encodes -> what the transformer denoises."""

    @abstractmethod
    def denormalise(self, latents: Tensor) -> Tensor: ...

    # The protocol.

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def to(self: Backbone, device: torch.device | str) -> Backbone:
        self.pipe.to(device)
        self.denoiser.to(device)
        self.__dict__.pop("unconditional", None)
        return self

    def configured(
        self: Backbone,
        *,
        frame_shape: tuple[int, int, int] | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Backbone:
        """The same model at another clip size, number of steps or guidance; the schedule is the family's for that size."""
        frame_shape = frame_shape or self.frame_shape
        self.spec.check(*frame_shape)
        sampler = self.sampler
        if guidance_scale is not None:
            sampler = replace(sampler, guidance_scale=guidance_scale)
        if num_steps is not None or frame_shape != self.frame_shape:
            sampler = replace(
                sampler, sigmas=self.sigmas(num_steps or sampler.num_steps, frame_shape)
            )
        return replace(self, frame_shape=frame_shape, sampler=sampler)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        return self.embed(list(prompts)).to(self.device)

    @cached_property
    def unconditional(self) -> Condition:
        """The empty prompt, one row."""
        return self.encode_prompts([""])

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        self.spec.check(*frames.shape[-3:])
        vae = self.pipe.vae
        pixels = (2 * frames - 1).to(device=vae.device, dtype=vae.dtype)
        return self.normalise(vae.encode(pixels).latent_dist.mode().float())

    def unguided(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        sigma: Tensor,
        condition: Condition,
        task: Task,
        features: Sequence[int] = (),
    ) -> Tensor:
        if features:
            raise ValueError(f"{type(self).__name__} has no features to hand out")
        inputs, frame_sigma = noisy, sigma.float()
        known = task.condition_mask[:, 0, :, 0, 0] > 0 if self.takes_image else None  # [B, T]
        if known is not None:
            full_sigma = expand_sigma(frame_sigma, noisy)[:, 0, :, 0, 0].expand_as(known)
            given = known[:, None, :, None, None]
            inputs = noisy.where(~given, task.condition_latents.to(noisy))
            frame_sigma = full_sigma.where(~known, 0.0)
        dtype = _compute_dtype(denoiser)
        condition = self._with_empty_prompts(condition).to(dtype=dtype)
        velocity = self.predict(denoiser, inputs.to(dtype), frame_sigma, condition).float()
        if known is None:
            return velocity
        # of a given frame the velocity is known too: it points at that frame
        distance = full_sigma[:, None, :, None, None].clamp_min(1e-6)
        exact = (noisy - task.condition_latents.to(noisy)) / distance
        return velocity.where(~given, exact)

    def _with_empty_prompts(self, condition: Condition) -> Condition:
        """Rows without a prompt (mask all False) become rows with the empty prompt."""
        given = condition.mask.any(1)
        empty = self.unconditional
        return Condition(
            condition.embeds.where(given[:, None, None], empty.embeds.to(condition.embeds)),
            condition.mask.where(given[:, None], empty.mask.to(condition.mask)),
        )

    def text_to_video_task(self, batch: int, num_frames: int, height: int, width: int) -> Task:
        channels, *grid = self.spec.latent_shape(num_frames, height, width)
        zeros = torch.zeros(batch, channels, *grid, device=self.device)
        return Task(zeros, zeros[:, :1].clone())

    def image_task(self, first_frames: Tensor, num_frames: int, height: int, width: int) -> Task:
        if not self.takes_image:
            raise UserError(
                f"this {self.pipeline_class} model makes clips from text alone; it takes no first frame"
            )
        if first_frames.shape[-2:] != (height, width):
            raise ValueError(
                f"first frames {tuple(first_frames.shape[-2:])} for clips of {(height, width)}"
            )
        task = self.text_to_video_task(len(first_frames), num_frames, height, width)
        task.condition_latents[:, :, :1] = self.encode(first_frames.unsqueeze(2))
        task.condition_mask[:, :, :1] = 1.0
        return task

    def frames_task(
        self, frames: Mapping[int, Tensor], num_frames: int, height: int, width: int
    ) -> Task:
        """Diffusers models start from a first frame, if from any."""
        others = [str(index) for index in frames if index % num_frames]
        if others:
            raise UserError(
                f"a {self.pipeline_class} model takes a first frame only; frame {', '.join(others)} was given"
            )
        return self.image_task(next(iter(frames.values())), num_frames, height, width)

    def low_res_task(self, low_res_frames: Tensor, height: int, width: int) -> Task:
        raise ValueError(
            "low-resolution latents are an input of a refiner; this is a base generator"
        )

    def lora_targets(self) -> list[str]:
        """Attention and feed-forward layers of every block."""
        return [
            name
            for name, module in self.denoiser.named_modules()
            if isinstance(module, nn.Linear) and _LORA_TARGET.fullmatch(name)
        ]

    def save(self, directory: Path) -> None:
        """A diffusers folder that its own pipeline reads too, with our card beside it, sealed."""
        silence_transformers()
        directory = Path(directory)
        self.pipe.register_modules(transformer=self.denoiser)
        self.pipe.save_pretrained(directory)
        (directory / CARD).write_text(json.dumps(self.card(), indent=2) + "\n")
        seal(directory)

    def card(self) -> dict[str, Any]:
        """What a folder of ours says beyond diffusers' own files."""
        return {
            "sampler": asdict(self.sampler),
            "frame_shape": list(self.frame_shape),
            "fps": self.fps,
        }


def _compute_dtype(denoiser: nn.Module) -> torch.dtype:
    """The dtype that a transformer, or the engine around it, computes in; some of its layers may stay in float32."""
    module = getattr(denoiser, "module", denoiser)
    return next(
        parameter.dtype
        for name, parameter in module.named_parameters()
        if name.endswith("proj_out.weight")
    )

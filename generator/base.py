"""What every video generator offers: the protocol and the small frozen records that cross folders.

Conventions (the same everywhere): frames are float RGB in [0, 1], `[B, 3, F, H, W]`; latents are normalised per channel,
`[B, C, T, h, w]`; sigma runs from 1 (pure noise) to 0 (clean), `noisy = (1 - sigma) * clean + sigma * noise` and
`velocity = noise - clean`. Another convention is converted inside the adapter that needs it and nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args, runtime_checkable

from reelhf.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Role = Literal["base", "refiner"]
SamplerKind = Literal["euler", "adams", "renoise"]
NO_SHOT = 1 << 30
"""Start of a shot that a row of a batch does not have: after every latent frame."""


@dataclass(frozen=True)
class BackboneSpec:
    """Shape of the latents. The defaults are Seedance 1.0's: 4 x 16 x 16 compression into 48 channels (2506.09113, 2.1)."""

    channels: int = 48
    temporal_ratio: int = 4
    spatial_ratio: int = 16

    def check(self, num_frames: int, height: int, width: int) -> None:
        """Raise UserError unless F = 1 + ratio * n and H, W are positive multiples of the spatial ratio."""
        if num_frames < 1 or (num_frames - 1) % self.temporal_ratio:
            lower = 1 + max(num_frames - 1, 0) // self.temporal_ratio * self.temporal_ratio
            raise UserError(
                f"{num_frames} frames: the causal VAE needs 1 + {self.temporal_ratio} * n frames; "
                f"use {lower} or {lower + self.temporal_ratio}"
            )
        for name, size in (("height", height), ("width", width)):
            if size < self.spatial_ratio or size % self.spatial_ratio:
                lower = max(size // self.spatial_ratio, 1) * self.spatial_ratio
                raise UserError(
                    f"{name} {size} is not a positive multiple of {self.spatial_ratio}; "
                    f"use {lower} or {lower + self.spatial_ratio}"
                )

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, h, w) of a clip of this size."""
        self.check(num_frames, height, width)
        return (
            self.channels,
            1 + (num_frames - 1) // self.temporal_ratio,
            height // self.spatial_ratio,
            width // self.spatial_ratio,
        )


@dataclass(frozen=True)
class SamplerSpec:
    """How a checkpoint is sampled: it travels with the weights, and everyone samples with it, RLHF included."""

    kind: SamplerKind = "euler"
    """`euler`: one ODE step per interval. `adams`: the same evaluations, second order (Adams-Bashforth). `renoise`: predict x0,
    then add fresh noise at the next sigma."""
    sigmas: tuple[float, ...] = (1.0, 0.0)
    """Interval edges, strictly descending from 1.0 to 0.0: one denoiser evaluation (NFE) per interval."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is none and costs one evaluation less per step."""
    guidance_rescale: float = 0.0
    """How far the guided velocity is brought back to the spread of the unguided one, 0 to 1 (2305.08891)."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(SamplerKind):
            raise UserError(
                f"sampler kind '{self.kind}'; expected {' or '.join(map(repr, get_args(SamplerKind)))}"
            )
        if not 0 <= self.guidance_rescale <= 1:
            raise UserError(f"guidance_rescale {self.guidance_rescale}; expected 0 to 1")
        sigmas = tuple(float(sigma) for sigma in self.sigmas)
        descending = all(high > low for high, low in itertools.pairwise(sigmas))
        if len(sigmas) < 2 or sigmas[0] != 1.0 or sigmas[-1] != 0.0 or not descending:
            raise UserError(
                f"sampler sigmas {sigmas}; expected a strictly descending list from 1.0 to 0.0"
            )
        object.__setattr__(self, "sigmas", sigmas)

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    def in_steps(self, num_steps: int) -> SamplerSpec:
        """The same curve of sigmas in another number of steps. A few-step student knows its own sigmas only: UserError."""
        from generator.flow import resample_schedule

        if self.kind == "renoise" and num_steps != self.num_steps:
            raise UserError(
                f"this generator was distilled for {self.num_steps} steps and knows no other, not {num_steps}"
            )
        return replace(self, sigmas=resample_schedule(self.sigmas, num_steps))

    @property
    def guidance(self) -> dict[str, float]:
        """What `VideoBackbone.velocity` takes of it."""
        return {
            "guidance_scale": self.guidance_scale,
            "guidance_rescale": self.guidance_rescale,
        }


@dataclass(frozen=True)
class Condition:
    """Encoded prompts, batched and picklable. A row whose mask is all False is the unconditional (dropped) prompt.

    A prompt of several shots is a row too: its shots' tokens one after another, and where each shot starts.
    """

    embeds: Tensor
    """Hidden states of the text encoder, [B, L, E] float."""
    mask: Tensor
    """True where a token exists, [B, L] bool."""
    token_shots: Tensor | None = None
    """The shot that a token describes, counted from 0, [B, L] int64; None where every prompt is of one shot."""
    shot_starts: Tensor | None = None
    """The latent frame at which each shot starts, [B, shots] int64, `NO_SHOT` where a row has fewer; given with `token_shots`."""

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Condition:
        mask, *shots = (
            None if part is None else part.to(device=device)
            for part in (self.mask, self.token_shots, self.shot_starts)
        )
        assert mask is not None
        return Condition(self.embeds.to(device=device, dtype=dtype), mask, *shots)

    def __getitem__(self, index: slice | Sequence[int] | Tensor | int) -> Condition:
        """Rows of the batch; an int keeps the batch axis."""
        if isinstance(index, int):
            index = [index]
        shots = (
            None if part is None else part[index] for part in (self.token_shots, self.shot_starts)
        )
        return Condition(self.embeds[index], self.mask[index], *shots)

    def dropped(self, drop: Tensor | None = None) -> Condition:
        """The same rows with the prompt removed where `drop` [B] bool is True (everywhere by default)."""
        keep = self.mask.new_zeros(len(self)) if drop is None else ~drop.to(self.mask.device)
        return replace(self, mask=self.mask & keep[:, None])

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Rows of all conditions one after another, padded on the right to the longest."""
        import torch
        import torch.nn.functional as F

        longest = max(c.embeds.shape[1] for c in conditions)
        joined = Condition(
            torch.cat(
                [F.pad(c.embeds, (0, 0, 0, longest - c.embeds.shape[1])) for c in conditions]
            ),
            torch.cat([F.pad(c.mask, (0, longest - c.mask.shape[1])) for c in conditions]),
        )
        if all(c.token_shots is None for c in conditions):
            return joined
        shots = [c._shots() for c in conditions]
        most = max(starts.shape[1] for _, starts in shots)
        return replace(
            joined,
            token_shots=torch.cat(
                [F.pad(tokens, (0, longest - tokens.shape[1])) for tokens, _ in shots]
            ),
            shot_starts=torch.cat(
                [F.pad(starts, (0, most - starts.shape[1]), value=NO_SHOT) for _, starts in shots]
            ),
        )

    def _shots(self) -> tuple[Tensor, Tensor]:
        """`token_shots` and `shot_starts`, also of rows that are all of one shot."""
        if self.token_shots is not None and self.shot_starts is not None:
            return self.token_shots, self.shot_starts
        tokens = self.mask.long() * 0
        return tokens, tokens.new_zeros(len(self), 1)


@dataclass(frozen=True)
class Task:
    """What is known of the clip beside the prompt. Text-to-video: zeros; image-to-video: the first frame's latent and mask 1."""

    condition_latents: Tensor
    """Clean latents where the mask is 1, zeros elsewhere, [B, C, T, h, w]."""
    condition_mask: Tensor
    """1 where the latent frame is given, [B, 1, T, h, w] float."""
    low_res_latents: Tensor | None = None
    """The low-resolution clip, pixel-upsampled and re-encoded, detached, [B, C, T, h, w]; refiner only."""

    def __len__(self) -> int:
        return self.condition_latents.shape[0]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Task:
        low_res = self.low_res_latents
        return Task(
            self.condition_latents.to(device=device, dtype=dtype),
            self.condition_mask.to(device=device, dtype=dtype),
            None if low_res is None else low_res.to(device=device, dtype=dtype),
        )

    def __getitem__(self, index: slice | Sequence[int] | Tensor | int) -> Task:
        """Rows of the batch; an int keeps the batch axis."""
        if isinstance(index, int):
            index = [index]
        low_res = None if self.low_res_latents is None else self.low_res_latents[index]
        return Task(self.condition_latents[index], self.condition_mask[index], low_res)

    @staticmethod
    def given(clean: Tensor, known: Tensor, low_res_latents: Tensor | None = None) -> Task:
        """The task of completing a clip of which some latent frames are known.

        Args:
            clean: [B, C, T, h, w]; known: [B, T], True or 1 where the latent frame is given.
        """
        mask = known.to(clean)[:, None, :, None, None].expand_as(clean[:, :1])
        return Task(clean * mask, mask, low_res_latents)

    @staticmethod
    def cat(tasks: Sequence[Task]) -> Task:
        import torch

        low_res = [task.low_res_latents for task in tasks]
        if any(latents is None for latents in low_res) and any(
            latents is not None for latents in low_res
        ):
            raise ValueError("cannot join tasks with and without low-resolution latents")
        return Task(
            torch.cat([task.condition_latents for task in tasks]),
            torch.cat([task.condition_mask for task in tasks]),
            None if low_res[0] is None else torch.cat([x for x in low_res if x is not None]),
        )


@runtime_checkable
class VideoBackbone(Protocol):
    """A video generator as the rest of the house sees it: our DiT and every adapter implement this."""

    spec: BackboneSpec
    sampler: SamplerSpec
    denoiser: nn.Module
    """The trainable network; `velocity` takes it (or its engine, EMA, frozen reference, copy) as an argument."""
    role: Role
    frame_shape: tuple[int, int, int]
    """(F, H, W) of the clips this checkpoint was trained to make."""
    fps: float

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Text to embeddings, no gradient; deterministic, so it may be cached.

        `[SHOT 1] ... [CUT] [SHOT 2] ...` is a clip of several shots (our own generator; `generator.shots`)."""
        ...

    def encode(self, frames: Tensor) -> Tensor:
        """[B, 3, F, H, W] in [0, 1] -> normalised latents [B, C, T, h, w], no gradient."""
        ...

    def decode(self, latents: Tensor, state: object | None = None) -> tuple[Tensor, object]:
        """Latents -> (frames UNCLAMPED [B, 3, F, H, W], state). Streaming: pass `state` on to decode the next latent frames.

        Differentiable in the latents and in the state. Without a state the first latent frame makes one frame.
        """
        ...

    def velocity(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        sigma: Tensor,
        condition: Condition,
        task: Task,
        *,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        negative: Condition | None = None,
        sigma_target: Tensor | None = None,
        features: Sequence[int] = (),
    ) -> Tensor:
        """d(latents) / d(sigma) = noise - clean, fp32 [B, C, T, h, w]; sigma is [B] or, per latent frame, [B, T].

        `negative`: prompts that guidance moves away from, one row per sample; the dropped prompt by default.
        `sigma_target`: for two-time (jump) models; others ignore it. `features`: block indices whose hidden states are
        returned too, as `(velocity, {index: [B, T, h, w, width]})`.
        """
        ...

    def text_to_video_task(self, batch: int, num_frames: int, height: int, width: int) -> Task: ...

    def image_task(self, first_frames: Tensor, num_frames: int, height: int, width: int) -> Task:
        """First frames [B, 3, H, W] in [0, 1] as the condition."""
        ...

    def frames_task(
        self, frames: Mapping[int, Tensor], num_frames: int, height: int, width: int
    ) -> Task:
        """Any frames as the condition: index in the clip (negative from its end) -> images [B, 3, H, W] in [0, 1]."""
        ...

    def low_res_task(self, low_res_frames: Tensor, height: int, width: int) -> Task:
        """Refiner only: frames [B, 3, F, h, w] are upsampled in pixel space to (height, width), encoded and detached."""
        ...

    def lora_targets(self) -> list[str]:
        """Names of the linear layers that adapters should wrap."""
        ...

    def save(self, directory: Path) -> None:
        """Write a folder that `load_generator` reads."""
        ...

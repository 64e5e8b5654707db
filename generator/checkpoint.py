"""The concrete generator: our VAE, text encoder and DiT behind the `VideoBackbone` protocol; save and load.

A generator folder: `generator.json` (architecture, role, sampler, frame shape, fps), `denoiser.safetensors`, `vae/`, `text/`,
sealed with a manifest of sizes and sha256 that is verified on load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generator.base import BackboneSpec, Condition, Role, SamplerSpec, Task
from generator.dit import DiT, DiTConfig
from generator.guidance import GuidedVelocity
from generator.sampling import SamplesClips
from generator.shots import encode_shots
from generator.text import TextEncoder
from generator.training.lora import adaptable
from generator.vae import VideoVAE
from reelhf.errors import UserError
from reelhf.run import seal, verify

if TYPE_CHECKING:
    from generator.adapters.base import DiffusersBackbone

GENERATOR_FORMAT = 1


@dataclass
class DiTGenerator(GuidedVelocity, SamplesClips):
    """`VideoBackbone` made of our own three networks. The VAE and the text encoder are frozen here."""

    denoiser: DiT
    vae: VideoVAE
    text: TextEncoder
    sampler: SamplerSpec
    role: Role
    frame_shape: tuple[int, int, int]
    fps: float
    spec: BackboneSpec = field(default_factory=BackboneSpec)

    def __post_init__(self) -> None:
        self.spec.check(*self.frame_shape)
        if not self.fps > 0:
            raise UserError(f"a generator of {self.fps} frames per second; expected more than 0")
        if (self.role == "refiner") != self.denoiser.config.low_res:
            raise ValueError(
                f"role '{self.role}' with a denoiser of low_res={self.denoiser.config.low_res}"
            )
        self.vae.requires_grad_(False)
        self.text.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def to(self, device: torch.device | str) -> DiTGenerator:
        for module in (self.denoiser, self.vae, self.text):
            module.to(device)
        return self

    def configured(
        self,
        *,
        frame_shape: tuple[int, int, int] | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> DiTGenerator:
        """The same model with another number of steps or guidance. Raises: UserError for another clip size, which it was not trained on."""
        if frame_shape not in (None, self.frame_shape):
            raise UserError(
                f"this generator makes clips of {self.frame_shape} (frames, height, width), not {frame_shape}; only diffusers models "
                "take other sizes"
            )
        sampler = self.sampler if num_steps is None else self.sampler.in_steps(num_steps)
        if guidance_scale is not None:
            sampler = replace(sampler, guidance_scale=guidance_scale)
        return replace(self, sampler=sampler)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        condition = encode_shots(
            self.text.encode,
            prompts,
            self.frame_shape[0],
            temporal_ratio=self.spec.temporal_ratio,
        )
        return condition.to(self.device)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        self.spec.check(*frames.shape[-3:])
        return self.vae.encode(frames.to(self.device))

    def decode(self, latents: Tensor, state: object | None = None) -> tuple[Tensor, object]:
        return self.vae.decode(latents, state)

    def unguided(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        sigma: Tensor,
        condition: Condition,
        task: Task,
        features: Sequence[int] = (),
    ) -> Tensor:
        low_res = () if task.low_res_latents is None else (task.low_res_latents,)
        inputs = (
            condition.embeds,
            condition.mask,
            task.condition_latents,
            task.condition_mask,
            *low_res,
        )
        options: dict[str, Any] = {}
        if condition.token_shots is not None:
            options = {
                "token_shots": condition.token_shots,
                "shot_starts": condition.shot_starts,
            }
        if features:
            return denoiser(noisy, sigma, *inputs, features=tuple(features), **options)
        return denoiser(noisy, sigma, *inputs, **options).float()

    def text_to_video_task(self, batch: int, num_frames: int, height: int, width: int) -> Task:
        channels, *grid = self.spec.latent_shape(num_frames, height, width)
        zeros = torch.zeros(batch, channels, *grid, device=self.device)
        return Task(zeros, zeros[:, :1].clone())

    def image_task(self, first_frames: Tensor, num_frames: int, height: int, width: int) -> Task:
        return self.frames_task({0: first_frames}, num_frames, height, width)

    def frames_task(
        self, frames: Mapping[int, Tensor], num_frames: int, height: int, width: int
    ) -> Task:
        """See `VideoBackbone.frames_task`. A latent after the first codes a group of frames: a frame given in it is held through it.

        The causal VAE reads what comes before, so between given frames the last one is held too.
        """
        given = _checked_frames(frames, num_frames, (height, width))
        groups = [_group(frame, self.spec.temporal_ratio) for frame in range(num_frames)]
        last = max(groups[frame] for frame in given)
        shown = [
            min(given, key=lambda at: (groups[at] != groups[frame], at > frame, abs(at - frame)))
            for frame in range(1 + last * self.spec.temporal_ratio)
        ]
        latents = self.encode(torch.stack([given[frame] for frame in shown], dim=2))
        task = self.text_to_video_task(len(latents), num_frames, height, width)
        clean, known = task.condition_latents, task.condition_mask[:, 0, :, 0, 0]
        clean[:, :, : last + 1] = latents
        known[:, [groups[frame] for frame in given]] = 1.0
        return Task.given(clean, known)

    @torch.no_grad()
    def low_res_task(self, low_res_frames: Tensor, height: int, width: int) -> Task:
        if self.role != "refiner":
            raise ValueError(
                "low-resolution latents are an input of a refiner; this is a base generator"
            )
        num_frames = low_res_frames.shape[2]
        upsampled = upsample_frames(low_res_frames.to(self.device), height, width)
        task = self.text_to_video_task(len(low_res_frames), num_frames, height, width)
        return Task(task.condition_latents, task.condition_mask, self.encode(upsampled).detach())

    def lora_targets(self) -> list[str]:
        return adaptable(self.denoiser)

    def save(self, directory: Path) -> None:
        """Write and seal the folder; the caller chooses a fresh place (see `RunFolder.save_checkpoint` for atomic ones)."""
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        card = {
            "format": GENERATOR_FORMAT,
            "role": self.role,
            "architecture": self.denoiser.config.model_dump(
                mode="json", exclude={"compile", "attention"}
            ),
            "spec": asdict(self.spec),
            "sampler": asdict(self.sampler),
            "frame_shape": list(self.frame_shape),
            "fps": self.fps,
        }
        (directory / "generator.json").write_text(json.dumps(card, indent=2) + "\n")
        weights = {
            name: value.detach().cpu().contiguous()
            for name, value in self.denoiser.state_dict().items()
        }
        save_file(weights, directory / "denoiser.safetensors")
        self.vae.save(directory / "vae")
        self.text.save(directory / "text")
        seal(directory)


def _group(frame: int, temporal_ratio: int) -> int:
    """The latent frame that codes this frame."""
    return -(-frame // temporal_ratio)


def _checked_frames(
    frames: Mapping[int, Tensor], num_frames: int, size: tuple[int, int]
) -> dict[int, Tensor]:
    """The given frames by their index from the clip's start; UserError where there is no such frame."""
    given = {}
    for index, images in frames.items():
        if not -num_frames <= index < num_frames:
            raise UserError(
                f"frame {index} of a clip of {num_frames} frames; expected {-num_frames} to {num_frames - 1}"
            )
        if images.shape[-2:] != size:
            name = "first frames" if index == 0 else f"frames at {index}"
            raise ValueError(f"{name} {tuple(images.shape[-2:])} for clips of {size}")
        given[index % num_frames] = images
    if not given:
        raise ValueError("no frame is given: see text_to_video_task")
    return given


def upsample_frames(frames: Tensor, height: int, width: int) -> Tensor:
    """Frames [B, 3, F, h, w] -> [B, 3, F, height, width], bicubic per frame, clamped to [0, 1]."""
    batch, num_frames = frames.shape[0], frames.shape[2]
    flat = frames.transpose(1, 2).flatten(0, 1)
    flat = F.interpolate(flat, size=(height, width), mode="bicubic", align_corners=False).clamp(
        0, 1
    )
    return flat.unflatten(0, (batch, num_frames)).transpose(1, 2)


def load_generator(path: str | Path) -> DiTGenerator | DiffusersBackbone:
    """Read a generator folder, a diffusers folder or a hub id.

    A missing, altered or cut short file of a folder of ours is a UserError naming it.
    """
    from safetensors.torch import load_file

    from generator.adapters import is_diffusers, load_diffusers

    if is_diffusers(path):
        return load_diffusers(path)
    path = Path(path)
    if not (path / "generator.json").is_file():
        raise UserError(f"{path} is not a generator folder: it has no generator.json")
    verify(path)
    card = json.loads((path / "generator.json").read_text())
    if card.get("format") != GENERATOR_FORMAT:
        raise UserError(
            f"{path} is a generator of format {card.get('format')}; this version reads format {GENERATOR_FORMAT}"
        )
    denoiser = DiT(DiTConfig.model_validate(card["architecture"]))
    denoiser.load_state_dict(load_file(path / "denoiser.safetensors"))
    return DiTGenerator(
        denoiser=denoiser,
        vae=VideoVAE.load(path / "vae"),
        text=TextEncoder.load(path / "text"),
        sampler=SamplerSpec(**card["sampler"]),
        role=card["role"],
        frame_shape=tuple(card["frame_shape"]),
        fps=card["fps"],
        spec=BackboneSpec(**card["spec"]),
    )

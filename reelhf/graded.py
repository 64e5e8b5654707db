"""Clips in several versions of known order, from nearest to the original to furthest: what a reward can learn without votes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reelhf.errors import UserError

FILE = "graded.safetensors"


@dataclass(frozen=True)
class GradedClips:
    """N clips in G versions each."""

    frames: Tensor
    """uint8 [N, G, 3, F, H, W]."""
    grades: Tensor
    """How far each version strays, [N, G] in [0, 1], ascending along G."""
    captions: list[str]
    """N."""
    fps: float

    def __post_init__(self) -> None:
        if self.grades.shape != self.frames.shape[:2] or len(self.captions) != len(self.frames):
            raise ValueError(
                f"{tuple(self.frames.shape)} frames, {tuple(self.grades.shape)} grades and {len(self.captions)} captions"
            )
        if bool((self.grades.diff(dim=1) < 0).any()):
            raise ValueError("grades must ascend along the versions of a clip")

    def pairs(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Two versions of each of the clips `rows` [B]: (nearer, further) float [B, 3, F, H, W] in [0, 1], and by how much [B]."""
        versions = self.grades.shape[1]
        drawn = torch.stack([torch.randperm(versions, generator=generator)[:2] for _ in rows])
        near, far = drawn.sort(dim=1).values.unbind(1)
        gap = self.grades[rows, far] - self.grades[rows, near]
        return self.frames[rows, near].float() / 255, self.frames[rows, far].float() / 255, gap

    def save(self, folder: Path) -> Path:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        described = {"captions": json.dumps(self.captions), "fps": str(self.fps)}
        tensors = {"frames": self.frames.contiguous(), "grades": self.grades.contiguous()}
        save_file(tensors, folder / FILE, metadata=described)
        return folder

    @classmethod
    def load(cls, folder: Path) -> GradedClips:
        from safetensors import safe_open

        path = Path(folder) / FILE
        if not path.is_file():
            raise UserError(f"{folder} holds no graded clips: it has no {FILE}")
        with safe_open(path, framework="pt") as file:
            described = file.metadata()
            return cls(
                file.get_tensor("frames"),
                file.get_tensor("grades"),
                json.loads(described["captions"]),
                float(described["fps"]),
            )

"""Several checkpoints of one reward as one: the mean of their z-scores, and how far they disagree.

On disk an ensemble is a folder of checkpoints (`motion/0`, `motion/1`, …) in the place of one. What one member was attacked into
praising, the others do not praise: their spread rises, and `CompositeReward(pessimism=k)` maximises the mean less k spreads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reelhf.errors import UserError
from rewards.base import FrameSelection, RewardScores
from rewards.module import RewardModule

TINY_VARIANCE = 1e-12  # members that agree exactly: the square root's slope there is infinite


def member_folders(folder: Path) -> list[Path]:
    """The checkpoints that make a folder an ensemble, in order; none for anything else."""
    if not folder.is_dir() or (folder / "reward.json").is_file():
        return []
    return sorted(path for path in folder.iterdir() if (path / "reward.json").is_file())


class EnsembleReward(nn.Module):
    """Frozen rewards of the same dimensions; `values` are mean z-scores, so `mean` is 0 and `std` 1.

    Raises: UserError for fewer than two members, or members that score different things.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor
    temperature: Tensor

    def __init__(self, members: Sequence[RewardModule]) -> None:
        super().__init__()
        if len(members) < 2:
            raise UserError(f"an ensemble of {len(members)} rewards; expected two at least")
        scored = {tuple(member.dimensions) for member in members}
        if len(scored) > 1:
            raise UserError(
                f"an ensemble of rewards that score {' and '.join(', '.join(d) for d in sorted(scored))}; expected the same "
                "dimensions in the same order"
            )
        self.members = nn.ModuleList(members)
        self.dimensions: tuple[str, ...] = members[0].dimensions

        def averaged(values: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(values)).mean(0)

        self.register_buffer("mean", torch.zeros(len(self.dimensions)))
        self.register_buffer("std", torch.ones(len(self.dimensions)))
        for name in ("low", "high"):
            bounds = [(getattr(m, name) - m.mean) / m.std for m in members]
            self.register_buffer(name, averaged(bounds))
        self.register_buffer("temperature", averaged([m.temperature / m.std for m in members]))

    def select(
        self, num_frames: int, fps: float, generator: torch.Generator | None = None
    ) -> FrameSelection:
        """One choice for all members: they are to disagree about the same frames."""
        return self.members[0].select(num_frames, fps, generator)

    def encode_prompts(self, prompts: Sequence[str]) -> list[Any]:
        return list(zip(*(m.encode_prompts(prompts) for m in self.members), strict=True))

    def score(
        self,
        frames: Tensor,
        *,
        selection: FrameSelection,
        fps: Tensor | float,
        prompts: Sequence[Any],
        first_frame: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> RewardScores:
        """Mean and standard deviation over members of their z-scores, [B, D] each; valid where every member's is."""
        found = [
            member.score(
                frames,
                selection=selection,
                fps=fps,
                prompts=[p if isinstance(p, str) else p[index] for p in prompts],
                first_frame=first_frame,
                reference=reference,
            )
            for index, member in enumerate(self.members)
        ]
        z = torch.stack(
            [(s.values - m.mean) / m.std for s, m in zip(found, self.members, strict=True)]
        )  # [M, B, D]
        valid = torch.stack([s.valid for s in found]).all(0)
        spread = (z.var(dim=0, unbiased=False) + TINY_VARIANCE).sqrt()
        return RewardScores(z.mean(0), valid, spread)

    forward = score

    def out_of_range(self, values: Tensor) -> Tensor:
        """How far values [B, D] lie beyond the mean validated range, in standard deviations; 0 inside."""
        return (values - self.high).clamp_min(0) + (self.low - values).clamp_min(0)

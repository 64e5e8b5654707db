"""Several models of one kind that differ by their seed: their mean is the score, their disagreement its std.

Agreement of models that learned the same verdicts breaks down where neither saw any: pixels that please one of them alone. Source: reward ensembles,
Coste et al. 2310.02743.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rewards.base import FrameSelection, RewardScores
from rewards.calibrated import CalibratedReward, bound
from rewards.checkpoint import REWARD_SCHEMA_VERSION, load_trainable, read_reward_json
from rewards.heads import mean_and_disagreement

if TYPE_CHECKING:
    from typing_extensions import Self


STATISTICS = ("mean", "std", "low", "high", "temperature")


class EnsembleReward(CalibratedReward):
    """Members' z-scores, averaged; a folder of one folder per member."""

    kind: ClassVar[str] = "ensemble"

    def __init__(self, members: Sequence[CalibratedReward]) -> None:
        super().__init__(members[0].dimensions)
        self.members = nn.ModuleList(members)
        self.compares = members[0].compares

    def select(
        self, num_frames: int, fps: float, generator: torch.Generator | None = None
    ) -> FrameSelection:
        """The same frames for all members."""
        return self.members[0].select(num_frames, fps, generator)  # type: ignore[operator]

    def encode_prompts(self, prompts: Sequence[str]) -> list[Any]:
        return self.members[0].encode_prompts(prompts)  # type: ignore[operator]

    def score(self, frames: Tensor, **options: Any) -> RewardScores:
        """Mean over members of (value - mean) / std; std: how far members lie apart, and how unsure each is."""
        said = [member.score(frames, **options) for member in self.members]  # type: ignore[operator]
        z = torch.stack(
            [(s.values - m.mean) / m.std for s, m in zip(said, self.members, strict=True)]
        )
        own = [s.std / m.std for s, m in zip(said, self.members, strict=True) if s.std is not None]
        mean, std = mean_and_disagreement(z, torch.stack(own) if own else None)
        valid = torch.stack([s.valid for s in said]).all(dim=0)
        parts = {
            f"{name}/{i}": value for i, s in enumerate(said) for name, value in s.parts.items()
        }
        return RewardScores(mean, valid, std, parts)

    def recompute_layers(self) -> None:
        for member in self.members:
            member.recompute_layers()  # type: ignore[operator]

    def save(self, folder: Path) -> Path:
        """Write reward.json and a folder per member, sealed."""
        folder = Path(folder)
        for i, member in enumerate(self.members):
            member.save(part(folder, i))  # type: ignore[operator]
        statistics = {name: [bound(v) for v in getattr(self, name)] for name in STATISTICS}
        join_members(folder, len(self.members), statistics=statistics, data_hash=self.data_hash)
        return folder

    @classmethod
    def load(cls, folder: Path) -> Self:
        described = read_reward_json(folder)
        model = cls([load_trainable(part(folder, i)) for i in range(described["members"])])
        for name in STATISTICS:
            kept = getattr(model, name)  # what is not said stays as it was: unbounded
            for index, value in enumerate(described.get(name, [])):
                if value is not None:
                    kept[index] = value
        model.data_hash = described["data_hash"]
        return model


def join_members(
    folder: Path,
    count: int,
    *,
    statistics: Mapping[str, Sequence[float | None]] | None = None,
    data_hash: str | None = None,
) -> None:
    """Make an ensemble of the members saved in a folder: reward.json beside them, sealed.

    Args:
        statistics: of the whole; None leaves it uncalibrated.
    """
    from reelhf.run import seal

    described = {
        "schema_version": REWARD_SCHEMA_VERSION,
        "type": EnsembleReward.kind,
        "dimensions": read_reward_json(part(folder, 0))["dimensions"],
        "members": count,
        **(statistics or {}),
        "data_hash": data_hash,
    }
    (folder / "reward.json").write_text(json.dumps(described, indent=2) + "\n")
    seal(folder)


def part(folder: Path, index: int) -> Path:
    """Where an ensemble's folder has one of its members."""
    return Path(folder) / f"member_{index}"


def member_folder(folder: Path, index: int) -> Path:
    """Where the weights lie that a member begins from: the same member of an earlier ensemble, or the one model there is."""
    if read_reward_json(folder)["type"] != EnsembleReward.kind:
        return folder
    count = read_reward_json(folder)["members"]
    return part(folder, index % count)

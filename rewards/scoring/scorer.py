"""Video files -> scores, batch by batch; a file that cannot be scored is invalid with a reason, and stops nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelhf.errors import UserError
from reelhf.hashing import content_hash, sha256_file
from reelhf.video import read_videos_or_errors
from rewards.composite import CompositeReward, load_composite
from rewards.data import Clip, group_by_shape
from rewards.scoring.cache import ScoreCache
from rewards.scoring.sources import Item


@dataclass(frozen=True)
class ScoreSettings:
    """How raw scores become one total."""

    weights: Mapping[str, float]
    """Dimension -> weight; empty weighs every dimension 1."""
    cap: float = 2.0
    pessimism: float = 0.0


def rewards_hash(folder: Path) -> str:
    """One hash of every file of a rewards folder that scores depend on: weights, settings and tokenizers."""
    files = [p for p in sorted(Path(folder).rglob("*")) if p.suffix in (".safetensors", ".json")]
    return content_hash([[p.relative_to(folder).as_posix(), sha256_file(p)] for p in files])


class Scorer:
    """A loaded composite on a device, and the cache of what it said."""

    def __init__(
        self,
        rewards: Path,
        settings: ScoreSettings,
        *,
        cache: ScoreCache | None = None,
        device: torch.device | None = None,
    ) -> None:
        composite = load_composite(
            rewards, settings.weights, settings.cap, pessimism=settings.pessimism
        )
        if not settings.weights:
            composite.weights = dict.fromkeys(composite.dimensions, 1.0)
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.composite: CompositeReward = composite.to(self.device)
        self.cache = cache
        weights = dict(sorted(composite.weights.items()))
        self.hash = content_hash(rewards_hash(rewards), weights, settings.cap, settings.pessimism)

    @property
    def dimensions(self) -> tuple[str, ...]:
        return self.composite.dimensions

    def key(self, clip_sha256: str, prompt: str) -> str:
        """Under which the score of a clip for a prompt is kept."""
        return content_hash(clip_sha256, prompt, self.hash)

    def score_items(
        self, items: Sequence[Item], *, batch_size: int = 8
    ) -> Iterator[dict[str, Any]]:
        """A row per item, in order: path, sha256, prompt, valid, and either scores or a `reason`; new ones go to the cache."""
        for start in range(0, len(items), batch_size):
            yield from self._score_batch(items[start : start + batch_size])

    def _score_batch(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        hashes = [_hash_or_none(item.path) for item in items]
        keys = [sha and self.key(sha, item.prompt) for sha, item in zip(hashes, items, strict=True)]
        known = {} if self.cache is None else self.cache.get([key for key in keys if key])
        new = [i for i, key in enumerate(keys) if key not in known]
        scored = self._score_files([items[i] for i in new])
        fresh = {keys[i]: row for i, row in zip(new, scored, strict=True)}
        if self.cache is not None:
            keep = {key: row for key, row in fresh.items() if key and row["valid"]}
            if keep:
                self.cache.put(keep)
        rows = []
        by_place = dict(zip(new, scored, strict=True))
        for i, item in enumerate(items):
            row = by_place[i] if i in by_place else known[keys[i] or ""]
            named = {"path": str(item.path), "sha256": hashes[i], "prompt": item.prompt}
            rows.append(named | {"cached": i not in by_place} | row)
        return rows

    def _score_files(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Scores without names; files are decoded several at a time, one that cannot be is left out of the batch."""
        read = list(read_videos_or_errors(item.path for item in items))
        rows: list[dict[str, Any]] = [
            {"valid": False, "reason": str(found)} if isinstance(found, UserError) else {}
            for found in read
        ]
        clips = {
            i: Clip(*found) for i, found in enumerate(read) if not isinstance(found, UserError)
        }
        scored = self.score_clips(list(clips.values()), [items[i].prompt for i in clips])
        for i, row in zip(clips, scored, strict=True):
            rows[i] = row
        return rows

    @torch.no_grad()
    def score_clips(self, clips: Sequence[Clip], prompts: Sequence[str]) -> list[dict[str, Any]]:
        """Scores of decoded clips, those of one shape and rate in one forward pass."""
        rows: list[dict[str, Any]] = [{} for _ in clips]
        for places, frames, fps in _groups(clips):
            scores = self.composite.score(
                frames.to(self.device),
                fps=fps.to(self.device),
                prompts=[prompts[i] for i in places],
            )
            table = zip(places, *_columns(scores), self._beyond(scores.values), strict=True)
            for place, total, values, z, std, valid, beyond in table:
                if not valid:
                    rows[place] = {"valid": False, "reason": "its score is not finite"}
                    continue
                named = zip(self.dimensions, values, z, std, beyond, strict=True)
                rows[place] = {
                    "valid": True,
                    "total": total,
                    "dimensions": {
                        name: {
                            "value": v,
                            "z": s,
                            "std": None if math.isnan(u) else u,
                            "beyond_range": b,
                        }
                        for name, v, s, u, b in named
                    },
                }
        return rows

    def _beyond(self, values: Tensor) -> list[list[float]]:
        """How far raw scores [B, D] lie beyond the range each reward was validated in, in its standard deviations; 0 inside."""
        models = list(self.composite.models)
        low, high, std = (
            torch.cat([getattr(m, n) for m in models]) for n in ("low", "high", "std")
        )
        beyond = (values - high).clamp_min(0) + (low - values).clamp_min(0)
        return (beyond / std).cpu().tolist()


def _columns(scores: Any) -> tuple[list[Any], ...]:
    std = torch.full_like(scores.values, math.nan) if scores.std is None else scores.std
    columns = (scores.total, scores.values, scores.z, std, scores.valid)
    return tuple(column.cpu().tolist() for column in columns)


def _groups(clips: Sequence[Clip]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of one shape; frames are chosen by rate, so of one rate too."""
    rates = sorted({clip.fps for clip in clips})
    for rate in rates:
        own = [i for i, clip in enumerate(clips) if clip.fps == rate]
        for places, frames, fps in group_by_shape([clips[i] for i in own]):
            yield [own[place] for place in places], frames, fps


def _hash_or_none(path: Path) -> str | None:
    """None for a file that is not there: its row will say so."""
    try:
        return sha256_file(path)
    except OSError:
        return None

"""Pairs of clips whose order is known without a vote: spoiled, made anew by the generator, recoloured, with another caption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from reelhf.graded import GradedClips
from rewards.degrade import degrade
from rewards.losses import bradley_terry_loss
from rewards.module import RewardModule


def spoil_lightly(frames: Tensor, most: float, generator: Generator) -> Tensor:
    """Nuisance: each clip loses some looks, by a random amount, none in a third of the cases."""
    severity = torch.rand(len(frames), generator=generator) * 1.5 - 0.5
    return degrade(frames, "aesthetic_quality", severity.clamp_min(0) * most, generator)


def spoiled_pair(
    frames: Tensor, dimension: str, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Two copies spoiled in one dimension, and how much more the second is: (less, more, difference [B])."""
    low, high = torch.rand(2, len(frames), generator=generator).sort(dim=0).values
    low = low * (torch.rand(len(frames), generator=generator) < 0.6)
    return (
        degrade(frames, dimension, low, generator),
        degrade(frames, dimension, high, generator),
        high - low,
    )


@dataclass(frozen=True)
class GradedPair:
    """A batch of clips in two versions whose order is known."""

    nearer: Tensor
    further: Tensor
    """float [B, 3, F, H, W] in [0, 1]."""
    margin: Tensor
    """How much further, [B]."""
    prompts: list[list[int]]
    """The captions' token ids, B."""


def graded_pairs(
    graded: Sequence[GradedClips], model: RewardModule, batch_size: int, generator: Generator
) -> Iterator[GradedPair]:
    """Batches of the sets in turn, without end; nothing when there are none."""
    prompts = [model.encode_prompts(clips.captions) for clips in graded]
    while graded:
        for clips, texts in zip(graded, prompts, strict=True):
            rows = torch.randperm(len(texts), generator=generator)[:batch_size]
            nearer, further, margin = clips.pairs(rows, generator)
            yield GradedPair(nearer, further, margin, [texts[row] for row in rows.tolist()])


def generated_clips(
    graded: Sequence[GradedClips], prompts: Sequence[list], batch_size: int, generator: Generator
) -> Iterator[tuple[Tensor, list]]:
    """Batches of the sets in turn, without end: (frames [B, 3, F, H, W] in [0, 1], what `prompts` holds of their captions).

    Any version but the furthest of each clip: what the generator makes, still more or less as the caption says. Spoiled like the
    real clips, they teach the same orders on the pictures that will be judged.
    """
    while graded:
        for clips, texts in zip(graded, prompts, strict=True):
            rows = torch.randperm(len(texts), generator=generator)[:batch_size]
            versions = torch.randint(clips.grades.shape[1] - 1, (len(rows),), generator=generator)
            yield clips.frames[rows, versions].float() / 255, [texts[row] for row in rows.tolist()]


def ranking_loss(better: Tensor, worse: Tensor, margin: Tensor) -> Tensor:
    """Bradley-Terry on pairs whose order is known, each counted by how far apart the two are. Scores [B]."""
    return (bradley_terry_loss(better, worse) * margin).sum() / margin.sum().clamp_min(1e-6)


def swapped_captions(
    index: Tensor, prompts: list[list[int]], generator: Generator, *, candidates: int = 24
) -> list[list[int]]:
    """A wrong caption per clip: of a few random other ones, the most alike in half of the cases.

    Captions are compared as sets of tokens; one equal to the right caption is never taken.
    """
    chosen = []
    for own in index.tolist():
        right = set(prompts[own])
        draws = torch.randint(len(prompts), (candidates,), generator=generator).tolist()
        others = [prompts[i] for i in draws if prompts[i] != prompts[own]] or [prompts[own][::-1]]
        alike = bool(torch.rand((), generator=generator) < 0.5)
        pick = max(others, key=lambda o: len(right & set(o)) / len(right | set(o)))
        chosen.append(pick if alike else others[0])
    return chosen


def recoloured(
    first: Tensor, second: Tensor, second_is_worse: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Both copies in other colours, one of them further: (the two, [2 B, 3, F, H, W]; how much further, [B])."""
    low, high = torch.rand(2, len(first), generator=generator).sort(dim=0).values
    of_first = torch.where(second_is_worse, low, high)
    frames, severity = torch.cat([first, second]), torch.cat([of_first, low + high - of_first])
    return degrade(frames, "prompt_following", severity, generator), high - low

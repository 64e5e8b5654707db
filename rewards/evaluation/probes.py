"""Does a score fall when a clip is spoiled, and fall further when it is spoiled more? No human verdict is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewards.data import Clip
from rewards.degrade import DEGRADATIONS, Degradation
from rewards.evaluation.metrics import spearman

SEVERITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST_FRAMES = 32
"""Longer clips are probed on this many frames from their middle."""
LEAST_CHANGE = 0.5 / 255
"""Of a pixel: what is less is none, in eight bits."""


def describe_ladder(scores: Tensor, std: float) -> dict[str, Any]:
    """What one corruption does to the scores [N, S] of N clips at S rising severities, the first of which is none.

    Returns: {"lowered": share of clips whose score is lower at the highest severity than clean, "monotone": share in which no step
        up in severity raises it, "rank": mean rank correlation of severity and score, "drop": mean fall at each severity
        in units of `std`, "clips"}. Clips with a score that is not finite at some severity are left out.
    """
    scores = scores[scores.isfinite().all(1)].double()
    if not len(scores):
        return {"lowered": None, "monotone": None, "rank": None, "drop": None, "clips": 0}
    steps = torch.arange(scores.shape[1], dtype=torch.double)
    found = [r for row in scores if (r := spearman(steps, row)) is not None]
    drop = (scores[:, :1] - scores).mean(0) / std
    return {
        "lowered": float((scores[:, -1] < scores[:, 0]).double().mean()),
        "monotone": float((scores.diff(dim=1) <= 0).all(1).double().mean()),
        "rank": sum(found) / len(found) if found else None,
        "drop": drop.tolist(),
        "clips": len(scores),
    }


@torch.no_grad()
def probe_corruptions(
    model: Any, index: int, clips: Sequence[tuple[Clip, str]], *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Every corruption known to hurt dimension number `index` of a model -> `describe_ladder` over the clips that it changes.

    Args:
        clips: (clip, prompt) pairs, undamaged ones.
        seed: of the corruptions' own noise, the same at every severity so that only the severity changes.
    """
    corruptions = DEGRADATIONS.get(model.dimensions[index], {})
    return {
        name: describe_ladder(
            torch.stack(
                [_ladder(model, index, clip, prompt, spoil, seed) for clip, prompt in clips]
            )
            if clips
            else torch.empty(0, len(SEVERITIES)),
            float(model.std[index]),
        )
        for name, spoil in corruptions.items()
    }


def spoiled_ladder(clip: Clip, spoil: Degradation, *, seed: int = 0) -> Tensor:
    """The middle of a clip at every severity, [S, 3, F, H, W]."""
    first = max(0, (clip.frames.shape[1] - MOST_FRAMES) // 2)
    frames = clip.frames[None, :, first : first + MOST_FRAMES].float() / 255
    return torch.cat(
        [
            spoil(frames, torch.tensor([severity]), torch.Generator().manual_seed(seed))
            for severity in SEVERITIES
        ]
    )


def is_changed(ladder: Tensor) -> bool:
    """Whether the highest severity changes anything that can be seen."""
    return bool((ladder[-1] - ladder[0]).abs().amax() >= LEAST_CHANGE)


def _ladder(
    model: Any, index: int, clip: Clip, prompt: str, spoil: Degradation, seed: int
) -> Tensor:
    """Scores [S] of one clip at every severity; NaN where the corruption has nothing to change, as freezing what stands still."""
    ladder = spoiled_ladder(clip, spoil, seed=seed)
    if not is_changed(ladder):
        return torch.full((len(SEVERITIES),), float("nan"))
    scores = model.score(
        ladder.to(next(model.parameters()).device),
        selection=model.select(ladder.shape[2], clip.fps, None),
        fps=clip.fps,
        prompts=[prompt] * len(SEVERITIES),
    )
    return scores.values[:, index].cpu()

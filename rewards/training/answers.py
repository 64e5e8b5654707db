"""Training of a generative reward: each verdict becomes a question whose answer is known.

The order in which the two clips are shown is drawn anew at each step, so that the place teaches nothing. A tie is half a yes and half a no.
Source: RewardDance, 2509.08826, sec. 3.2; the order of answer and rationale is its answer-first form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reelhf.errors import UserError
from rewards.data import Clip, RewardTask
from rewards.losses import masked_mean
from rewards.preprocess import clamp_straight_through
from rewards.training.config import LossConfig

if TYPE_CHECKING:
    from rewards.generative import Answer

Rationales = Mapping[tuple[frozenset[str], str], str]
"""(sha256 of both clips, dimension) -> why the winner won."""


def load_rationales(path: str | Path) -> Rationales:
    """A JSONL file of {"clip_a", "clip_b", "dimension", "text"}; UserError names the line that is none.

    The text may say {winner} and {loser}: they become "clip 1" and "clip 2", in whichever order the clips are shown.
    """
    out: dict[tuple[frozenset[str], str], str] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"no rationales at {path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["text"].format(winner="", loser="")
            out[frozenset((row["clip_a"], row["clip_b"])), row["dimension"]] = row["text"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise UserError(
                f"{path}, line {number}: expected clip_a, clip_b, dimension and text, where braces say {{winner}} or {{loser}}"
            ) from None
    return out


def answer_loss(
    model: Any,
    tasks: Sequence[RewardTask],
    clips: Mapping[str, Clip],
    *,
    config: LossConfig,
    rationales: Rationales,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Weighted mean cross-entropy of the answers to all verdicts on these tasks, in one forward call.

    Args:
        generator: of frames and order; None means fixed frames and clip b second.
    Returns: the loss and {"loss", "accuracy", "valid_fraction", "votes"}.
    """
    device = next(model.parameters()).device
    names = list(dict.fromkeys(sha for task in tasks for sha in task.clips))
    chosen = {
        sha: model.select(clips[sha].frames.shape[1], clips[sha].fps, generator) for sha in names
    }
    shown = {sha: chosen[sha].apply(clips[sha].frames[None].float() / 255) for sha in names}
    valid = {sha: bool(frames.isfinite().all()) for sha, frames in shown.items()}
    answers, weights = _answers(model, tasks, names, valid, rationales, generator)
    frames = [shown[sha] if valid[sha] else torch.zeros_like(shown[sha]) for sha in names]
    losses, of_rationales, logits = model(
        [clamp_straight_through(f.to(device)) for f in frames],
        [float(chosen[sha].rate(clips[sha].fps)) for sha in names],
        answers=answers,
    )
    weight = torch.tensor(weights, device=device)
    counted = weight > 0
    loss, _ = masked_mean(losses + config.rationale_weight * of_rationales, counted, weight)
    yes = torch.tensor([a.yes for a in answers], device=device)
    right = ((logits > 0) == (yes > 0.5))[counted & (yes != 0.5)].float()
    return loss, {
        "loss": float(loss.detach()),
        "accuracy": float(right.mean()) if len(right) else float("nan"),
        "valid_fraction": sum(valid.values()) / max(1, len(valid)),
        "votes": float(counted.sum()),
    }


def _answers(
    model: Any,
    tasks: Sequence[RewardTask],
    names: Sequence[str],
    valid: Mapping[str, bool],
    rationales: Rationales,
    generator: torch.Generator | None,
) -> tuple[list[Answer], list[float]]:
    """A question per verdict on two valid clips, and its weight; one of weight 0 when there is none, for the forward call's sake."""
    from rewards.generative import Answer

    answers, weights = [], []
    for task in tasks:
        prompt = model.encode_text(task.prompt)
        for vote in task.votes:
            pair = (task.clips[vote.a], task.clips[vote.b])
            if vote.dimension not in model.dimensions or not all(valid[sha] for sha in pair):
                continue
            turned = generator is not None and bool(torch.rand((), generator=generator) < 0.5)
            won = -vote.preference if not turned else vote.preference  # by the second clip shown
            places = ("clip 2", "clip 1") if won > 0 else ("clip 1", "clip 2")
            why = rationales.get((frozenset(pair), vote.dimension), "") if won else ""
            index = tuple(names.index(sha) for sha in (pair[::-1] if turned else pair))
            answers.append(
                Answer(
                    index,
                    prompt,
                    vote.dimension,
                    (1 + won) / 2,
                    why.format(winner=places[0], loser=places[1]),
                )
            )
            weights.append(vote.weight)
    if not answers:
        prompt = model.encode_text(tasks[0].prompt)
        return [Answer((0, 0), prompt, model.dimensions[0], 0.5)], [0.0]
    return answers, weights

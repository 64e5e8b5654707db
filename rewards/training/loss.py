"""From judged tasks to one loss: score every clip once, gather the verdicts, weigh them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewards.data import Clip, Pick, RewardTask, Vote, group_by_shape
from rewards.heads import bootstrapped
from rewards.losses import (
    best_worst_loss,
    bradley_terry_ties_loss,
    gaussian_preference_loss,
    masked_mean,
    tie_width_from_rate,
)
from rewards.training.augment import shift_clips
from rewards.training.config import LossConfig


@dataclass(frozen=True)
class TaskScores:
    """What a model says of every clip of a batch of tasks."""

    values: Tensor
    """Raw logits [N, D], of H heads [N, H * D], one row per clip of each task in turn; NaN where invalid."""
    std: Tensor | None
    """Spread of each, from a model with `uncertainty`."""
    starts: list[int]
    """The row of each task's first clip."""

    def of_head(self, head: int, dimensions: int) -> TaskScores:
        """What one of several heads says."""
        own = slice(head * dimensions, (head + 1) * dimensions)
        return TaskScores(
            self.values[:, own], None if self.std is None else self.std[:, own], self.starts
        )


def tie_widths(dimensions: Sequence[str], tasks: Sequence[RewardTask]) -> Tensor:
    """Rao-Kupper tie width per dimension from the share of ties among explicit verdicts, [D]."""
    widths = []
    for name in dimensions:
        votes = [
            v.preference == 0 for t in tasks for v in t.votes if v.dimension == name and v.explicit
        ]
        widths.append(tie_width_from_rate(sum(votes) / max(1, len(votes))))
    return torch.tensor(widths)


def preference_loss(
    model: Any,
    tasks: Sequence[RewardTask],
    clips: dict[str, Clip],
    *,
    tie_width: Tensor,
    config: LossConfig | None = None,
    shift: float = 0.0,
    generator: torch.Generator | None = None,
    seed: int = 0,
) -> tuple[Tensor, dict[str, float]]:
    """Mean over heads and dimensions of the weighted loss of all verdicts on these tasks.

    Args:
        model: a reward model, or the engine around it.
        tie_width: per dimension, [D]; may carry a gradient.
        config: which loss; pairs with ties when None.
        generator: of frame choices and augmentation; None means fixed frames, and the verdicts' own weights for every head.
        seed: of the weights with which each of several heads sees the verdicts.
    Returns: the loss and {"loss", "accuracy", "valid_fraction", "votes"}, of several heads their means.
    """
    scores = score_tasks(model, tasks, clips, shift=shift, generator=generator)
    options = {"tie_width": tie_width, "config": config or LossConfig()}
    if model.num_heads == 1:
        return verdict_loss(scores, tasks, model.dimensions, **options)
    found = []
    for head in range(model.num_heads):
        seen = tasks if generator is None else bootstrapped(tasks, seed, head)
        own = scores.of_head(head, len(model.dimensions))
        found.append(verdict_loss(own, seen, model.dimensions, **options))
    metrics = {key: sum(row[key] for _, row in found) / len(found) for key in found[0][1]}
    return torch.stack([loss for loss, _ in found]).mean(), metrics


def score_tasks(
    model: Any,
    tasks: Sequence[RewardTask],
    clips: dict[str, Clip],
    *,
    shift: float = 0.0,
    generator: torch.Generator | None = None,
) -> TaskScores:
    """Score every clip of the tasks once, clips of one shape together."""
    device = next(model.parameters()).device
    flat = [(sha, task.prompt) for task in tasks for sha in task.clips]
    starts = torch.tensor([0, *(len(task.clips) for task in tasks)]).cumsum(0).tolist()
    columns = model.num_heads * len(model.dimensions)
    values = torch.full((len(flat), columns), float("nan"), device=device)
    std: Tensor | None = None
    groups = group_by_shape([clips[sha] for sha, _ in flat])
    for rows, frames, fps in groups + groups[:1] * _missing_calls(len(groups), device):
        selection = model.select(frames.shape[2], float(fps[0]), generator)
        if shift and generator is not None:
            frames = shift_clips(frames, shift, generator)
        of_clips, std_of_clips = model(
            frames.to(device),
            selection=selection,
            fps=fps.to(device),
            prompts=[flat[i][1] for i in rows],
        )
        at = torch.tensor(rows, device=device)
        values = values.index_copy(0, at, of_clips)
        if std_of_clips is not None:
            std = torch.ones_like(values) if std is None else std
            std = std.index_copy(0, at, std_of_clips)
    return TaskScores(values, std, starts)


def _missing_calls(calls: int, device: torch.device) -> int:
    """How many forward calls another process makes more: ZeRO-3 waits forever for a rank that makes fewer.

    A group that is scored again overwrites its rows with the same values, so it counts once.
    """
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return 0
    most = torch.tensor(calls, device=device)  # NCCL reduces nothing that lies on a CPU
    distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
    return int(most) - calls


def verdict_loss(
    scores: TaskScores,
    tasks: Sequence[RewardTask],
    dimensions: Sequence[str],
    *,
    tie_width: Tensor,
    config: LossConfig,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of all verdicts on scored tasks; a verdict on an invalid clip counts nothing."""
    values, device = scores.values, scores.values.device

    # 1. Gather the pairs, a column per dimension; a pair judged in one dimension has no label in the others.
    picks = _picks(scores, tasks, dimensions) if config.kind == "best_worst" else []
    picked = {pick.judgment for pick, _ in picks}
    votes = [
        (vote, start)
        for task, start in zip(tasks, scores.starts, strict=False)
        for vote in task.votes
        if vote.dimension in dimensions and vote.judgment not in picked
    ]
    first = [start + vote.a for vote, start in votes]
    second = [start + vote.b for vote, start in votes]
    a, b = values[first], values[second]  # [N, D]
    column = torch.tensor(
        [dimensions.index(vote.dimension) for vote, _ in votes], dtype=torch.long, device=device
    )
    labelled = nn.functional.one_hot(column, len(dimensions)).bool()
    preference = torch.tensor([vote.preference for vote, _ in votes], device=device)
    preference = preference[:, None].expand_as(a)
    weight = torch.tensor([vote.weight for vote, _ in votes], device=device)[:, None].expand_as(a)

    # 2. The likelihood of each verdict, where both clips could be scored.
    mask = labelled & a.isfinite() & b.isfinite()
    # a masked row's NaN would come back through the gradient
    a, b = a.masked_fill(~mask, 0.0), b.masked_fill(~mask, 0.0)
    width = tie_width.to(device)
    if config.kind == "gaussian":
        assert scores.std is not None, "a gaussian loss needs a model with `uncertainty`"
        std_a, std_b = (scores.std[rows].masked_fill(~mask, 1.0) for rows in (first, second))
        losses = gaussian_preference_loss(a, b, std_a, std_b, preference, tie_width=width)
    else:
        losses = bradley_terry_ties_loss(a, b, preference, tie_width=width, margin=config.margin)
    if picks:
        of_picks, mask_picks, weight_picks = _pick_losses(values, picks, dimensions)
        losses = torch.cat([losses, of_picks])
        mask, weight = torch.cat([mask, mask_picks]), torch.cat([weight, weight_picks])

    # 3. Weighted mean per dimension over its valid rows, then over the dimensions that have any.
    per_dimension = [
        masked_mean(losses[:, d], mask[:, d], weight[:, d]) for d in range(len(dimensions))
    ]
    present = [loss for loss, count in per_dimension if count > 0]
    total = torch.stack(present).mean() if present else values.nansum() * 0.0
    right = _right(values, tasks, scores.starts, dimensions)
    return total, {
        "loss": float(total.detach()),
        "accuracy": float(right.mean()) if len(right) else float("nan"),
        "valid_fraction": float(values.detach().isfinite().all(1).float().mean()),
        "votes": float(mask.sum()),
    }


def _picks(
    scores: TaskScores, tasks: Sequence[RewardTask], dimensions: Sequence[str]
) -> list[tuple[Pick, int]]:
    """Picks whose best and worst could both be scored, and the row of their task; the others' votes stay pairs."""
    finite = scores.values.detach().isfinite().all(dim=1).tolist()
    return [
        (pick, start)
        for task, start in zip(tasks, scores.starts, strict=False)
        for pick in task.picks
        if pick.dimension in dimensions and finite[start + pick.best] and finite[start + pick.worst]
    ]


def _pick_losses(
    values: Tensor, picks: Sequence[tuple[Pick, int]], dimensions: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Best-worst likelihood of each pick [N, D], which column it labels, and its weight."""
    most = max(len(pick.shown) for pick, _ in picks)
    rows = torch.zeros(len(picks), most, dtype=torch.long, device=values.device)
    known = torch.zeros_like(rows, dtype=torch.bool)
    for i, (pick, start) in enumerate(picks):
        rows[i, : len(pick.shown)] = torch.tensor(pick.shown) + start
        known[i, : len(pick.shown)] = True
    column = torch.tensor(
        [dimensions.index(pick.dimension) for pick, _ in picks], device=values.device
    )
    candidates = values[rows, column[:, None]]  # [N, K]
    known &= candidates.isfinite()
    best, worst = (
        torch.tensor(
            [pick.shown.index(getattr(pick, end)) for pick, _ in picks], device=values.device
        )
        for end in ("best", "worst")
    )
    losses = best_worst_loss(candidates.masked_fill(~known, 0.0), best, worst, known)
    weight = torch.tensor([pick.weight for pick, _ in picks], device=values.device)
    mask = nn.functional.one_hot(column, len(dimensions)).bool()
    return losses[:, None].expand_as(mask), mask, weight[:, None].expand_as(mask)


def _right(
    values: Tensor, tasks: Sequence[RewardTask], starts: Sequence[int], dimensions: Sequence[str]
) -> Tensor:
    """1 for each decided verdict that the scores agree with and 0 for each other one, whatever the loss, [N]."""
    leads = [
        (values[start + vote.a, d] - values[start + vote.b, d]).detach() * vote.preference
        for task, start in zip(tasks, starts, strict=False)
        for vote in task.votes
        if vote.preference and vote.dimension in dimensions
        for d in (dimensions.index(vote.dimension),)
    ]
    lead = torch.stack(leads) if leads else values.new_zeros(0)
    return (lead[lead.isfinite()] > 0).float()


def only_ties(dimension: str, tasks: Sequence[RewardTask]) -> bool:
    """Whether a dimension has verdicts and every one of them is a tie."""
    votes: list[Vote] = [v for t in tasks for v in t.votes if v.dimension == dimension]
    return bool(votes) and all(vote.preference == 0 for vote in votes)

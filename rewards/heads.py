"""Several heads on one backbone: an ensemble at the price of one forward pass through it.

The first head is the model's own, the others begin from weights of their own, and each sees the verdicts with weights of its own; so they differ where the
verdicts decide nothing. Source: shared-backbone reward ensembles, 2401.16635 and 2312.09244; the weights are Rubin's (1981) Bayesian bootstrap.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reelhf.errors import UserError

if TYPE_CHECKING:
    from rewards.data import RewardTask
    from rewards.module import RewardModule

OTHER_HEADS = "other_heads"
"""Attribute of a model that holds every head but its own."""


def own_readouts(model: RewardModule) -> dict[str, Any]:
    """The parts of a model that turn features into scores, by name; a name may be that of a parameter inside a part of the backbone."""
    return {name: part for name in model.readouts if (part := _named(model, name)) is not None}


def _named(model: nn.Module, name: str) -> Any:
    found: Any = model
    for word in name.split("."):
        found = getattr(found, word, None)
    return found


def every_head(model: RewardModule) -> Iterator[Mapping[str, Any]]:
    """The readouts of each head: the model's own, then the others."""
    own = own_readouts(model)
    yield own
    for head in getattr(model, OTHER_HEADS, ()):
        yield {name: getattr(head, name.replace(".", "_")) for name in own}


def set_heads(model: RewardModule, count: int) -> None:
    """Give a model this many heads: those it has stay, the first above all; new ones are drawn."""
    others = list(getattr(model, OTHER_HEADS, ()))[: count - 1]
    if not others and count == 1:
        if hasattr(model, OTHER_HEADS):
            del model.other_heads, model.head_mean, model.head_std
        return
    while len(others) < count - 1:
        others.append(_new_head(model))
    same = len(others) == len(getattr(model, OTHER_HEADS, ()))
    if not same:
        model.other_heads = nn.ModuleList(others)
        at = model.mean.device
        model.register_buffer("head_mean", torch.zeros(count, len(model.dimensions), device=at))
        model.register_buffer("head_std", torch.ones(count, len(model.dimensions), device=at))


def _new_head(model: RewardModule) -> nn.Module:
    """Modules drawn anew, and copies of the parameters that belong to a part of the backbone."""
    fresh = model.new_readouts()
    if not fresh:
        raise UserError(
            f"a {model.kind} reward has no head to have several of; expected ensemble.kind seeds"
        )
    head = nn.Module()
    for name, part in own_readouts(model).items():
        if name in fresh:
            head.add_module(name, fresh[name])
        else:
            head.register_parameter(name.replace(".", "_"), nn.Parameter(part.detach().clone()))
    return head.to(model.mean.device)


def mean_and_disagreement(z: Tensor, own_std: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean [B, D] over the members of their z-scores [H, B, D], and how unsure they are together: sqrt(var_h(z) + mean_h(std^2)).

    Source: the law of total variance, as in deep ensembles, 1612.01474 sec. 2.4.
    """
    spread = z.var(dim=0, correction=1)
    if own_std is not None:
        spread = spread + own_std.square().mean(0)
    return z.mean(0), (spread + 1e-12).sqrt()  # a root has no slope at 0


def bootstrap_weight(seed: int, head: int, prompt_id: str) -> float:
    """Weight of a prompt's verdicts for one head, exponential of mean 1: the same in every process and after every resume."""
    digest = hashlib.sha256(f"{seed}/{head}/{prompt_id}".encode()).digest()
    return -math.log((int.from_bytes(digest[:8], "big") + 0.5) / 2**64)


def bootstrapped(tasks: Sequence[RewardTask], seed: int, head: int) -> list[RewardTask]:
    """The tasks as one head sees them: every verdict's weight times its prompt's."""

    def weighed(rows: Sequence[Any], factor: float) -> tuple[Any, ...]:
        return tuple(replace(row, weight=row.weight * factor) for row in rows)

    return [
        replace(task, votes=weighed(task.votes, factor), picks=weighed(task.picks, factor))
        for task in tasks
        for factor in (bootstrap_weight(seed, head, task.prompt_id),)
    ]

"""How hard each reward pulls at the pixels, and whether they pull the same way: the scale of a reward is not that of its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from rewards.base import FrameSelection
from rewards.composite import CompositeReward


def reward_log(
    composite: CompositeReward,
    frames: Tensor,
    *,
    fps: Tensor | float,
    prompts: Sequence[Any],
    selections: Sequence[FrameSelection] | None = None,
) -> dict[str, float]:
    """What each reward says of a batch of frames [B, 3, F, H, W] and where it would move it; parameters get no gradient.

    Returns, over the valid clips: `reward_value/<d>` the mean raw score; `reward_spread/<d>` its standard deviation over clips;
        `reward_disagreement/<d>` the mean spread of an ensemble, where there is one; `reward_gradient/<d>` the mean L2 norm of
        d z / d pixels of one clip, z the score in units of its validated spread; `reward_pull/<d>` the same after the cap, which is
        what is followed; `reward_cosine/<d>,<e>` the mean cosine of two gradients, in the dimensions' order, left out where one vanishes.
    """
    # the same models without the clipping of the summed gradient
    bare = CompositeReward(list(composite.models), composite.weights, composite.cap)
    leaf = frames.detach().requires_grad_()
    scores = bare.score(leaf, fps=fps, prompts=prompts, selections=selections)
    log: dict[str, float] = {}
    if not scores.valid.any():
        return log
    values = scores.values.detach()[scores.valid]
    gradients: dict[str, Tensor] = {}
    scale = torch.cat([model.std for model in composite.models])
    bounded = scores.z.detach()[scores.valid]
    slopes = torch.where(
        bounded > 0, 1 - (bounded / composite.cap).square(), 1.0
    )  # of the soft cap
    last = len(scores.dimensions) - 1
    for index, name in enumerate(scores.dimensions):
        log[f"reward_value/{name}"] = float(values[:, index].mean())
        log[f"reward_spread/{name}"] = float(values[:, index].std(unbiased=False))
        if scores.std is not None and scores.std[scores.valid, index].isfinite().all():
            log[f"reward_disagreement/{name}"] = float(scores.std[scores.valid, index].mean())
        total = scores.values[scores.valid, index].sum() / scale[index]
        (found,) = torch.autograd.grad(total, leaf, retain_graph=index < last, allow_unused=True)
        found = torch.zeros_like(leaf) if found is None else found
        gradients[name] = found[scores.valid].flatten(1)
        norms = gradients[name].norm(dim=1)
        log[f"reward_gradient/{name}"] = float(norms.mean())
        log[f"reward_pull/{name}"] = float((norms * slopes[:, index]).mean())
    for a, b in combinations(scores.dimensions, 2):
        norms = gradients[a].norm(dim=1) * gradients[b].norm(dim=1)
        pulled = norms > 0
        if pulled.any():
            dots = (gradients[a] * gradients[b]).sum(1)
            log[f"reward_cosine/{a},{b}"] = float((dots / norms.clamp_min(1e-30))[pulled].mean())
    return log

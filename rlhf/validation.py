"""How good is the policy, on prompts it does not train on and by rewards it is not trained on; and which step is the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from generator.sampling import sample_latents
from reelhf.engine import all_reduce_sum, device, is_main, rank, world_size
from rlhf.examples import Examples, draw_seed
from rlhf.hacking import (
    ValidationReading,
    ensemble_spread,
    motion_amplitude,
    saturated_fraction,
)

if TYPE_CHECKING:
    from generator.base import VideoBackbone
    from rewards import CompositeReward

KeepBest = Literal["balanced_gain", "every_dimension"]


@dataclass(frozen=True)
class Validation:
    """The policy at one step."""

    metrics: dict[str, float]
    """Means over the valid clips. `validation/<dimension>` and `held_out/<dimension>` are raw rewards, `..._z/<dimension>`
    their bounded z-scores, `.../total` the composites."""
    samples: list[Tensor]
    """The first clips [3, F, H, W] in [0, 1], on the first process only."""

    def reading(self, dimensions: Sequence[str]) -> ValidationReading:
        """What the hacking monitor looks at."""
        return ValidationReading(
            rewards={name: self.metrics[f"validation/{name}"] for name in dimensions},
            total=self.metrics["validation/total"],
            held_out_total=self.metrics["held_out/total"],
            motion=self.metrics["hacking/motion_amplitude"],
            saturation=self.metrics["hacking/saturated_fraction"],
            spread=self.metrics["hacking/ensemble_spread"],
        )


@torch.no_grad()
def validate(
    backbone: VideoBackbone,
    denoiser: nn.Module,
    reward: CompositeReward,
    judge: CompositeReward,
    examples: Examples,
    *,
    seed: int,
    batch_size: int,
    num_samples: int,
) -> Validation:
    """Sample the validation prompts with the checkpoint's own sampler and the same noise every time, and score them.

    The processes share the prompts; each clip's row of the table is written by one of them and the sum is exact.
    """
    names = reward.dimensions
    judge_order = [judge.dimensions.index(name) for name in names]
    labels = [f"{kind}/{name}" for kind in ("validation", "validation_z") for name in names]
    labels += [f"{kind}/{name}" for kind in ("held_out", "held_out_z") for name in names]
    labels += ["validation/total", "held_out/total"]
    labels += ["hacking/motion_amplitude", "hacking/saturated_fraction", "hacking/ensemble_spread"]
    table = torch.zeros(len(examples), len(labels) + 1, dtype=torch.float64)  # last column: valid

    mine = list(range(rank(), len(examples), world_size()))
    samples: dict[int, Tensor] = {}
    for begin in range(0, len(mine), batch_size):
        rows = mine[begin : begin + batch_size]
        batch = examples.take(rows)
        seeds = [draw_seed(seed, "validation", 0, row) for row in rows]
        latents = sample_latents(
            backbone,
            batch.condition,
            batch.task,
            batch.noise(seeds)(0),
            denoiser=denoiser,
            seeds=seeds,
        )
        frames, _ = backbone.decode(latents)
        own = reward.score(frames, fps=backbone.fps, prompts=batch.reward_prompts)
        held = judge.score(frames, fps=backbone.fps, prompts=batch.judge_prompts)
        columns = [own.values, own.z, held.values[:, judge_order], held.z[:, judge_order]]
        signs = (motion_amplitude(frames), saturated_fraction(frames))
        means = (own.total, held.total, *signs, ensemble_spread([own.total, held.total]))
        filled = torch.cat(
            [*columns, torch.stack(means, dim=1), torch.ones_like(means[0])[:, None]], 1
        )
        valid = own.valid & held.valid
        table[rows] = filled.masked_fill(~valid[:, None], 0.0).double().cpu()
        samples |= {row: clip for row, clip in zip(rows, frames, strict=True) if row < num_samples}

    sums = all_reduce_sum(table.to(device())).sum(0).tolist()
    num_valid = sums.pop()
    metrics = {
        label: value / max(num_valid, 1.0) for label, value in zip(labels, sums, strict=True)
    }
    metrics["validation/valid_fraction"] = num_valid / len(examples)
    clips = [samples[row].clamp(0, 1).cpu() for row in sorted(samples)] if is_main() else []
    return Validation(metrics, clips)


def keep_best_score(
    rule: KeepBest,
    now: Mapping[str, float],
    first: Mapping[str, float],
    weights: Mapping[str, float],
    alarms: Sequence[str],
) -> float | None:
    """How good a validation is by the rule of the config; None when it may not be kept.

    Args:
        rule: `balanced_gain` is the smaller gain of the training composite and of the held-out composite;
            `every_dimension` the smallest gain of any weighted dimension, averaged over both rewards, in bounded z.
        now, first: validation metrics of this step and of the start; the start itself scores 0.
        alarms: signs of hacking; with one, or with a held-out total below the start, nothing is kept.
    """
    gain = {name: now[name] - first[name] for name in first}
    if alarms or gain["held_out/total"] < 0:
        return None
    if rule == "balanced_gain":
        return min(gain["validation/total"], gain["held_out/total"])
    named = [name for name, weight in weights.items() if weight > 0]
    return min((gain[f"validation_z/{name}"] + gain[f"held_out_z/{name}"]) / 2 for name in named)

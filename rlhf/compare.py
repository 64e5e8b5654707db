"""Is the generator better than it was? Same prompts, same noise, before and after, with an interval on every difference.

Prompts, seeds, weights, margins and checks are fixed in the config before anything is measured. Every number is a mean over
prompts of the paired difference (seeds of one prompt are averaged first), with a percentile bootstrap over prompts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveInt

from reelhf.config import Config

if TYPE_CHECKING:
    import torch
    from numpy import ndarray
    from torch import Tensor

    from rewards.composite import CompositeReward

Gold = Callable[["Tensor", str, float], Mapping[str, float]]
"""(frames [3, F, H, W], prompt, fps) -> a value in [0, 1] per gold dimension, and "motion_amplitude"."""
COMPARISON_VERSION = 1
MIN_RESAMPLED_PROMPTS = 8
"""With fewer prompts the bootstrap resamples clips instead."""
PAIR_SEEDS = 2
"""Clips per prompt and side that are written as videos."""
AMPLITUDE = "motion/amplitude"
"""Mean absolute difference of neighbouring frames: no gold and no reward, so it exists for real clips too."""


class CompareConfig(Config):
    """What is measured and what must be shown, stated beforehand."""

    seeds_per_prompt: PositiveInt = 2
    """Clips per prompt, before and after; averaged before anything is compared."""
    min_clips: int = Field(32, ge=2)
    """Fewer prompts than this need more clips each to reach it, before and after."""
    seed: int = 77
    """First noise seed; no other stage uses seeds of this range."""
    resamples: PositiveInt = 4000
    """Bootstrap resamples over prompts."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Width of every two-sided interval."""
    must_rise: tuple[str, ...] = ()
    """Measures whose interval must lie above zero, such as "reward/motion_quality" or "gold/composite"."""
    must_not_fall: dict[str, float] = Field(default_factory=dict)
    """Measure -> non-inferiority margin in its own unit: the interval must lie above minus the margin."""
    must_not_fall_fraction: dict[str, float] = Field(default_factory=dict)
    """The same with the margin as a fraction of the mean before."""
    num_pairs: PositiveInt = 8
    """Prompts whose clips are written as before/after videos, evenly spread over the prompts."""
    batch_size: PositiveInt = 32
    """Clips sampled and scored at once."""


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval."""

    mean: float
    low: float
    high: float


def mean_interval(
    differences: Sequence[float], *, resamples: int = 4000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of paired differences with a percentile interval from resampling the pairs.

    Args:
        differences: one per prompt, finite, at least two.
    Source: Efron & Tibshirani (1993), ch. 13.
    """
    import torch

    from distill.losses import paired_bootstrap

    values = torch.tensor(differences, dtype=torch.float64)
    if values.ndim != 1 or len(values) < 2 or not values.isfinite().all():
        raise ValueError(f"expected at least two finite differences in one row, got {differences}")
    low, high = paired_bootstrap(values, num_resamples=resamples, level=confidence, seed=seed)
    return Interval(float(values.mean()), low, high)


def compare(
    config: CompareConfig,
    *,
    before: Path,
    after: Path,
    prompts: Sequence[str],
    rewards: Path,
    held_out: Path,
    weights: Mapping[str, float],
    low_res_generator: Path | None,
    gold: Gold | None,
    out: Path,
) -> Path:
    """Sample both generators on the same prompts and noise, measure, and write `out/comparison.json` and clip pairs.

    Args:
        before, after: generator folders of one role.
        prompts: prompts that nothing was trained or selected on.
        weights: reward dimension -> weight of the composite, those of the training run.
        low_res_generator: what makes the refiner's input, the same for both; None for a base.
        gold: ground truth where it exists; None for real clips, whose gold checks are then "not measured".
    Returns: `out`.
    """
    from generator.checkpoint import load_generator
    from rewards.composite import load_composite

    scorers = {
        "reward": load_composite(rewards, weights),
        "held_out": load_composite(held_out, weights),
    }
    low_res = None if low_res_generator is None else load_generator(low_res_generator)
    draws = Draws.of(config, prompts)
    out.mkdir(parents=True, exist_ok=True)
    models = {"before": load_generator(before), "after": load_generator(after)}
    sides = {}
    for side, model in models.items():
        sides[side] = _measure_generator(
            config, model, low_res, draws, scorers, gold, out / "pairs", side
        )
    per_unit = {
        name: {side: _unit_means(sides[side][name], draws.clips_per_unit) for side in sides}
        for name in sides["before"]
    }
    measures = {name: _difference(config, values) for name, values in per_unit.items()}
    report = {
        "schema_version": COMPARISON_VERSION,
        "role": models["after"].role,
        "fps": models["after"].fps,
        "num_frames": models["after"].frame_shape[0],
        "num_prompts": len(prompts),
        "seeds_per_prompt": draws.per_prompt,
        "unit": draws.unit,
        "resamples": config.resamples,
        "confidence": config.confidence,
        "weights": dict(weights),
        "has_gold": gold is not None,
        "measures": measures,
        "checks": run_checks(config, measures, has_gold=gold is not None),
        "pairs": _pairs(draws, sides),
        "prompts": list(prompts),
        "per_unit": per_unit,
    }
    (out / "comparison.json").write_text(json.dumps(_finite(report), indent=1, ensure_ascii=False))
    return out


@dataclass(frozen=True)
class Draws:
    """Which clips are sampled, before and after: the same prompts and noise seeds, in this order."""

    prompts: tuple[str, ...]
    per_prompt: int
    """Clips of each prompt, one after the other."""
    first_seed: int
    chosen: tuple[int, ...]
    """Prompts whose first clips are written as videos."""

    @staticmethod
    def of(config: CompareConfig, prompts: Sequence[str]) -> Draws:
        return Draws(
            prompts=tuple(prompts),
            per_prompt=max(config.seeds_per_prompt, -(-config.min_clips // len(prompts))),
            first_seed=config.seed * 1_000_000,
            chosen=tuple(
                len(prompts) * i // config.num_pairs
                for i in range(min(config.num_pairs, len(prompts)))
            ),
        )

    @property
    def unit(self) -> str:
        """What the bootstrap resamples. A handful of prompts cannot be: then the interval speaks of these alone, over their clips."""
        return "prompt" if len(self.prompts) >= MIN_RESAMPLED_PROMPTS else "clip"

    @property
    def clips_per_unit(self) -> int:
        return self.per_prompt if self.unit == "prompt" else 1

    @property
    def repeated(self) -> list[str]:
        """The prompt of each clip."""
        return [prompt for prompt in self.prompts for _ in range(self.per_prompt)]

    @property
    def seeds(self) -> list[int]:
        """The noise seed of each clip."""
        return [self.first_seed + index for index in range(len(self.prompts) * self.per_prompt)]

    def videos(self, number: int) -> dict[int, str]:
        """Clip -> file name, without the side, of the `number`-th chosen prompt."""
        start = self.chosen[number] * self.per_prompt
        return {start + i: f"{number:02d}_{i}" for i in range(min(self.per_prompt, PAIR_SEEDS))}


def _pairs(draws: Draws, sides: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict]:
    """The chosen prompts with their videos and what their first clips measured."""
    pairs = []
    for number, index in enumerate(draws.chosen):
        names, clip = draws.videos(number).values(), index * draws.per_prompt
        pairs.append(
            {
                "prompt": draws.prompts[index],
                "seed": draws.seeds[clip],
                "clips": {side: [f"pairs/{name}_{side}.mp4" for name in names] for side in sides},
                "measures": {
                    name: [sides[side][name][clip] for side in ("before", "after")]
                    for name in sides["before"]
                },
            }
        )
    return pairs


def _measure_generator(
    config: CompareConfig,
    model: Any,
    low_res: Any,
    draws: Draws,
    scorers: Mapping[str, CompositeReward],
    gold: Gold | None,
    folder: Path,
    side: str,
) -> dict[str, list[float]]:
    """Every measure of every clip of one generator, in order; NaN where a reward called a clip invalid."""
    from reelhf.progress import track
    from reelhf.video import write_video
    from rlhf.candidates import sample_clips

    prompts = draws.repeated
    keep = {
        clip: name
        for number in range(len(draws.chosen))
        for clip, name in draws.videos(number).items()
    }
    columns: dict[str, list[float]] = {}
    batches = sample_clips(
        model, prompts, draws.seeds, low_res=low_res, batch_size=config.batch_size
    )
    start = 0
    total = math.ceil(len(prompts) / config.batch_size)
    for frames in track(batches, label=f"{model.role} {side}", total=total):  # [B, 3, F, H, W]
        own = prompts[start : start + len(frames)]
        for name, values in measure_clips(frames, own, model.fps, scorers, gold).items():
            columns.setdefault(name, []).extend(values)
        for offset, clip in enumerate(frames):
            if start + offset in keep:
                write_video(folder / f"{keep[start + offset]}_{side}.mp4", clip, model.fps)
        start += len(frames)
    return columns


def measure_clips(
    frames: Tensor,
    prompts: Sequence[str],
    fps: float,
    scorers: Mapping[str, CompositeReward],
    gold: Gold | None,
) -> dict[str, list[float]]:
    """Measures per clip of a batch [B, 3, F, H, W]: rewards in units of their frozen spread, unbounded, and gold."""
    import torch

    columns: dict[str, list[float]] = {}
    for scorer_name, scorer in scorers.items():
        with torch.no_grad():
            scores = scorer.score(frames, fps=fps, prompts=list(prompts))
        z = standardised(scorer, scores.values)
        for column, dimension in enumerate(scores.dimensions):
            columns[f"{scorer_name}/{dimension}"] = z[:, column].tolist()
        total = scores.total.masked_fill(~scores.valid, float("nan"))
        columns[f"{scorer_name}/total"] = total.tolist()
    if gold is not None:
        from generator.toygold import composite

        measured = [gold(clip, prompt, fps) for clip, prompt in zip(frames, prompts, strict=True)]
        for name in measured[0]:
            columns[f"gold/{name}"] = [float(one[name]) for one in measured]
        columns["gold/composite"] = [float(composite(one)) for one in measured]
    columns[AMPLITUDE] = frames.diff(dim=2).abs().flatten(1).mean(1).tolist()
    return columns


def standardised(scorer: CompositeReward, values: torch.Tensor) -> torch.Tensor:
    """Raw logits [B, D] -> (value - mean) / std with each model's frozen statistics."""
    import torch

    mean = torch.cat([model.mean for model in scorer.models])  # type: ignore[arg-type]
    std = torch.cat([model.std for model in scorer.models])  # type: ignore[arg-type]
    return (values - mean) / std


def run_checks(
    config: CompareConfig, measures: Mapping[str, Mapping], *, has_gold: bool
) -> list[dict]:
    """Each stated check with its number, interval, threshold and status: "pass", "fail" or "not_measured"."""
    rules = [(name, "rises", 0.0) for name in config.must_rise]
    rules += [(name, "does_not_fall", -margin) for name, margin in config.must_not_fall.items()]
    rules += [
        (
            name,
            "does_not_fall",
            -fraction * abs(measures[name]["before"]) if name in measures else 0.0,
        )
        for name, fraction in config.must_not_fall_fraction.items()
    ]
    checks = []
    for name, rule, threshold in rules:
        measure = measures.get(name)
        if measure is None:
            if has_gold or not name.startswith("gold/"):
                raise ValueError(f"the checks name '{name}'; measured were {', '.join(measures)}")
            checks.append(
                {
                    "measure": name,
                    "rule": rule,
                    "threshold": threshold,
                    "status": "not_measured",
                    "reason": "real clips have no gold",
                }
            )
            continue
        status = "pass" if measure["low"] > threshold else "fail"
        interval = {key: measure[key] for key in ("before", "after", "difference", "low", "high")}
        checks.append(
            {"measure": name, "rule": rule, "threshold": threshold, "status": status} | interval
        )
    return checks


def _unit_means(values: Sequence[float], clips_per_unit: int) -> list[float]:
    """Mean over each unit's clips, without invalid ones; NaN where all were invalid."""
    import numpy as np

    table: ndarray = np.asarray(values, dtype=np.float64).reshape(-1, clips_per_unit)
    return [
        float(row[np.isfinite(row)].mean()) if np.isfinite(row).any() else math.nan for row in table
    ]


def _difference(config: CompareConfig, values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean before, after and difference over the units valid on both sides, with its interval and their count."""
    pairs = [
        (b, a)
        for b, a in zip(values["before"], values["after"], strict=True)
        if math.isfinite(b) and math.isfinite(a)
    ]
    if len(pairs) < 2:
        return {
            "before": math.nan,
            "after": math.nan,
            "difference": math.nan,
            "low": -math.inf,
            "high": math.inf,
            "n": 0,
        }
    interval = mean_interval(
        [a - b for b, a in pairs],
        resamples=config.resamples,
        confidence=config.confidence,
        seed=config.seed,
    )
    before, after = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return {
        "before": before,
        "after": after,
        "difference": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "n": len(pairs),
    }


def _finite(value: Any) -> Any:
    """The same structure with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def gold_curve(run: Path, gold: Gold, *, prompts: Sequence[str], fps: float) -> list[dict]:
    """Gold of the validation samples that a finished run saved, per step: [{"step", "n", "gold/<dimension>": mean, ...}].

    Read back from the run's mp4 files after training, so no training or selection step can have seen it.

    Args:
        prompts: the run's validation prompts; a step's samples belong to the first of them, in order.
    """
    from generator.toygold import composite
    from reelhf.video import read_video

    rows = []
    for folder in sorted((run / "samples").glob("step_*")):
        measured = []
        for path, prompt in zip(sorted(folder.glob("*.mp4")), prompts, strict=False):
            frames, _ = read_video(path)
            one = dict(gold(frames, prompt, fps))
            measured.append(one | {"composite": composite(one)})
        if measured:
            means = {
                f"gold/{name}": sum(one[name] for one in measured) / len(measured)
                for name in measured[0]
            }
            step = int(folder.name.removeprefix("step_"))
            rows.append({"step": step, "n": len(measured)} | means)
    return rows

"""How much each dimension counts for what people prefer: the weights of the composite, from their verdicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from annotation.records import read_preferences
from reelhf.errors import UserError
from rewards.data import load_clips, load_tasks, score_clips

RIDGE = 1e-2
"""Pull of every weight towards 0, in units of one pair: keeps weights finite when the scores predict every verdict."""
BOOTSTRAP_SAMPLES = 200
ALL = "all"


def fit_win_weights(gaps: Tensor, won: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """Logistic regression without intercept, weights not negative: P(a wins) = sigma(gaps @ weights).

    Args:
        gaps: z-scores of a minus those of b, [N, D].
        won: 1 where a won, 0 where b did, [N].
    Returns: weights [D]; a dimension whose scores point against the wins weighs 0, since a composite is to be maximised.
    Source: Magic-Bench 2509.17907, wins regressed on dimension scores; minimised by Newton's method on the active dimensions.
    """
    gaps, won = gaps.double(), won.double()
    weights = torch.zeros(gaps.shape[1], dtype=torch.double)
    active = torch.ones_like(weights, dtype=torch.bool)
    while active.any():
        chosen = _newton(gaps[:, active], won, ridge)
        if (chosen >= 0).all():
            weights[active] = chosen
            break
        places = active.nonzero().squeeze(1)
        active[places[chosen.argmin()]] = False  # the one that points furthest the wrong way
    return weights


def _newton(gaps: Tensor, won: Tensor, ridge: float) -> Tensor:
    def loss(weights: Tensor) -> Tensor:
        log_likelihood = F.binary_cross_entropy_with_logits(gaps @ weights, won, reduction="sum")
        return log_likelihood + 0.5 * ridge * weights.square().sum()

    weights = torch.zeros(gaps.shape[1], dtype=torch.double)
    for _ in range(50):
        p = torch.sigmoid(gaps @ weights)
        slope = gaps.T @ (p - won) + ridge * weights
        curve = (gaps * (p * (1 - p))[:, None]).T @ gaps + ridge * torch.eye(len(weights))
        step = torch.linalg.solve(curve, slope)
        before, size = loss(weights), 1.0
        while loss(weights - size * step) > before and size > 1e-6:
            size /= 2  # a full step may overshoot where the logistic is flat
        weights = weights - size * step
        if step.abs().max() < 1e-9:
            break
    return weights


def normalised(weights: Tensor) -> Tensor:
    """Weights of mean 1, so that they take the place of weights set by hand; zeros where all are 0."""
    return weights / weights.mean() if weights.sum() > 0 else weights


def fit_composite_weights(
    rewards: Path, preferences: Path, *, wins: str = "overall", seed: int = 0
) -> dict[str, Any]:
    """Weights of every loaded dimension from the verdicts of the learned-on splits.

    Args:
        wins: the dimension whose verdicts say who won overall, or "all": the verdicts of every dimension together.
    Returns: {"weights": {dimension: weight, mean 1}, "intervals": 95 % by resampling prompts, "pairs", "accuracy"}.
    """
    from rewards.composite import load_composite

    data = read_preferences(preferences)
    tasks = load_tasks(data, splits=("train", "validation"))
    composite = load_composite(rewards, {})
    judged = sorted({vote.dimension for task in tasks for vote in task.votes})
    pairs = [
        (task, vote)
        for task in tasks
        for vote in task.votes
        if vote.preference != 0 and wins in (ALL, vote.dimension)
    ]
    if not pairs:
        raise UserError(
            f"no verdict on {wins!r} among the training and validation rows of {preferences}; it has {', '.join(judged) or 'none'}, and "
            f"'{ALL}' takes all of them"
        )
    clips = load_clips(data, [task for task, _ in pairs])
    wanted = [(sha, task.prompt) for task, _ in pairs for sha in task.clips]
    parts = [
        {
            key: (found - model.mean) / model.std
            for key, found in score_clips(model, clips, wanted).items()
        }
        for model in composite.models
    ]
    z = {key: torch.cat([part[key] for part in parts]) for key in dict.fromkeys(wanted)}
    gaps = torch.stack(
        [z[t.clips[v.a], t.prompt] - z[t.clips[v.b], t.prompt] for t, v in pairs]
    )  # [N, D]
    known = gaps.isfinite().all(1)
    won = torch.tensor([v.preference > 0 for _, v in pairs])[known]
    prompts = [
        task.prompt_id for (task, _), keep in zip(pairs, known.tolist(), strict=True) if keep
    ]
    gaps = gaps[known]
    weights = normalised(fit_win_weights(gaps, won))
    draws = _bootstrap(gaps, won, prompts, seed)
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.double), dim=0)
    hits = ((gaps.double() @ weights > 0) == won).double().mean()
    names = composite.dimensions
    return {
        "wins": wins,
        "weights": dict(zip(names, weights.tolist(), strict=True)),
        "intervals": {n: [float(low[i]), float(high[i])] for i, n in enumerate(names)},
        "pairs": len(gaps),
        "accuracy_on_these_pairs": float(hits),
    }


def _bootstrap(gaps: Tensor, won: Tensor, prompts: Sequence[str], seed: int) -> Tensor:
    """Weights of resampled prompts, [samples, D]."""
    generator = torch.Generator().manual_seed(seed)
    places: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(index)
    groups = list(places.values())
    found = []
    for _ in range(BOOTSTRAP_SAMPLES):
        drawn = torch.randint(len(groups), (len(groups),), generator=generator).tolist()
        rows = [index for group in drawn for index in groups[group]]
        found.append(normalised(fit_win_weights(gaps[rows], won[rows])))
    return torch.stack(found)


def write_weights(found: dict[str, Any], out: Path) -> Path:
    """The result as JSON beside the weights as YAML, in the words of `rlhf train`; returns the YAML's path."""
    import yaml

    from reelhf.run import write_text_atomic

    out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out / "weights.json", json.dumps(found, indent=2) + "\n")
    rounded = {name: round(weight, 4) for name, weight in found["weights"].items()}
    write_text_atomic(out / "weights.yaml", yaml.safe_dump({"reward_weights": rounded}))
    return out / "weights.yaml"

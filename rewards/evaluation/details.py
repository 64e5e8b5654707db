"""Beyond the headline: one dimension of one reward, looked at from every side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from annotation.records import PreferenceData
from rewards.data import RewardTask
from rewards.evaluation.baselines import majority_verdict
from rewards.evaluation.metrics import (
    accuracy_with_ties,
    balanced_accuracy,
    best_tie_threshold,
    confusion,
    expected_calibration_error,
    mean_interval,
    predicted,
    published_accuracy_with_ties,
    reliability,
)
from rewards.evaluation.pairs import (
    Pairs,
    Predictor,
    accuracy,
    accuracy_interval,
    decided_pairs,
    gaps_of,
    prompts_of,
    verdict_pairs,
    verdicts_of,
)
from rewards.evaluation.people import people_agreement, rank_correlation, rows_of_pairs


def describe_dimension(
    data: PreferenceData,
    tasks: Sequence[RewardTask],
    dimension: str,
    predict: Predictor,
    *,
    temperature: float,
    chooser: tuple[Sequence[RewardTask], Predictor],
    chosen_on: str | None,
) -> dict[str, Any]:
    """Ties, calibration, rank correlation, people's agreement and single sources.

    Args:
        chooser: tasks on which the tie threshold is chosen, and the scores there; none of them is among `tasks`.
        chosen_on: the split those are of.
    """
    pairs = verdict_pairs(tasks, dimension)
    decided = [(task, vote) for task, vote in pairs if vote.preference != 0]
    gaps, verdicts = gaps_of(predict, decided), verdicts_of(decided)
    bins = reliability(gaps, verdicts, temperature=temperature)
    learned = verdict_pairs(chooser[0], dimension)
    threshold = best_tie_threshold(gaps_of(chooser[1], learned), verdicts_of(learned))
    index = {task.task_id: task for task in tasks}

    def gap(row: Any) -> float:
        task = index[row["task_id"]]
        a, b = (task.clips.index(row[key]) for key in ("clip_a", "clip_b"))
        return predict(task, a) - predict(task, b)

    return {
        "ties": describe_ties(
            predict,
            pairs,
            threshold=threshold,
            chosen_on=chosen_on if learned else None,
            majority=majority_verdict(learned or pairs),
        ),
        "calibration": {
            "temperature": temperature,
            "expected_calibration_error": expected_calibration_error(bins),
            "bins": [asdict(b) for b in bins],
        },
        "rank_correlation": rank_correlation(tasks, dimension, predict),
        "people": people_agreement(rows_of_pairs(data.preferences, tasks, dimension), gap),
        "position_flips": 0.0,  # a clip is scored by itself: nothing is shown first
        "by_stage": by_source(data, tasks, dimension, predict, "stage"),
        "by_model": by_source(data, tasks, dimension, predict, "model"),
    }


def describe_disagreement(
    pairs: Pairs, predict: Predictor, doubt: Predictor | None
) -> dict[str, Any] | None:
    """Whether a reward that knows its uncertainty errs where it is unsure; None for one that knows none, or without pairs.

    Args:
        doubt: std of each score. A pair's is the root of the sum of both squares.
    Returns: {"mean": of all pairs, "agreed" and "disputed": accuracy, interval and n of the half with less and with more of it}.
    """
    if doubt is None or not pairs:
        return None
    known = [
        (math.hypot(doubt(task, vote.a), doubt(task, vote.b)), (task, vote)) for task, vote in pairs
    ]
    ranked = sorted((row for row in known if math.isfinite(row[0])), key=lambda row: row[0])
    half = (len(ranked) + 1) // 2
    halves = {"agreed": ranked[:half], "disputed": ranked[half:]}
    out: dict[str, Any] = {"mean": sum(d for d, _ in ranked) / max(1, len(ranked))}
    for name, rows in halves.items():
        own = [pair for _, pair in rows]
        out[name] = {
            "accuracy": accuracy(predict, own),
            "n": len(own),
            "interval": accuracy_interval(predict, own),
        }
    return out


def describe_ties(
    predict: Predictor, pairs: Pairs, *, threshold: float, chosen_on: str | None, majority: int
) -> dict[str, Any] | None:
    """Accuracy over all verdicts, ties among them, at a threshold chosen elsewhere; beside it what guessing reaches."""
    if not pairs:
        return None
    gaps, verdicts = gaps_of(predict, pairs), verdicts_of(pairs)
    hits = (predicted(gaps, threshold) == verdicts).double()
    return {
        "n": len(pairs),
        "tie_share": float((verdicts == 0).double().mean()),
        "threshold": threshold,
        "threshold_chosen_on": chosen_on,
        "accuracy": accuracy_with_ties(gaps, verdicts, threshold),
        "interval": mean_interval(hits.tolist(), prompts_of(pairs)),
        "balanced_accuracy": balanced_accuracy(gaps, verdicts, threshold),
        "confusion": confusion(gaps, verdicts, threshold),
        "majority": float((verdicts == majority).double().mean()),
        # the threshold that suits these very pairs best: what published tables print, never below the tie share
        "published_convention": published_accuracy_with_ties(gaps.tolist(), verdicts.tolist()),
    }


def by_source(
    data: PreferenceData,
    tasks: Sequence[RewardTask],
    dimension: str,
    predict: Predictor,
    column: str,
) -> dict[str, dict[str, Any]]:
    """Accuracy on the decided pairs that a source's clips are in, per source: `column` is stage or model."""
    source = {row["sha256"]: row[column] for row in data.clips}
    pairs = decided_pairs(tasks, dimension, same_stage=None)
    found = {}
    for name in sorted({source[sha] for task, _ in pairs for sha in task.clips}):
        own = [
            (task, vote)
            for task, vote in pairs
            if name in (source[task.clips[vote.a]], source[task.clips[vote.b]])
        ]
        if own:
            found[name] = {
                "accuracy": accuracy(predict, own),
                "n": len(own),
                "interval": accuracy_interval(predict, own),
            }
    return found

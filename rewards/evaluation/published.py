"""Accuracies by the published conventions of VideoGen-RewardBench and GenAI-Bench, to be read beside published tables.

Nothing here is a fair estimate: with ties, the threshold is chosen on the very pairs it is reported on (`rewards.evaluation.metrics`).
`overall` is predicted by the sum of the z-scores of the dimensions at hand, as VideoAlign sums its three.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from annotation.records import read_preferences
from reelhf.errors import UserError
from reelhf.tables import format_table
from rewards.data import RewardTask, load_clips, load_tasks, score_clips
from rewards.evaluation.metrics import (
    published_accuracy_with_ties,
    published_accuracy_without_ties,
)
from rewards.evaluation.pairs import Predictor, gaps_of, verdict_pairs, verdicts_of
from rewards.importers.videoalign import DIMENSIONS, OVERALL

RESULT = "published.json"
SUMMED = tuple(DIMENSIONS.values())
"""Dimensions whose z-scores make up `overall`."""


def evaluate_published(rewards: Path, preferences: Path, out: Path) -> dict[str, Any]:
    """Dimension -> {"with_ties", "without_ties", "n", "tie_share", "noise_with_ties"}; written to out/published.json."""
    from reelhf.run import write_text_atomic
    from rewards.checkpoint import load_reward
    from rewards.composite import MODEL_FOLDERS

    data = read_preferences(preferences)
    tasks = load_tasks(data)
    folders = [Path(rewards) / n for n in MODEL_FOLDERS if (Path(rewards) / n).is_dir()]
    if not folders:
        raise UserError(
            f"{rewards} holds no reward model; expected one of {', '.join(MODEL_FOLDERS)}/"
        )
    clips = load_clips(data, tasks)
    pairs = [(sha, task.prompt) for task in tasks for sha in task.clips]
    z: dict[str, dict[tuple[str, str], float]] = {}
    for folder in folders:
        model = load_reward(folder)
        scores = score_clips(model, clips, pairs)
        for index, name in enumerate(model.dimensions):
            mean, std = float(model.mean[index]), float(model.std[index])
            z[name] = {key: (float(found[index]) - mean) / std for key, found in scores.items()}
    summed = [name for name in SUMMED if name in z]
    z[OVERALL] = {key: sum(z[name][key] for name in summed) for key in pairs}
    dimensions = {vote.dimension for task in tasks for vote in task.votes}
    result = {
        "convention": "VideoGen-RewardBench: tie threshold chosen on the pairs reported on",
        "overall_sums": summed,
        "dimensions": {
            name: published_row(tasks, name, _by(z[name]))
            for name in (*SUMMED, OVERALL)
            if name in dimensions and name in z
        },
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    write_text_atomic(Path(out) / RESULT, json.dumps(result, indent=2) + "\n")
    return result


def _by(scores: Mapping[tuple[str, str], float]) -> Predictor:
    return lambda task, clip: scores[task.clips[clip], task.prompt]


def published_row(tasks: list[RewardTask], dimension: str, predict: Predictor) -> dict[str, Any]:
    """One cell of a published table and its anchor: what white noise gets on the same verdicts."""
    pairs = verdict_pairs(tasks, dimension)
    gaps, verdicts = gaps_of(predict, pairs).tolist(), verdicts_of(pairs)
    noise = torch.randn(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    said = verdicts.tolist()
    return {
        "n": len(pairs),
        "tie_share": float((verdicts == 0).double().mean()),
        "with_ties": published_accuracy_with_ties(gaps, said),
        "without_ties": published_accuracy_without_ties(gaps, said),
        "noise_with_ties": published_accuracy_with_ties(noise, said),
    }


def format_published(result: Mapping[str, Any]) -> str:
    """A plain table in percent, as those tables are printed."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    header = [
        "dimension",
        "pairs",
        "without ties",
        "with ties",
        "noise, with ties",
        "share of ties",
    ]
    rows = [
        [
            name,
            str(row["n"]),
            *(
                percent(row[k])
                for k in ("without_ties", "with_ties", "noise_with_ties", "tie_share")
            ),
        ]
        for name, row in result["dimensions"].items()
    ]
    return f"{format_table(header, rows)}\nby the published convention ({result['convention']}); for a fair number use `reelhf rewards eval`"

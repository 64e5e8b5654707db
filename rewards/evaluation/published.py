"""Accuracies by the published conventions of VideoGen-RewardBench and GenAI-Bench, to be read beside published tables.

Nothing here is a fair estimate: with ties, the threshold is chosen on the very pairs it is reported on (`rewards.evaluation.metrics`).
`overall` is predicted by the sum of the z-scores of the dimensions at hand, as VideoAlign sums its three. Scores may also come from a table: then
anyone who has the benchmark and a model's scores can print that model's row.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from annotation.records import PreferenceData, read_preferences
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


Scores = dict[str, dict[str, float]]
"""Dimension -> clip's sha256 and prompt, joined -> score."""


def evaluate_published(
    preferences: Path, out: Path, *, rewards: Path | None = None, table: Path | None = None
) -> dict[str, Any]:
    """Dimension -> {"with_ties", "without_ties", "n", "tie_share", "noise_with_ties"}; written to out/published.json.

    Args:
        rewards: a folder of our rewards, or
        table: scores that any other model gave the clips, a CSV with the columns `path` and reward_VQ, reward_MQ, reward_TA,
            reward_Overall (or reward_ALL), as VideoAlign's evaluation writes it.
    """
    from reelhf.run import write_text_atomic

    if (rewards is None) == (table is None):
        raise UserError("give a folder of rewards or --scores, and not both")
    data = read_preferences(preferences)
    tasks = load_tasks(data)
    if rewards is not None:
        scores = scores_of_rewards(rewards, data, tasks)
    else:
        assert table is not None
        scores = scores_of_table(table, data, tasks)
    summed = [name for name in SUMMED if name in scores]
    if OVERALL not in scores and summed:
        keys = scores[summed[0]]
        scores[OVERALL] = {key: sum(scores[name][key] for name in summed) for key in keys}
    dimensions = {vote.dimension for task in tasks for vote in task.votes}
    result = {
        "convention": "VideoGen-RewardBench: tie threshold chosen on the pairs reported on",
        "overall_sums": summed,
        "dimensions": {
            name: published_row(tasks, name, _by(scores[name]))
            for name in (*SUMMED, OVERALL)
            if name in dimensions and name in scores
        },
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    write_text_atomic(Path(out) / RESULT, json.dumps(result, indent=2) + "\n")
    return result


def scores_of_rewards(rewards: Path, data: PreferenceData, tasks: Sequence[RewardTask]) -> Scores:
    """z-scores of our rewards."""
    from rewards.checkpoint import load_reward
    from rewards.composite import MODEL_FOLDERS

    folders = [Path(rewards) / n for n in MODEL_FOLDERS if (Path(rewards) / n).is_dir()]
    if not folders:
        raise UserError(
            f"{rewards} holds no reward model; expected one of {', '.join(MODEL_FOLDERS)}/"
        )
    clips = load_clips(data, tasks)
    pairs = [(sha, task.prompt) for task in tasks for sha in task.clips]
    found: Scores = {}
    for folder in folders:
        model = load_reward(folder)
        scores = score_clips(model, clips, pairs)
        for index, name in enumerate(model.dimensions):
            mean, std = float(model.mean[index]), float(model.std[index])
            found[name] = {
                _key(*pair): (float(values[index]) - mean) / std for pair, values in scores.items()
            }
    return found


COLUMNS = {**{f"reward_{name}": ours for name, ours in DIMENSIONS.items()}, "reward_Overall": OVERALL, "reward_ALL": OVERALL}  # fmt: skip


def scores_of_table(table: Path, data: PreferenceData, tasks: Sequence[RewardTask]) -> Scores:
    """Scores as a CSV gives them; a clip is the file whose path ends in the table's."""
    try:
        with Path(table).open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"cannot read {table}: {error.strerror}") from None
    named = [name for name in COLUMNS if rows and name in rows[0]]
    if not named or "path" not in rows[0]:
        raise UserError(f"{table} needs the columns path and some of {', '.join(COLUMNS)}")
    by_path = {PurePosixPath(row["path"]).as_posix().removeprefix("./"): row for row in rows}
    uris = {row["sha256"]: row["uri"] for row in data.clips}
    found: Scores = {COLUMNS[name]: {} for name in named}
    for sha, prompt in dict.fromkeys((sha, t.prompt) for t in tasks for sha in t.clips):
        parts = PurePosixPath(uris[sha]).parts
        tails = ("/".join(parts[i:]) for i in range(len(parts)))
        row = next((by_path[tail] for tail in tails if tail in by_path), None)
        if row is None:
            raise UserError(f"{table} has no score of {uris[sha]}")
        try:
            for name in named:
                found[COLUMNS[name]][_key(sha, prompt)] = float(row[name])
        except ValueError:
            raise UserError(
                f"{table}: {name} of {row['path']} is {row[name]!r}; expected a number"
            ) from None
    return found


def _key(sha: str, prompt: str) -> str:
    return f"{sha} {prompt}"


def _by(scores: Mapping[str, float]) -> Predictor:
    return lambda task, clip: scores[_key(task.clips[clip], task.prompt)]


def published_row(
    tasks: Sequence[RewardTask], dimension: str, predict: Predictor
) -> dict[str, Any]:
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

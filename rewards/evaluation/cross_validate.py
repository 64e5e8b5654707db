"""Accuracy by leaving one prompt or one generator out at a time: for sets of a few dozen tasks.

Every fold trains each reward from the same backbones and predicts the verdicts that were left out; beside it stand what chance, the
commonest verdict, the generator's name and the sharpness of the picture predict. A finished fold is kept and not trained again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from annotation.records import PreferenceData, read_preferences
from reelhf.config import Config
from reelhf.errors import UserError
from reelhf.tables import format_table
from rewards.data import Clip, RewardTask, Vote, load_clips, load_tasks, score_clips
from rewards.evaluation.baselines import (
    CHANCE,
    laplacian_sharpness,
    majority_verdict,
    stage_win_rates,
)
from rewards.evaluation.folds import Fold, Leave, leave_one_out
from rewards.evaluation.held_out import by_scores
from rewards.evaluation.metrics import (
    best_tie_threshold,
    mean_interval,
    paired_interval,
    predicted,
    right,
)
from rewards.evaluation.pairs import gaps_of, verdict_pairs, verdicts_of
from rewards.train import RewardTrainConfig, fit
from rewards.training.calibrate import calibrate

if TYPE_CHECKING:
    from rewards.calibrated import CalibratedReward

RESULT = "cross_validation.json"
BASELINES = ("majority", "generator", "sharpness")
"""Beside chance. `generator`: how often each generator won among the training verdicts; one never met counts as average."""


class CrossValidateConfig(Config):
    """How rewards are trained and measured fold by fold."""

    leave: tuple[Leave, ...] = ("prompt", "generator")
    """What is left out, one at a time: each prompt, each generator, or first the ones and then the others."""
    train: RewardTrainConfig = RewardTrainConfig()
    """How each fold trains; `side_by_side` folds at once."""


def cross_validate(
    config: CrossValidateConfig, preferences: Path, backbones: Path, out: Path
) -> Path:
    """Write out/cross_validation.json and return its path; folds already in out/folds are not trained again."""
    from reelhf.run import write_text_atomic
    from reelhf.side_by_side import run_jobs

    data = read_preferences(preferences)
    jobs = {}
    for leave in config.leave:
        for model in config.train.models:
            if not (Path(backbones) / model).is_dir():
                raise UserError(
                    f"no backbone at {Path(backbones) / model}; `reelhf rewards pretrain` makes it"
                )
            for fold in _folds(data, model, Path(backbones), leave):
                arguments = (model, config.train.of(model), Path(preferences), Path(backbones))
                job = partial(_run_fold, *arguments, leave, fold.name, Path(out) / "folds")
                jobs[f"{model}, without {leave} {fold.name}"] = job
    if not jobs:
        raise UserError(f"{preferences} holds no verdicts that these rewards could learn")
    found = run_jobs(jobs, at_once=config.train.side_by_side)
    result = {leave: _summary(leave, found.values()) for leave in config.leave}
    Path(out).mkdir(parents=True, exist_ok=True)
    write_text_atomic(Path(out) / RESULT, json.dumps(result, indent=2) + "\n")
    return Path(out) / RESULT


def _folds(data: PreferenceData, name: str, backbones: Path, leave: Leave) -> list[Fold]:
    from rewards.checkpoint import read_reward_json

    tasks = load_tasks(data, dimensions=read_reward_json(backbones / name)["dimensions"])
    return list(leave_one_out(tasks, leave, {row["sha256"]: row["model"] for row in data.clips}))


@functools.lru_cache(maxsize=1)
def _clips(preferences: Path) -> tuple[PreferenceData, dict[str, Clip], dict[str, float]]:
    """Decoded once for all folds of a process."""
    data = read_preferences(preferences)
    clips = load_clips(data, load_tasks(data))
    return data, clips, {sha: laplacian_sharpness(clip.frames) for sha, clip in clips.items()}


def _run_fold(
    name: str,
    config: RewardTrainConfig,
    preferences: Path,
    backbones: Path,
    leave: Leave,
    left_out: str,
    out: Path,
) -> dict[str, Any]:
    """Train without one prompt or generator, and predict it."""
    from reelhf.hashing import content_hash, weight_hashes
    from reelhf.run import write_text_atomic

    data, clips, sharpness = _clips(preferences)
    weights = weight_hashes(backbones / name)
    # apart from `config`: folds kept from when only one was trained are not of this key
    members = config.ensemble.models
    key = content_hash(name, config, members, data.manifest["files"], weights, leave, left_out)
    kept = out / f"{key[:24]}.json"
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    fold = next(f for f in _folds(data, name, backbones, leave) if f.name == left_out)
    model = _taught(backbones / name, config, fold.training, clips, f"{name}, without {left_out}")
    model.freeze()
    tasks = [*fold.training, *dict.fromkeys(task for task, _ in fold.held)]
    scores = score_clips(model, clips, [(sha, t.prompt) for t in tasks for sha in t.clips])
    generators = {row["sha256"]: row["model"] for row in data.clips}
    rows = []
    for index, dimension in enumerate(model.dimensions):
        predict = by_scores(scores, index)
        learned = verdict_pairs(fold.training, dimension)
        threshold = best_tie_threshold(gaps_of(predict, learned), verdicts_of(learned))
        rates = stage_win_rates(_as_cross_stage(fold.training), dimension, generators)
        majority = majority_verdict([pair for pair in learned if pair[1].preference])
        for task, vote in fold.held:
            if vote.dimension == dimension:
                a, b = task.clips[vote.a], task.clips[vote.b]
                rows.append(
                    {
                        "dimension": dimension,
                        "prompt_id": task.prompt_id,
                        "generators": [generators[a], generators[b]],
                        "verdict": vote.preference,
                        "reward": predict(task, vote.a) - predict(task, vote.b),
                        "threshold": threshold,
                        "majority": majority,
                        "generator": rates.get(generators[a], CHANCE)
                        - rates.get(generators[b], CHANCE),
                        "sharpness": sharpness[a] - sharpness[b],
                    }
                )
    found = {"model": name, "leave": leave, "left_out": left_out, "pairs": rows}
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(kept, json.dumps(found) + "\n")
    return found


def _taught(
    source: Path,
    config: RewardTrainConfig,
    training: Sequence[RewardTask],
    clips: dict[str, Clip],
    label: str,
) -> CalibratedReward:
    """The reward, or the ensemble of them, that these tasks teach."""
    from reelhf.engine import seed_everything
    from rewards.checkpoint import load_trainable, one_model
    from rewards.ensemble import EnsembleReward, member_folder

    members = []
    for index in range(config.ensemble.models):
        seeded = config.model_copy(update={"seed": config.seed + index})
        seed_everything(seeded.seed)
        folder = member_folder(source, index)
        member = one_model(load_trainable(folder), folder)
        if training:
            which = label if config.ensemble.models == 1 else f"{label}, {index + 1}"
            member, _ = fit(member, list(training), clips, seeded, label=which)
        members.append(member)
    if len(members) == 1:
        return members[0]
    if training:
        for member in members:
            calibrate(member, training, clips)
    return EnsembleReward(members)


def _as_cross_stage(tasks: Sequence[RewardTask]) -> list[RewardTask]:
    """Every verdict counted by generator, whatever the stages are called."""

    def across(vote: Vote) -> Vote:
        return replace(vote, same_stage=False)

    return [replace(task, votes=tuple(map(across, task.votes))) for task in tasks]


def _summary(leave: Leave, folds: Any) -> dict[str, Any]:
    """Dimension -> accuracy over all left-out verdicts beside the baselines."""
    chosen = [fold for fold in folds if fold["leave"] == leave]
    rows = [row | {"left_out": fold["left_out"]} for fold in chosen for row in fold["pairs"]]
    dimensions = list(dict.fromkeys(row["dimension"] for row in rows))
    return {d: summarise([row for row in rows if row["dimension"] == d], leave) for d in dimensions}


def summarise(rows: Sequence[Mapping[str, Any]], leave: Leave) -> dict[str, Any]:
    """Accuracies and paired differences of the reward and of each baseline, on decided verdicts; then with ties."""
    decided = [row for row in rows if row["verdict"] != 0]
    prompts = [row["prompt_id"] for row in decided]

    def hits(name: str, chosen: Sequence[Mapping[str, Any]] = decided) -> list[float]:
        gaps = torch.tensor([row[name] for row in chosen], dtype=torch.double)
        return right(gaps, torch.tensor([row["verdict"] for row in chosen])).tolist()

    def described(name: str) -> dict[str, Any]:
        found = hits(name)
        mean = sum(found) / len(found) if found else None
        return {"accuracy": mean, "interval": mean_interval(found, prompts)}

    ours = hits("reward")
    with_ties = [
        float(predicted(torch.tensor([row["reward"]]), row["threshold"])[0] == row["verdict"])
        for row in rows
    ]
    groups = sorted({row["left_out"] for row in rows})
    found = {
        "n": len(decided),
        "prompts": len(set(prompts)),
        "folds": len(groups),
        "reward": described("reward"),
        "chance": {"accuracy": CHANCE},
        **{name: described(name) for name in BASELINES},
        "reward_minus": {
            "chance": paired_interval(ours, [CHANCE] * len(ours), prompts),
            **{name: paired_interval(ours, hits(name), prompts) for name in BASELINES},
        },
        "with_ties": {
            "n": len(rows),
            "tie_share": (len(rows) - len(decided)) / len(rows),
            "accuracy": sum(with_ties) / len(with_ties),
            "interval": mean_interval(with_ties, [row["prompt_id"] for row in rows]),
            "threshold_chosen_on": "training pairs of each fold",
        },
    }
    if leave == "generator":
        found["by_generator"] = {
            g: {"accuracy": sum(own) / len(own) if own else None, "n": len(own)}
            for g in groups
            if (own := hits("reward", [r for r in decided if r["left_out"] == g])) is not None
        }
    return found


def format_cross_validation(result: Mapping[str, Any]) -> str:
    """A plain table per way of leaving out, and in words what the reward was not shown to beat."""

    def cell(found: Mapping[str, Any]) -> str:
        if found["accuracy"] is None:
            return "-"
        bounds = found.get("interval")
        return f"{found['accuracy']:.2f}" + (
            f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else ""
        )

    parts = []
    names = ("reward", "chance", *BASELINES)
    for leave, dimensions in result.items():
        header = [f"one {leave} left out", "pairs", "prompts", *names, "with ties"]
        rows = [
            [d, str(f["n"]), str(f["prompts"]), *(cell(f[n]) for n in names), cell(f["with_ties"])]
            for d, f in dimensions.items()
        ]
        parts.append(format_table(header, rows))
        for dimension, found in dimensions.items():
            beaten_not = [
                name
                for name, bounds in found["reward_minus"].items()
                if bounds is None or bounds[0] <= 0
            ]
            if beaten_not:
                parts.append(f"{dimension}: not shown to be better than {', '.join(beaten_not)}")
    return "\n".join(parts)

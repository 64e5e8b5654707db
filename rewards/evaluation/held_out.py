"""How well trained rewards predict verdicts on prompts they never saw, next to what cheap tricks reach.

The headline is the accuracy on SAME-STAGE pairs: between stages, telling the refiner from the base is enough to be right.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from annotation.records import PreferenceData, read_preferences
from reelhf.errors import UserError
from rewards.data import Clip, RewardTask, clip_answers, load_clips, load_tasks, score_clips
from rewards.evaluation.baselines import CHANCE, laplacian_sharpness, stage_win_rates
from rewards.evaluation.details import describe_dimension, describe_disagreement
from rewards.evaluation.pairs import (
    Predictor,
    accuracy,
    accuracy_interval,
    decided_pairs,
    negative_log_likelihood,
)
from rewards.evaluation.probes import probe_corruptions
from rewards.evaluation.slots import slot_test

if TYPE_CHECKING:
    from rewards.calibrated import CalibratedReward

TEST_SPLIT = "test"
EVALUATION = "evaluation.json"
PROBED_CLIPS = 24
"""Clips that the corruption probes take of those evaluated."""


@dataclass(frozen=True)
class Subject:
    """What is evaluated: held-out verdicts, their clips, and the verdicts that may be learned from."""

    data: PreferenceData
    tasks: Sequence[RewardTask]
    training: Sequence[RewardTask]
    clips: Mapping[str, Clip]
    sharpness: Mapping[str, float]
    stages: Mapping[str, str]


def evaluate_rewards(
    rewards: Path,
    preferences: Path,
    out: Path,
    *,
    annotators: Collection[str] | None = None,
    prompt_ids: Collection[str] | None = None,
    ceiling: Mapping[str, float] | None = None,
    split: str | None = TEST_SPLIT,
    thorough: bool = False,
) -> dict[str, Any]:
    """Accuracy per dimension on the held-out split; written to out/evaluation.json and returned.

    Args:
        ceiling: dimension -> the best accuracy possible on `decided_pairs`, from the caller: how well an annotator-free
            truth agrees with these noisy verdicts. Rewards never see such a truth.
        split: None takes every row; the caller then vouches that these prompts taught the rewards nothing.
        thorough: also ties, calibration, rank correlation, agreement with people, single sources and corruption probes, per
            dimension under "details" (`rewards.evaluation.details`); takes several times as long.
    Returns: {"dimensions": {name: {accuracy, n, interval, explicit_accuracy, explicit_n, all_stages_accuracy,
        all_stages_n, chance, sharpness, stage_identity, ceiling, nll, invalid_clips}}, "slots": {...}, "split"}.
    """
    from reelhf.run import write_text_atomic
    from rewards.checkpoint import load_reward
    from rewards.composite import MODEL_FOLDERS

    data = read_preferences(preferences)
    chosen = {"annotators": annotators, "prompt_ids": prompt_ids}
    tasks = load_tasks(data, splits=None if split is None else (split,), **chosen)
    training = load_tasks(data, splits=("train", "validation"), **chosen)
    clips = load_clips(data, tasks) if tasks else {}
    sharpness = {sha: laplacian_sharpness(clip.frames) for sha, clip in clips.items()}
    stages = {row["sha256"]: row["stage"] for row in data.clips}
    subject = Subject(data, tasks, training, clips, sharpness, stages)
    folders = [Path(rewards) / n for n in MODEL_FOLDERS if (Path(rewards) / n).is_dir()]
    if not folders:
        raise UserError(
            f"{rewards} holds no reward model; expected one of {', '.join(MODEL_FOLDERS)}/"
        )
    report: dict[str, Any] = {}
    for folder in folders:
        model = load_reward(folder)
        scores = score_clips(model, clips, [(sha, t.prompt) for t in tasks for sha in t.clips])
        for index, dimension in enumerate(model.dimensions):
            row = _headline(subject, dimension, by_scores(scores, index), model.temperature[index])
            row["ceiling"] = (ceiling or {}).get(dimension)
            row["invalid_clips"] = sum(not v.isfinite().all() for v in scores.values())
            report[dimension] = row
        if thorough:
            for dimension, details in _details(model, subject, scores).items():
                report[dimension]["details"] = details
    result = {
        "split": split,
        "tasks": len(tasks),
        "dimensions": report,
        "slots": slot_test(data, annotators=annotators, prompt_ids=prompt_ids),
    }
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out / EVALUATION, json.dumps(result, indent=2) + "\n")
    return result


def by_scores(scores: Mapping[tuple[str, str], Tensor], index: int) -> Predictor:
    """The predictor that a model's scores in its dimension number `index` are."""
    return lambda task, clip: float(scores[task.clips[clip], task.prompt][index])


def _headline(
    subject: Subject, dimension: str, by_reward: Predictor, temperature: Tensor
) -> dict[str, Any]:
    """Accuracy on same-stage pairs beside the baselines."""
    rates = stage_win_rates(subject.training, dimension, subject.stages)

    def by_sharpness(task: RewardTask, clip: int) -> float:
        return subject.sharpness[task.clips[clip]]

    def by_stage(task: RewardTask, clip: int) -> float:
        return rates.get(subject.stages[task.clips[clip]], 0.0)

    same = decided_pairs(subject.tasks, dimension, same_stage=True)
    everything = decided_pairs(subject.tasks, dimension, same_stage=None)
    explicit = [(task, vote) for task, vote in same if vote.explicit]
    return {
        "accuracy": accuracy(by_reward, same),
        "n": len(same),
        "interval": accuracy_interval(by_reward, same),
        "explicit_accuracy": accuracy(by_reward, explicit),
        "explicit_n": len(explicit),
        "all_stages_accuracy": accuracy(by_reward, everything),
        "all_stages_n": len(everything),
        "chance": CHANCE,
        "sharpness": accuracy(by_sharpness, same),
        "stage_identity": accuracy(by_stage, same),
        "stage_identity_all_stages": accuracy(by_stage, everything),
        "nll": negative_log_likelihood(by_reward, same, float(temperature)),
    }


def _details(
    model: CalibratedReward, subject: Subject, scores: Mapping[tuple[str, str], Tensor]
) -> dict[str, dict[str, Any]]:
    """Dimension -> everything but the headline."""
    chooser, chosen_on = _threshold_tasks(subject)
    seen = load_clips(subject.data, chooser) if chooser else {}
    seen_scores = score_clips(model, seen, [(s, t.prompt) for t in chooser for s in t.clips])
    shown = list(dict.fromkeys((sha, t.prompt) for t in subject.tasks for sha in t.clips))
    some = shown[:: max(1, len(shown) // PROBED_CLIPS)][:PROBED_CLIPS]
    clips = [(subject.clips[sha], prompt) for sha, prompt in some]
    doubts: dict[tuple[str, str], Tensor] = {}
    if not model.compares:
        answers = clip_answers(model.score, model, subject.clips, shown)
        doubts = {key: std for key, _, std in answers if std is not None}
    found = {}
    for index, dimension in enumerate(model.dimensions):
        found[dimension] = describe_dimension(
            subject.data,
            subject.tasks,
            dimension,
            by_scores(scores, index),
            temperature=float(model.temperature[index]),
            chooser=(chooser, by_scores(seen_scores, index)),
            chosen_on=chosen_on,
        )
        if model.compares:
            found[dimension]["position_flips"] = position_flips(model, subject, dimension)
        found[dimension]["disagreement"] = describe_disagreement(
            decided_pairs(subject.tasks, dimension, same_stage=True),
            by_scores(scores, index),
            by_scores(doubts, index) if doubts else None,
        )
        found[dimension]["probes"] = (
            {} if model.compares else probe_corruptions(model, index, clips)
        )
    return found


def position_flips(model: CalibratedReward, subject: Subject, dimension: str) -> float | None:
    """Share of pairs in which a comparing model's answer depends on which clip is shown second; None without pairs."""
    found = []
    with torch.no_grad():
        for task, vote in decided_pairs(subject.tasks, dimension, same_stage=None):
            a, b = (subject.clips[task.clips[i]] for i in (vote.a, vote.b))
            device = next(model.parameters()).device
            first, second = (clip.frames[None].float().to(device) / 255 for clip in (a, b))
            scores = model.score(
                first,
                selection=model.select(first.shape[2], a.fps),
                fps=a.fps,
                prompts=[task.prompt],
                reference=second,
            )
            if scores.valid.all():
                parts = scores.parts.items()  # an ensemble has one per member
                flips = [float(v) for key, v in parts if key.startswith("position_flip")]
                found.append(sum(flips) / len(flips))
    return sum(found) / len(found) if found else None


def _threshold_tasks(subject: Subject) -> tuple[list[RewardTask], str | None]:
    """Tasks on which a tie threshold may be chosen, and their split; never those it is reported on."""
    reported = {task.prompt_id for task in subject.tasks}
    for split in ("validation", "train"):
        own = [task for task in subject.training if task.split == split]
        found = [task for task in own if task.prompt_id not in reported]
        if found:
            return found, split
    return [], None


def format_report(result: Mapping[str, Any]) -> str:
    """The evaluation as a plain table, one line per dimension."""

    def share(value: float | None) -> str:
        return "   -" if value is None else f"{value:.2f}"

    lines = [
        "dimension             accuracy  95 % interval     n  chance  sharpness  stage  ceiling",
        *(
            f"{name:<21} {share(row['accuracy']):>8}  "
            + ("[{:.2f}, {:.2f}]".format(*row["interval"]) if row["interval"] else " " * 12)
            + f"  {row['n']:>4}  {row['chance']:>6.2f}  {share(row['sharpness']):>9}"
            f"  {share(row['stage_identity']):>5}  {share(row['ceiling']):>7}"
            for name, row in result["dimensions"].items()
        ),
    ]
    lines += [
        f"slot of the best of {k} clips: {row['counts']}, chi-square p = {row['p']:.3f}"
        for k, row in result["slots"].items()
    ]
    return "\n".join(lines)

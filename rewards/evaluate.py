"""How well trained rewards predict verdicts on prompts they never saw, next to what cheap tricks reach.

The headline is the accuracy on SAME-STAGE pairs: between stages, telling the refiner from the base is enough to be right.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from annotation.records import PreferenceData, read_preferences
from rewards.data import RewardTask, Vote, load_clips, load_tasks, score_clips
from rewards.losses import bradley_terry_loss

TEST_SPLIT = "test"
BOOTSTRAP_SAMPLES = 2000
CHANCE = 0.5
PREDICTOR = Callable[[RewardTask, int], float]
"""(task, index of a clip in it) -> score."""


def evaluate_rewards(
    rewards: Path,
    preferences: Path,
    out: Path,
    *,
    annotators: Collection[str] | None = None,
    prompt_ids: Collection[str] | None = None,
    ceiling: Mapping[str, float] | None = None,
    split: str | None = TEST_SPLIT,
) -> dict[str, Any]:
    """Accuracy per dimension on the held-out split; written to out/evaluation.json and returned.

    Args:
        ceiling: dimension -> the best accuracy possible on `decided_pairs`, from the caller: how well an annotator-free
            truth agrees with these noisy verdicts. Rewards never see such a truth.
        split: None takes every row; the caller then vouches that these prompts taught the rewards nothing.
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
    report: dict[str, Any] = {}
    for name in MODEL_FOLDERS:
        if not (Path(rewards) / name).is_dir():
            continue
        model = load_reward(Path(rewards) / name)
        scores = score_clips(model, clips, [(sha, t.prompt) for t in tasks for sha in t.clips])
        for index, dimension in enumerate(model.dimensions):
            stage_score = stage_win_rates(training, dimension, stages)

            def by_reward(
                task: RewardTask, clip: int, index: int = index, scores: Any = scores
            ) -> float:
                return float(scores[task.clips[clip], task.prompt][index])

            def by_sharpness(task: RewardTask, clip: int) -> float:
                return sharpness[task.clips[clip]]

            def by_stage(task: RewardTask, clip: int, rates: Any = stage_score) -> float:
                return rates.get(stages[task.clips[clip]], 0.0)

            same = decided_pairs(tasks, dimension, same_stage=True)
            everything = decided_pairs(tasks, dimension, same_stage=None)
            explicit = [(task, vote) for task, vote in same if vote.explicit]
            report[dimension] = {
                "accuracy": accuracy(by_reward, same),
                "n": len(same),
                "interval": bootstrap_interval(by_reward, same),
                "explicit_accuracy": accuracy(by_reward, explicit),
                "explicit_n": len(explicit),
                "all_stages_accuracy": accuracy(by_reward, everything),
                "all_stages_n": len(everything),
                "chance": CHANCE,
                "sharpness": accuracy(by_sharpness, same),
                "stage_identity": accuracy(by_stage, same),
                "stage_identity_all_stages": accuracy(by_stage, everything),
                "ceiling": (ceiling or {}).get(dimension),
                "nll": negative_log_likelihood(by_reward, same, float(model.temperature[index])),
                "invalid_clips": sum(not v.isfinite().all() for v in scores.values()),
            }
    result = {
        "split": split,
        "tasks": len(tasks),
        "dimensions": report,
        "slots": slot_test(data, annotators=annotators, prompt_ids=prompt_ids),
    }
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out / "evaluation.json", json.dumps(result, indent=2) + "\n")
    return result


def decided_pairs(
    tasks: Sequence[RewardTask], dimension: str, *, same_stage: bool | None
) -> list[tuple[RewardTask, Vote]]:
    """Verdicts of a dimension that are no ties; `same_stage` True keeps pairs of one stage, None keeps all."""
    return [
        (task, vote)
        for task in tasks
        for vote in task.votes
        if vote.dimension == dimension
        and vote.preference != 0
        and (same_stage is None or vote.same_stage == same_stage)
    ]


def is_right(predict: PREDICTOR, task: RewardTask, vote: Vote) -> float:
    """1 when the predictor prefers the clip that the annotator preferred, 1/2 when it cannot tell, else 0."""
    gap = (predict(task, vote.a) - predict(task, vote.b)) * vote.preference
    return 0.5 if gap == 0 else float(gap > 0)  # NaN, an invalid clip, counts as wrong


def accuracy(predict: PREDICTOR, pairs: Sequence[tuple[RewardTask, Vote]]) -> float | None:
    """Share of verdicts predicted; None without pairs."""
    if not pairs:
        return None
    return sum(is_right(predict, task, vote) for task, vote in pairs) / len(pairs)


def bootstrap_interval(
    predict: PREDICTOR, pairs: Sequence[tuple[RewardTask, Vote]], *, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of the accuracy, resampling prompts: pairs of one prompt are not independent."""
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for task, vote in pairs:
        by_prompt[task.prompt_id].append(is_right(predict, task, vote))
    if not by_prompt:
        return None
    sums = torch.tensor([sum(v) for v in by_prompt.values()])
    counts = torch.tensor([float(len(v)) for v in by_prompt.values()])
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(sums), (BOOTSTRAP_SAMPLES, len(sums)), generator=generator)
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def negative_log_likelihood(
    predict: PREDICTOR, pairs: Sequence[tuple[RewardTask, Vote]], temperature: float
) -> float | None:
    """Mean -log sigma(gap / temperature) in nats over the pairs that could be scored; ln 2 is knowing nothing."""
    gaps = torch.tensor(
        [(predict(task, vote.a) - predict(task, vote.b)) * vote.preference for task, vote in pairs]
    )
    gaps = gaps[gaps.isfinite()] / temperature
    return float(bradley_terry_loss(gaps, torch.zeros_like(gaps)).mean()) if len(gaps) else None


def laplacian_sharpness(frames: Tensor) -> float:
    """Mean squared Laplacian of the grey frames: the classical focus measure. frames uint8 [3, F, H, W]."""
    grey = frames.float().mean(0)[:, None] / 255
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    return float(F.conv2d(grey, kernel).square().mean())


def stage_win_rates(
    tasks: Sequence[RewardTask], dimension: str, stages: Mapping[str, str]
) -> dict[str, float]:
    """Share of its cross-stage verdicts that each stage won on the training prompts."""
    won: dict[str, list[float]] = defaultdict(list)
    for task, vote in decided_pairs(tasks, dimension, same_stage=False):
        won[stages[task.clips[vote.a]]].append(float(vote.preference > 0))
        won[stages[task.clips[vote.b]]].append(float(vote.preference < 0))
    return {stage: sum(votes) / len(votes) for stage, votes in won.items()}


def slot_test(
    data: PreferenceData,
    *,
    annotators: Collection[str] | None = None,
    prompt_ids: Collection[str] | None = None,
) -> dict[str, Any]:
    """Is the best clip found in every slot equally often? Chi-square per number of clips, free picks only.

    Returns: {"K": {"counts", "chi_square", "p"}} for each K seen.
    """
    counts: dict[int, list[int]] = {}
    for row in data.judgments:
        free = row["pick"] == "first" or not row["constrained"]
        if (
            row["kind"] != "best_worst"
            or not free
            or row["best"] is None
            or (annotators is not None and row["annotator"] not in annotators)
            or (prompt_ids is not None and row["prompt_id"] not in prompt_ids)
        ):
            continue
        num = len(row["candidates"])
        counts.setdefault(num, [0] * num)[row["best"]] += 1
    return {str(k): {"counts": c, **chi_square_uniform(c)} for k, c in sorted(counts.items())}


def chi_square_uniform(counts: Sequence[int]) -> dict[str, float]:
    """Pearson's test against equal shares; p from the regularised upper incomplete gamma function."""
    expected = sum(counts) / len(counts)
    statistic = sum((count - expected) ** 2 / expected for count in counts)
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.double)
    p = torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.double))
    return {"chi_square": statistic, "p": float(p)}


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

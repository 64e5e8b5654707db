"""Preference data as the reward models read it: tasks of a few clips, with every verdict on their pairs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from annotation.records import DIMENSIONS, PreferenceData, read_preferences
from reelhf.errors import UserError, did_you_mean

IMPORTED = (
    *("motion_artefacts", "motion_amplitude", "motion_vividness"),
    *("texture_quality", "overall"),
)
"""Dimensions that people are not asked about by default, which imported verdicts may name."""
UNREADABLE = torch.full((3, 1, 16, 16), float("nan"))
"""The frames of a clip that cannot be read: no reward scores them."""


@dataclass(frozen=True)
class Vote:
    """One verdict on two clips of a task."""

    a: int
    b: int
    """Indices into the task's clips."""
    dimension: str
    preference: int
    """+1: a, -1: b, 0: tie."""
    weight: float
    explicit: bool
    same_stage: bool
    annotator: str = ""
    agreement: float | None = None
    """Share of the other annotators who said the same of this pair; None where nobody else judged it."""
    judgment: str = ""
    """The judgment it was derived from."""


@dataclass(frozen=True)
class Pick:
    """A free choice of the best and the worst of all clips of a task, in one dimension."""

    best: int
    worst: int
    """Indices into the task's clips."""
    shown: tuple[int, ...]
    """The clips that were to choose from."""
    dimension: str
    judgment: str
    annotator: str = ""
    weight: float = 1.0
    agreement: float | None = None
    """That of the pair best against worst."""


@dataclass(frozen=True)
class RewardTask:
    """The clips of one prompt that were judged together, and what was said of them."""

    task_id: str
    prompt: str
    prompt_id: str
    split: str
    clips: tuple[str, ...]
    """sha256 of each."""
    votes: tuple[Vote, ...]
    picks: tuple[Pick, ...] = ()


@dataclass(frozen=True)
class Clip:
    """One decoded clip."""

    frames: Tensor
    """uint8 [3, F, H, W]."""
    fps: float


def load_tasks(
    preferences: Path | str | PreferenceData,
    *,
    dimensions: Collection[str] | None = None,
    splits: Collection[str] | None = None,
    annotators: Collection[str] | None = None,
    prompt_ids: Collection[str] | None = None,
) -> list[RewardTask]:
    """Group preference rows by task; None keeps everything.

    A vetoed pick (`admissible` false) stays: it is a true opinion in its own dimension, though never in the composite.
    """
    data = preferences if isinstance(preferences, PreferenceData) else read_preferences(preferences)
    tasks: dict[str, dict[str, Any]] = {}
    for row in data.preferences:
        if (
            (dimensions is not None and row["dimension"] not in dimensions)
            or (splits is not None and row["split"] not in splits)
            or (annotators is not None and row["annotator"] not in annotators)
            or (prompt_ids is not None and row["prompt_id"] not in prompt_ids)
        ):
            continue
        task = tasks.setdefault(row["task_id"], {"row": row, "clips": {}, "votes": []})
        a, b = (
            task["clips"].setdefault(row[key], len(task["clips"])) for key in ("clip_a", "clip_b")
        )
        task["votes"].append(
            Vote(
                a,
                b,
                row["dimension"],
                int(row["preference"]),
                float(row["weight"]),
                row["kind"] == "explicit",
                bool(row["same_stage"]),
                row["annotator"],
                row.get("agreement"),
                row["judgment_ids"][0] if row["judgment_ids"] else "",
            )
        )
    judgments = {row["judgment_id"]: row for row in data.judgments}
    return [
        RewardTask(
            task_id,
            task["row"]["prompt"],
            task["row"]["prompt_id"],
            task["row"]["split"],
            tuple(task["clips"]),
            tuple(task["votes"]),
            tuple(_picks(task["votes"], task["clips"], judgments)),
        )
        for task_id, task in tasks.items()
    ]


def check_dimensions(data: PreferenceData) -> None:
    """UserError naming a dimension that no reward knows: a typing error would otherwise teach nothing, silently."""
    known = (*DIMENSIONS, *IMPORTED)
    for name in dict.fromkeys(row["dimension"] for row in data.preferences):
        if name not in known:
            raise UserError(
                f"{data.folder} holds verdicts on {name!r}; the dimensions are {', '.join(known)}."
                + did_you_mean(name, known)
            )


def _picks(
    votes: Sequence[Vote], clips: Mapping[str, int], judgments: Mapping[str, Mapping[str, Any]]
) -> Iterator[Pick]:
    """The free best-and-worst picks behind the votes of a task."""
    for vote in votes:
        row = judgments.get(vote.judgment)
        if not vote.explicit or row is None or row["kind"] != "best_worst":
            continue
        if row["best"] is None or row["constrained"]:
            continue  # a tie, or a pick after a veto: the other clips were not free to be chosen
        shown = tuple(clips.get(sha, -1) for sha in row["candidates"])
        if -1 in shown:
            continue  # implied pairs were left out of the export: the other clips are not known here
        yield Pick(
            shown[row["best"]],
            shown[row["worst"]],
            shown,
            vote.dimension,
            vote.judgment,
            vote.annotator,
            vote.weight,
            vote.agreement,
        )


def load_clips(data: PreferenceData, tasks: Sequence[RewardTask]) -> dict[str, Clip]:
    """Decode every clip the tasks name, once; one that cannot be read is kept as a clip that is invalid to every reward.

    Raises: UserError when none can be read.
    """
    from reelhf.progress import track
    from reelhf.video import read_videos_or_errors

    wanted = list(dict.fromkeys(sha for task in tasks for sha in task.clips))
    if not wanted:
        raise UserError(f"{data.folder} holds no preference rows for what was asked")
    read = zip(wanted, read_videos_or_errors(map(data.clip_path, wanted)), strict=True)
    clips, errors = {}, []
    for sha, clip in track(read, label="read clips", total=len(wanted)):
        if isinstance(clip, UserError):
            errors.append(clip)
            clip = UNREADABLE, 1.0
        clips[sha] = Clip(*clip)
    if len(errors) == len(wanted):
        raise errors[0]
    if errors:
        print(
            f"  {len(errors)} of {len(wanted)} clips cannot be read and count nothing; the first: {errors[0]}",
            flush=True,
        )
    return clips


def group_by_shape(clips: Sequence[Clip]) -> list[tuple[list[int], Tensor, Tensor]]:
    """Batches of clips of one shape: (their places, float frames [N, 3, F, H, W], fps [N])."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, clip in enumerate(clips):
        places.setdefault(tuple(clip.frames.shape), []).append(place)
    return [
        (
            rows,
            torch.stack([clips[i].frames for i in rows]).float() / 255,
            torch.tensor([clips[i].fps for i in rows]),
        )
        for rows in places.values()
    ]


def score_clips(
    model: Any, clips: Mapping[str, Clip], pairs: Sequence[tuple[str, str]], *, batch_size: int = 32
) -> dict[tuple[str, str], Tensor]:
    """Score (sha256, prompt) pairs with the fixed frame choice: values [D] on the CPU, NaN where invalid.

    A model that compares has each clip beat the others of its prompt: its score is the mean of those logits.
    """
    if model.compares:
        return _score_against_siblings(model, clips, pairs)
    said = clip_answers(model.score, model, clips, pairs, batch_size=batch_size)
    return {key: values for key, values, _ in said}


@torch.no_grad()
def clip_answers(
    ask: Callable[..., Any],
    model: Any,
    clips: Mapping[str, Clip],
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 32,
) -> Iterator[tuple[tuple[str, str], Tensor, Tensor | None]]:
    """Each of the (sha256, prompt) pairs once, with the values and the std on the CPU that `ask`, the model's `score` or `hear`, gives of it."""
    unique = list(dict.fromkeys(pairs))
    device = next(model.parameters()).device
    for rows, frames, fps in group_by_shape([clips[sha] for sha, _ in unique]):
        selection = model.select(frames.shape[2], float(fps[0]), None)
        for start in range(0, len(rows), batch_size):
            part = slice(start, start + batch_size)
            said = ask(
                frames[part].to(device),
                selection=selection,
                fps=fps[part].to(device),
                prompts=[unique[i][1] for i in rows[part]],
            )
            stds = [None] * len(said.values) if said.std is None else said.std.cpu()
            for i, values, std in zip(rows[part], said.values.cpu(), stds, strict=True):
                yield unique[i], values, std


@torch.no_grad()
def _score_against_siblings(
    model: Any, clips: Mapping[str, Clip], pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Tensor]:
    """Mean logit [D] with which each clip beats the others of its prompt; NaN for one that is alone."""
    device = next(model.parameters()).device
    by_prompt: dict[str, list[str]] = {}
    for sha, prompt in dict.fromkeys(pairs):
        by_prompt.setdefault(prompt, []).append(sha)
    beats: dict[tuple[str, str], list[Tensor]] = {
        (sha, prompt): [] for prompt, shas in by_prompt.items() for sha in shas
    }
    for prompt, shas in by_prompt.items():
        for i, first in enumerate(shas):
            for second in shas[i + 1 :]:
                one, other = (
                    clips[sha].frames[None].float().to(device) / 255 for sha in (first, second)
                )
                value = model.score(
                    one,
                    selection=model.select(one.shape[2], clips[first].fps),
                    fps=clips[first].fps,
                    prompts=[prompt],
                    reference=other,
                ).values[0]
                beats[first, prompt].append(value.cpu())
                beats[second, prompt].append(-value.cpu())
    unknown = torch.full((len(model.dimensions),), float("nan"))
    return {
        key: torch.stack(found).nanmean(0) if found else unknown for key, found in beats.items()
    }

"""Simulated annotators: programs that judge clips as a person would, through the same HTTP endpoints.

Each sees the presentation copies, has an opinion of its own (the gold score plus stated noise, bias and carelessness), picks
best and worst freely per dimension, and only then meets the admissibility rule. Their judgments are marked as simulated.
"""

from __future__ import annotations

import hashlib
import queue
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from annotation.client import AnnotationClient, SubmissionRefused
from annotation.records import Choice, PreferenceData, TaskView, Verdict, read_preferences
from annotation.rules import admissible_pairs
from reelhf.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Gold = Callable[["Tensor", str, float], Mapping[str, float]]
"""What a perfect annotator sees: (frames [3, F, H, W], prompt, fps) -> score per dimension, higher is better."""

TYPICAL_SPREAD: dict[str, float] = {
    "prompt_following": 0.10,
    "motion_quality": 0.10,
    "aesthetic_quality": 0.05,
    "structural_stability": 0.10,
    "preservation": 0.10,
}
"""The unit of noise, bias and tie width below: the standard deviation of the toy gold among clips of ONE prompt from a weak base
(24 prompts x 4 clips of a base trained for four CPU minutes: 0.10, 0.07, 0.05, 0.09)."""
BRIGHTNESS_SPREAD = 0.1
"""Of a clip's mean brightness, likewise."""


@dataclass(frozen=True)
class AnnotatorProfile:
    """How one annotator errs, all in units of the typical spread between clips."""

    name: str
    noise: float = 0.4
    """Standard deviation of the opinion around the truth, fresh for each clip and dimension."""
    slot_bias: float = 0.0
    """How much better the first slot seems than the last."""
    brightness_bias: float = 0.0
    """How much better a clip seems that is brighter by BRIGHTNESS_SPREAD."""
    careless_rate: float = 0.0
    """Share of the tasks answered at random."""
    tie_width: float = 0.25
    """Best and worst nearer than this are called the same."""

    def __post_init__(self) -> None:
        if self.noise < 0 or self.tie_width < 0 or not 0 <= self.careless_rate <= 1:
            raise UserError(
                f"annotator {self.name}: noise and tie_width must not be negative and careless_rate lies in 0 to 1; got {self}"
            )


_KINDS: tuple[tuple[str, dict[str, float]], ...] = (
    ("careful", {"noise": 0.3}),
    ("careful", {"noise": 0.3}),
    ("noisy", {"noise": 0.8}),
    ("noisy", {"noise": 0.8}),
    ("careful", {"noise": 0.3}),
    ("careful", {"noise": 0.3}),
    ("likes-bright", {"noise": 0.4, "brightness_bias": 0.5}),
    ("careless", {"noise": 0.4, "careless_rate": 0.25}),
)


def default_panel(n: int, seed: int = 0) -> list[AnnotatorProfile]:
    """`n` annotators: of eight, four careful, two noisy, one who prefers bright clips and one careless in a quarter of the tasks.

    The kinds come in pairs, so that even and odd positions make two like panels; `seed` varies the noise by up to 20 %.
    """
    rng = random.Random(f"panel:{seed}")
    panel = []
    for index in range(n):
        kind, habits = _KINDS[index % len(_KINDS)]
        noise = habits["noise"] * rng.uniform(0.8, 1.2)
        panel.append(AnnotatorProfile(f"{kind}-{index + 1}", **{**habits, "noise": noise}))
    return panel


@dataclass(frozen=True)
class Impression:
    """What there is to see in one clip, before anyone's noise."""

    gold: Mapping[str, float]
    brightness: float
    """Mean of all pixels, 0 to 1."""
    key: str
    """Names the clip, so that the same annotator has the same opinion of it at any time and in any slot."""


class SimulatedAnnotator:
    """One annotator; the same profile, seed, prompt and clips always give the same opinion."""

    def __init__(
        self,
        profile: AnnotatorProfile,
        seed: int = 0,
        *,
        spread: Mapping[str, float] = TYPICAL_SPREAD,
    ):
        self.profile = profile
        self.seed = seed
        self.spread = spread

    def verdict(self, task: TaskView, impressions: Sequence[Impression]) -> Verdict:
        """Judge the clips of a task, given in the order shown: a free pick per dimension, repaired where the rule vetoes it.

        A vetoed pick is kept as `first_best`, `first_worst`. Another admissible pair is chosen, marked constrained, if the
        annotator sees it the right way round by more than the tie width; else there is no valid pair.
        """
        if len(impressions) != task.num_clips:
            raise ValueError(f"{len(impressions)} impressions for {task.num_clips} clips")
        keys = sorted(impression.key for impression in impressions)
        careless = self._random("care", task.prompt, *keys).random() < self.profile.careless_rate
        picks: dict[str, tuple[int, int]] = {}
        choices = []
        for dimension in task.dimensions:
            seen = self._opinions(task.prompt, dimension, impressions, at_random=careless)
            best, worst = (
                max(range(len(seen)), key=seen.__getitem__),
                min(range(len(seen)), key=seen.__getitem__),
            )
            if seen[best] - seen[worst] < self.profile.tie_width or best == worst:
                choices.append(Choice(dimension, status="tie"))
                continue
            open_pairs = admissible_pairs(task.num_clips, dimension, picks)
            if (best, worst) in open_pairs:
                choices.append(Choice(dimension, best, worst))
                picks[dimension] = (best, worst)
                continue
            other = max(open_pairs, key=lambda pair: seen[pair[0]] - seen[pair[1]], default=None)
            first = {"first_best": best, "first_worst": worst}
            if other is not None and seen[other[0]] - seen[other[1]] > self.profile.tie_width:
                choices.append(Choice(dimension, *other, constrained=True, **first))
                picks[dimension] = other
            else:
                choices.append(Choice(dimension, status="no_valid_pair", **first))
        return Verdict(tuple(choices))

    def _opinions(
        self, prompt: str, dimension: str, impressions: Sequence[Impression], *, at_random: bool
    ) -> list[float]:
        """How good each clip seems, in units of the typical spread."""
        profile, last = self.profile, max(len(impressions) - 1, 1)
        opinions = []
        for slot, impression in enumerate(impressions):
            draw = self._random(dimension, prompt, impression.key)
            if at_random:
                opinions.append(draw.gauss(0, 1))
                continue
            true = impression.gold[dimension] / self.spread[dimension]
            bright = profile.brightness_bias * impression.brightness / BRIGHTNESS_SPREAD
            place = profile.slot_bias * (1 - slot / last)
            opinions.append(true + bright + place + draw.gauss(0, profile.noise))
        return opinions

    def _random(self, *purpose: str) -> random.Random:
        return random.Random("|".join((str(self.seed), self.profile.name, *purpose)))


@dataclass
class _Viewer:
    """Measures each downloaded copy once, whoever looks at it."""

    gold: Gold
    seen: dict[tuple[str, str], Impression] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def look(self, media: bytes, prompt: str) -> Impression:
        from reelhf.video import read_video

        key = hashlib.sha256(media).hexdigest(), prompt
        with self.lock:
            if key in self.seen:
                return self.seen[key]
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            file.write(media)
            file.flush()
            frames, fps = read_video(file.name)
        frames = frames.float() / 255
        impression = Impression(self.gold(frames, prompt, fps), float(frames.mean()), key[0])
        with self.lock:
            self.seen[key] = impression
        return impression


@dataclass
class _Turns:
    """Keeps annotators abreast: nobody is more than one task ahead of the slowest who still works."""

    done: dict[str, int]
    at_work: set[str]
    changed: threading.Condition = field(default_factory=threading.Condition)

    def wait(self, name: str) -> None:
        with self.changed:
            self.changed.wait_for(
                lambda: self.done[name] <= min(self.done[other] for other in self.at_work)
            )

    def finish_task(self, name: str) -> None:
        with self.changed:
            self.done[name] += 1
            self.changed.notify_all()

    def leave(self, name: str) -> None:
        with self.changed:
            self.at_work.discard(name)
            self.changed.notify_all()


def run_annotators(
    base_url: str,
    credentials: Mapping[str, tuple[str, str]],
    panel: Sequence[AnnotatorProfile],
    *,
    gold: Gold,
    max_tasks: int | None = None,
    seed: int = 0,
    spread: Mapping[str, float] = TYPICAL_SPREAD,
) -> dict[str, Any]:
    """Let a panel judge over HTTP, everyone at the same time and at the same pace, until nothing is open.

    Args:
        credentials: profile name -> (login, password).
        gold: what a perfect annotator would see in the downloaded copy.
        max_tasks: per annotator; None for no limit.
    Returns: counts: `judgments` (one per annotator and task), `per_annotator`, the answers per status (`ok`, `tie`,
        `no_valid_pair`), how many were `constrained`, how many the server `refused`, and `seconds`.
    Raises: UserError when a profile has no credentials or two share a name.
    """
    from reelhf.progress import track

    names = [profile.name for profile in panel]
    if len(set(names)) < len(names):
        raise UserError(f"annotators share a name: {', '.join(names)}")
    missing = [name for name in names if name not in credentials]
    if missing:
        raise UserError(f"no credentials for annotator {', '.join(missing)}")
    start = time.monotonic()
    viewer, turns = _Viewer(gold), _Turns(dict.fromkeys(names, 0), set(names))
    verdicts: queue.SimpleQueue[Verdict | None] = queue.SimpleQueue()  # None: the server refused it

    def work(profile: AnnotatorProfile) -> None:
        annotator = SimulatedAnnotator(profile, seed, spread=spread)
        try:
            with AnnotationClient(base_url, *credentials[profile.name]) as client:
                while max_tasks is None or turns.done[profile.name] < max_tasks:
                    turns.wait(profile.name)
                    task = client.claim()
                    if task is None:
                        return
                    verdicts.put(_judge(client, annotator, viewer, task))
                    turns.finish_task(profile.name)
        finally:
            turns.leave(profile.name)

    def arrivals(futures: Sequence[Future[None]]) -> Iterator[Verdict | None]:
        while not verdicts.empty() or not all(future.done() for future in futures):
            try:
                yield verdicts.get(timeout=0.1)
            except queue.Empty:
                continue

    statuses, counts = Counter[str](), Counter[str]()
    with ThreadPoolExecutor(max(len(panel), 1)) as pool:
        futures = [pool.submit(work, profile) for profile in panel]
        for verdict in track(arrivals(futures), label="simulated judgments"):
            if verdict is None:
                counts["refused"] += 1
                continue
            counts["judgments"] += 1
            statuses.update(choice.status for choice in verdict.choices)
            counts["constrained"] += sum(choice.constrained for choice in verdict.choices)
    for future in futures:
        future.result()  # an annotator that failed fails the panel
    return {
        **{name: counts[name] for name in ("judgments", "constrained", "refused")},
        **{name: statuses[name] for name in ("ok", "tie", "no_valid_pair")},
        "per_annotator": dict(turns.done),
        "seconds": round(time.monotonic() - start, 2),
    }


def _judge(
    client: AnnotationClient, annotator: SimulatedAnnotator, viewer: _Viewer, task: TaskView
) -> Verdict | None:
    """Watch, decide, submit; None when the server says that the task was answered already."""
    begun = time.monotonic()
    impressions = [viewer.look(client.media(clip.url), task.prompt) for clip in task.clips]
    verdict = annotator.verdict(task, impressions)
    verdict = replace(verdict, seconds=time.monotonic() - begun)
    try:
        client.submit(task, verdict)
    except SubmissionRefused as refusal:
        if refusal.status != HTTPStatus.CONFLICT:
            raise
        return None
    return verdict


def annotator_ceiling(
    preferences: PreferenceData | Path,
    gold: Gold,
    *,
    prompt_ids: Collection[str] | None = None,
    annotators: Collection[str] | None = None,
    same_stage: bool = True,
    kinds: Collection[str] = ("explicit",),
) -> dict[str, dict[str, float]]:
    """How often the gold order agrees with what a panel said: no reward can be expected to do better on these pairs.

    Args:
        preferences: preference data of clips that the gold can measure; the original files are measured, not the copies.
        prompt_ids, annotators: keep only these (pseudonyms); None keeps all.
        same_stage: only pairs whose two clips come from one stage of the model.
        kinds: of "explicit" (best against worst) and "implied", those that count.
    Returns: per dimension `accuracy` on the pairs that are no tie, and their number `n`.
    """
    from reelhf.progress import track
    from reelhf.video import read_videos

    data = preferences if isinstance(preferences, PreferenceData) else read_preferences(preferences)
    rows = [
        row
        for row in data.preferences
        if row["preference"] != 0
        and row["kind"] in kinds
        and (row["same_stage"] or not same_stage)
        and (prompt_ids is None or row["prompt_id"] in prompt_ids)
        and (annotators is None or row["annotator"] in annotators)
    ]
    looks = sorted({(row[side], row["prompt"]) for row in rows for side in ("clip_a", "clip_b")})
    shown = zip(looks, read_videos(data.clip_path(sha256) for sha256, _ in looks), strict=True)
    scores = {
        (sha256, prompt): gold(frames.float() / 255, prompt, fps)
        for (sha256, prompt), (frames, fps) in track(
            shown, label="gold of judged clips", total=len(looks)
        )
    }
    right, total = Counter[str](), Counter[str]()
    for row in rows:
        dimension = row["dimension"]
        a, b = (scores[row[side], row["prompt"]].get(dimension) for side in ("clip_a", "clip_b"))
        if a is None or b is None:
            continue
        total[dimension] += 1
        right[dimension] += (a - b) * row["preference"] > 0
    return {d: {"accuracy": right[d] / n, "n": n} for d, n in sorted(total.items())}

"""Which clips meet in a task: stages and models by configured shares, and pairs that must be compared. Pure but for the store's rows."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from sqlalchemy import select

from annotation import schema as t
from annotation.projects import project_id
from annotation.records import MAX_CLIPS, MIN_CLIPS
from annotation.store import Store
from reelhf.config import Config
from reelhf.errors import UserError, did_you_mean

GROUPS = ("stage", "model", "checkpoint")


class MixConfig(Config):
    """How tasks are put together: `reelhf annotate tasks mix` takes it."""

    project: str = "default"
    """Of the store."""
    by: str = "stage"
    """What the shares and pairs name: `stage`, `model` or `checkpoint`."""
    shares: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Group -> its share of the clips shown, relative to the others'. Empty: every group alike. A group that is not named is left out."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Groups of which each task shows one such pair, each pair as often as the others."""
    clips_per_task: int = Field(default=4, ge=MIN_CLIPS, le=MAX_CLIPS)
    """K."""
    tasks_per_prompt: PositiveInt = 1
    """At most, as long as there are unused clips."""
    max_tasks: PositiveInt | None = None
    """In all."""
    judgments_per_task: PositiveInt = 1
    """Different people asked per task."""
    round: int = Field(default=0, ge=0)
    """Of the annotate, train, align cycle."""
    seed: int = 0
    """Of the draws."""

    @model_validator(mode="after")
    def _fits_together(self) -> MixConfig:
        if self.by not in GROUPS:
            raise ValueError(f"by is {self.by!r}; expected one of {', '.join(GROUPS)}")
        for pair in self.pairs:
            if pair[0] == pair[1] and self.clips_per_task < 2:
                raise ValueError(f"a pair of {pair[0]} needs two clips per task")
            for name in pair:
                if self.shares and name not in self.shares:
                    raise ValueError(f"pairs name {name!r}, which has no share")
        return self


@dataclass(frozen=True)
class Candidate:
    """One clip that may be shown."""

    clip_id: int
    prompt_id: str
    task_kind: str
    group: str
    """Its stage, model or checkpoint."""


@dataclass(frozen=True)
class Mixed:
    """Tasks that are to be made."""

    groups: list[list[Candidate]]
    """The clips of each task."""
    left_out: Counter[str]
    """Prompts that gave no task, by reason."""

    @property
    def shown(self) -> Counter[str]:
        """How often each group is shown."""
        return Counter(clip.group for clips in self.groups for clip in clips)

    @property
    def met(self) -> Counter[tuple[str, str]]:
        """In how many tasks two groups meet."""
        found: Counter[tuple[str, str]] = Counter()
        for clips in self.groups:
            names = sorted({clip.group for clip in clips})
            found.update((a, b) for i, a in enumerate(names) for b in names[i + 1 :])
        return found


def mix(candidates: Sequence[Candidate], config: MixConfig) -> Mixed:
    """Draws the clips of every task.

    Prompts come in random order. A task begins with the configured pair that was used least; each further clip comes from the group
    that lags furthest behind its share so far, among those this prompt has unused clips of.
    """
    rng = random.Random(config.seed)
    by_prompt: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    made_of: dict[int, Candidate] = {}
    for clip in candidates:
        if not config.shares or clip.group in config.shares:
            by_prompt[clip.prompt_id, clip.task_kind][clip.group].append(clip.clip_id)
            made_of[clip.clip_id] = clip
    names = sorted({name for groups in by_prompt.values() for name in groups})
    weight = {name: config.shares.get(name, 1.0) for name in names}
    shown: Counter[str] = Counter()
    paired: Counter[tuple[str, str]] = Counter()
    left_out: Counter[str] = Counter()
    tasks: list[list[Candidate]] = []
    prompts = sorted(by_prompt)
    rng.shuffle(prompts)
    for prompt in prompts:
        unused = {
            name: rng.sample(ids, len(ids)) for name, ids in sorted(by_prompt[prompt].items())
        }
        for number in range(config.tasks_per_prompt):
            if config.max_tasks is not None and len(tasks) >= config.max_tasks:
                left_out["enough tasks already"] += number == 0
                break
            begin: tuple[str, ...] = ()
            if config.pairs:
                possible = [pair for pair in config.pairs if _has(unused, pair)]
                if not possible:
                    left_out["no pair of the wanted groups"] += number == 0
                    break
                begin = min(possible, key=lambda pair: paired[pair])
            if sum(map(len, unused.values())) < MIN_CLIPS:
                left_out["fewer than two clips"] += number == 0
                break
            if begin:
                paired[begin] += 1  # type: ignore[index]
            picked = [unused[name].pop() for name in begin]
            shown.update(begin)
            while len(picked) < config.clips_per_task and any(unused.values()):
                name = min((n for n in names if unused.get(n)), key=lambda n: shown[n] / weight[n])
                picked.append(unused[name].pop())
                shown[name] += 1
            tasks.append([made_of[clip_id] for clip_id in picked])
    return Mixed(tasks, left_out)


def _has(unused: Mapping[str, Sequence[int]], pair: tuple[str, str]) -> bool:
    needed = Counter(pair)
    return all(len(unused.get(name, ())) >= number for name, number in needed.items())


def load_candidates(store: Store, config: MixConfig) -> list[Candidate]:
    """The project's clips that no task of this round shows yet.

    Raises: UserError naming a share that no clip has.
    """
    clip = t.clip.c
    column = {"stage": clip.stage, "model": clip.model, "checkpoint": clip.checkpoint}[config.by]
    shown = (
        select(t.task_clip.c.clip_id)
        .join(t.task, t.task.c.id == t.task_clip.c.task_id)
        .where(t.task.c.round == config.round)
    )
    with store.read() as connection:
        here = t.project_clip.c.project_id == project_id(connection, config.project)
        rows = connection.execute(
            select(clip.id, clip.prompt_id, clip.task_kind, column.label("group"))
            .join(t.project_clip, t.project_clip.c.clip_id == clip.id)
            .where(here, clip.purged_ms.is_(None), clip.id.not_in(shown))
            .order_by(clip.id)
        ).all()
    found = [Candidate(row.id, row.prompt_id, row.task_kind, str(row.group)) for row in rows]
    known = {candidate.group for candidate in found}
    for name in config.shares:
        if name not in known:
            raise UserError(
                f"shares name {name!r}, but no unused clip has that {config.by}.{did_you_mean(name, known)}"
            )
    return found

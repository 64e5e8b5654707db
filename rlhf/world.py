"""Where a loop's clips, prompts and ground truth come from: the toy world, or a folder of real captioned clips.

Five groups of prompts that share nothing: `feedback` (annotated, and what RLHF maximises on), `held_out` (annotated by other
people for the held-out rewards), `validation` (keep-best), `test` (the final comparison, seen by nothing before it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt

from reelhf.config import Config
from reelhf.errors import UserError

if TYPE_CHECKING:
    from generator.toyworld import Variety
    from rlhf.candidates import CandidatesConfig
    from rlhf.compare import Gold

MIN_CAPTIONS = 4


class PromptsConfig(Config):
    """How many prompts each part of the loop gets. Real clips give as many as they have captions."""

    feedback: PositiveInt = 80
    """Annotated by the first half of the annotators."""
    held_out: PositiveInt = 48
    """Annotated by the second half, for the held-out rewards."""
    tasks_per_prompt: PositiveInt = 1
    """Tasks per annotated prompt, each of other clips. Fewer captions than prompts asked for make more tasks each."""
    training: PositiveInt = 80
    """Feedback prompts that RLHF maximises on; may exceed `feedback`, the annotated ones come first."""
    validation: PositiveInt = 24
    """On which RLHF keeps its best step."""
    test: PositiveInt = 64
    """Of the final comparison."""
    zh_fraction: float = Field(0.2, ge=0, le=1)
    """Share of Chinese prompts in the toy world."""
    seed: int = 0


@dataclass(frozen=True)
class Prompts:
    """Prompts per use; no prompt is in two of feedback/training, held_out, validation and test.

    `feedback` and `held_out` name one prompt per task, so a prompt may come back; the others are distinct.
    """

    feedback: tuple[str, ...]
    held_out: tuple[str, ...]
    training: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class World:
    """What a loop runs in."""

    clips: Path | None
    """A folder of real captioned clips, or None for the toy world, which renders its own."""
    prompts: Prompts
    gold: Gold | None
    """Ground truth; None for real clips, which have none."""
    notes: tuple[str, ...] = ()
    """What a reader of the results has to know, in whole sentences."""
    corrupted_candidates: bool = False
    """Judge windows of the real clips and corrupted copies instead of generated clips: all that a simulated annotator can."""

    @property
    def gold_source(self) -> tuple[str, ...]:
        """Modules that the gold measurement depends on."""
        return () if self.gold is None else ("generator.toygold",)

    def make_candidates(
        self, config: CandidatesConfig, *, stages: dict[str, Path], out: Path
    ) -> Path:
        """Clips for the feedback prompts, then for the held-out prompts; one task each."""
        from rlhf.candidates import make_candidates, make_corrupted_candidates

        prompts = [*self.prompts.feedback, *self.prompts.held_out]
        if self.corrupted_candidates:
            assert self.clips is not None
            return make_corrupted_candidates(
                config, clips=self.clips, like=stages["refiner"], prompts=prompts, out=out
            )
        return make_candidates(config, stages=stages, prompts=prompts, out=out)

    def annotator_view(self, candidates: Path) -> Gold:
        """What a perfect annotator would see in a candidate clip.

        Raises: UserError where nobody but a person can tell.
        """
        if self.gold is not None:
            return self.gold
        if self.corrupted_candidates:
            from rlhf.candidates import CorruptionOracle

            return CorruptionOracle(candidates)
        raise UserError(
            "generated clips of real prompts have no gold; only a person can judge them"
        )


def toy_world(config: PromptsConfig, variety: Variety = "plain") -> World:
    """The toy world's disjoint prompt splits and its gold measurement."""
    from generator.toygold import measure
    from generator.toyworld import Split, prompt_split

    def prompts(split: Split, count: int) -> tuple[str, ...]:
        texts = prompt_split(
            split, count, config.seed, zh_fraction=config.zh_fraction, variety=variety
        )
        return tuple(texts)

    feedback = prompts("feedback", max(config.feedback, config.training))
    return World(
        None,
        Prompts(
            feedback[: config.feedback] * config.tasks_per_prompt,
            prompts("held_out", config.held_out) * config.tasks_per_prompt,
            feedback[: config.training],
            prompts("validation", config.validation),
            prompts("test", config.test),
        ),
        measure,
    )


def real_world(config: PromptsConfig, clips: Path, *, corrupted_candidates: bool) -> World:
    """The captions of a folder of real clips, split so that no caption has two uses. There is no gold."""
    from reelhf.clips import load_clip_folder

    prompts = split_captions([entry.caption for entry in load_clip_folder(clips)], config)
    distinct = {*prompts.training, *prompts.held_out, *prompts.validation, *prompts.test}
    prompts = replace(  # few captions still make many tasks: each shows another window
        prompts,
        feedback=_repeated(prompts.feedback, config.feedback * config.tasks_per_prompt),
        held_out=_repeated(prompts.held_out, config.held_out * config.tasks_per_prompt),
    )
    known = (
        "The simulated annotators only rank real windows against named corruptions and swapped captions, so the rewards know no "
        "more than that; people have to judge the rest."
        if corrupted_candidates
        else "What people judged is all there is."
    )
    return World(
        clips,
        prompts,
        None,
        (
            f"These are real clips: they have no gold. {known}",
            f"The folder has {len(distinct)} distinct captions, {len(prompts.test)} of them kept for the final comparison.",
        ),
        corrupted_candidates,
    )


def split_captions(captions: Sequence[str], config: PromptsConfig) -> Prompts:
    """Distinct captions dealt out by a salted hash: about a fifth each for test and held_out, a tenth for validation.

    Raises: UserError with fewer than four distinct captions, one for each use.
    """
    from reelhf.hashing import content_hash

    distinct = sorted(
        set(captions), key=lambda caption: content_hash("real-split-1", config.seed, caption)
    )
    if len(distinct) < MIN_CAPTIONS:
        raise UserError(
            f"{len(distinct)} distinct captions; expected at least {MIN_CAPTIONS}: one each to train, to judge the judge, to select "
            "and to compare on. Caption single shots, or add clips"
        )
    test = min(config.test, max(1, len(distinct) // 5))
    held_out = min(config.held_out, max(1, len(distinct) // 5))
    validation = min(config.validation, max(1, len(distinct) // 10))
    dealt = iter(distinct)

    def take(count: int) -> tuple[str, ...]:
        return tuple(caption for _, caption in zip(range(count), dealt, strict=False))

    parts = take(test), take(held_out), take(validation)
    rest = tuple(dealt)
    return Prompts(rest[: config.feedback], parts[1], rest[: config.training], parts[2], parts[0])


def _repeated(prompts: tuple[str, ...], count: int) -> tuple[str, ...]:
    return (prompts * -(-count // len(prompts)))[:count]

"""Candidate clips from configured checkpoints: the prompt pool goes into a command, its clips come back with their model and stage.

A source is any command that reads a file of prompts, one per line, and writes a folder of videos with a `captions.jsonl`
(`{"path", "caption"}` per line, and the `seed` if known): `reelhf generator sample` is one, and so is a script around anybody else's model.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field, PositiveInt, field_validator

from annotation.prompts.pool import list_pool
from annotation.quickstart import jsonl_rows
from annotation.records import ClipRecord, prompt_id
from annotation.store import Store
from reelhf.config import Config
from reelhf.errors import UserError

BLANKS = ("prompts", "out", "seed", "python", "checkpoint")
MAX_TAIL = 400  # characters of a failed command's output that are shown


class Source(Config):
    """One model, at one stage, as a command."""

    model: str = Field(min_length=1, max_length=200)
    """Who made the clips; never shown to annotators."""
    stage: str = Field(min_length=1, max_length=200)
    """Which step of the making: `base`, `refiner`, `distilled`, ..."""
    command: str
    """Typed as in a shell, run without one. Blanks: {prompts} a file of prompts, {out} the folder to fill, {seed}, {checkpoint}, {python} this interpreter."""
    checkpoint: str | None = None
    """Stored with every clip, and put into {checkpoint}."""
    seed: int = 0
    """The first seed."""

    @field_validator("command")
    @classmethod
    def _has_its_blanks(cls, command: str) -> str:
        unknown = [name for name in re.findall(r"\{(\w*)\}", command) if name not in BLANKS]
        if unknown:
            raise ValueError(f"unknown blank {{{unknown[0]}}}; there are {', '.join(BLANKS)}")
        missing = [name for name in ("prompts", "out") if f"{{{name}}}" not in command]
        if missing:
            raise ValueError(f"the command does not say where {{{missing[0]}}} goes")
        return command

    def words(self, prompts: Path, out: Path) -> list[str]:
        """The command with its blanks filled, word by word: a path with a space stays one word."""
        filled = {
            "prompts": str(prompts),
            "out": str(out),
            "seed": str(self.seed),
            "checkpoint": self.checkpoint or "",
            "python": sys.executable,
        }
        return [word.format(**filled) for word in shlex.split(self.command)]


class CandidatesConfig(Config):
    """Which models make clips of which prompts: `reelhf annotate clips generate` takes it."""

    project: str = "default"
    """Of the store: its pool gives the prompts, and the clips are its own."""
    num_prompts: PositiveInt = 50
    """Drawn from the active prompts by their weights."""
    language: str | None = None
    """Only prompts in this language."""
    seed: int = 0
    """Of the draw."""
    sources: tuple[Source, ...] = Field(min_length=1)
    """Each makes clips of the same prompts."""


@dataclass(frozen=True)
class Made:
    """What one source made."""

    source: Source
    clips: list[ClipRecord]
    without: list[str]
    """Prompts it made no clip of."""


def draw_prompts(store: Store, config: CandidatesConfig) -> list[str]:
    """The prompts that every source is given. Raises UserError if the pool has none."""
    rows = list_pool(
        store,
        project=config.project,
        language=config.language,
        number=config.num_prompts,
        seed=config.seed,
    )
    if not rows:
        raise UserError(
            f"the pool of project {config.project!r} has no active prompt. next: reelhf annotate prompts import FILE"
        )
    return [row.text for row in rows]


def run_source(source: Source, prompts: Sequence[str], out: Path) -> Made:
    """Runs a source's command in an empty folder `out` and reads what it wrote.

    Raises: UserError if the command cannot be run, fails, or writes no clip of a prompt that was asked for.
    """
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{out} is there already; name a new folder with --out") from None
    listed = out.with_name(f"{out.name}.prompts.txt")
    listed.write_text("".join(prompt + "\n" for prompt in prompts), encoding="utf-8")
    words = source.words(listed.absolute(), out.absolute())
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"{source.model}: cannot run {words[0]}: {error.strerror}") from error
    if done.returncode:
        tail = " ".join((done.stderr or done.stdout)[-MAX_TAIL:].split())
        raise UserError(f"{source.model}: {shlex.join(words)} ended with {done.returncode}: {tail}")
    return Made(source, *read_made(source, prompts, out))


def read_made(
    source: Source, prompts: Sequence[str], out: Path
) -> tuple[list[ClipRecord], list[str]]:
    """The clips in a source's folder that show one of the prompts, and the prompts without any."""
    asked = {prompt_id(prompt): prompt for prompt in prompts}
    clips = []
    for number, row in jsonl_rows(out / "captions.jsonl"):
        path = out / str(row.get("path", ""))
        if not path.is_file():
            raise UserError(f"{out / 'captions.jsonl'} line {number}: {path} is missing")
        prompt = asked.get(prompt_id(str(row.get("caption", ""))))
        if prompt is not None:
            seed = row.get("seed")
            clips.append(
                ClipRecord(
                    path,
                    prompt,
                    source.model,
                    source.stage,
                    checkpoint=source.checkpoint,
                    seed=seed if isinstance(seed, int) else None,
                )
            )
    if not clips:
        raise UserError(f"{source.model}: {out} shows none of the prompts that were asked for")
    shown = {prompt_id(clip.prompt) for clip in clips}
    return clips, [prompt for name, prompt in asked.items() if name not in shown]


def import_made(
    store: Store, made: Made, *, project: str, language_of: dict[str, str]
) -> list[int]:
    """Adds a source's clips to the store; returns their ids."""
    clips = [replace(clip, language=language_of.get(clip.prompt, "en")) for clip in made.clips]
    return store.add_clips(clips, project=project, label=f"{made.source.model} {made.source.stage}")

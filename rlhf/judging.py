"""The loop's annotation step: candidate clips become tasks, annotators judge them over HTTP, verdicts become preference data.

Annotators are simulated, or you in a browser. Two groups never meet: the first judges the feedback prompts, from which the rewards
learn that RLHF maximises; the second judges the held-out prompts, from which the held-out rewards learn that only watch.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveInt

from reelhf.config import Config
from rlhf.candidates import read_manifest

if TYPE_CHECKING:
    from annotation.store import Account, Store
    from rlhf.compare import Gold

PROJECT, PREFERENCES, SUMMARY = "project", "preferences", "judging.json"
HUMAN = "you"
_POLL_SECONDS = 1.0
_SPREAD_CLIPS = 160  # clips measured for the annotators' unit of noise, about
MIN_SPREAD = 1e-3
"""Of gold between the clips of a task: below this nobody sees a difference."""


class JudgingConfig(Config):
    """Who judges, and how much."""

    annotators: int = Field(8, ge=2)
    """Simulated annotators; the first half judges feedback prompts, the second held-out prompts."""
    judgments_per_task: PositiveInt = 2
    """Different annotators who judge each task."""
    panel_seed: int = 0
    """Of the annotators' noise and habits."""
    human_tasks: int = Field(12, ge=2)
    """Tasks asked of you with `--annotator human`: two thirds feedback prompts, one third held-out prompts."""


@dataclass(frozen=True)
class Groups:
    """Which annotators and prompts taught which rewards; what `train_rewards` filters by."""

    feedback_annotators: tuple[str, ...] | None
    """Pseudonyms; None means everyone."""
    held_out_annotators: tuple[str, ...] | None
    feedback_prompt_ids: tuple[str, ...]
    held_out_prompt_ids: tuple[str, ...]


def read_groups(folder: Path) -> Groups:
    """What `judge_simulated` and `export_human` wrote beside the preferences."""
    raw = json.loads((folder / SUMMARY).read_text())["groups"]
    return Groups(**{key: None if value is None else tuple(value) for key, value in raw.items()})


def open_project(folder: Path, candidates: Path) -> tuple[Store, list[list[int]]]:
    """The annotation project with every candidate clip in it, and the clip ids of each task's prompt in order."""
    from annotation.records import ClipRecord
    from annotation.store import Store

    store = Store.open(folder)
    rows = read_manifest(candidates)
    ids = store.add_clips(
        [
            ClipRecord(
                path=row["path"],
                prompt=row["prompt"],
                model=row["model"],
                stage=row["stage"],
                language=language_of(row["prompt"]),
                checkpoint=row["checkpoint"],
                seed=row["seed"],
            )
            for row in rows
        ],
        project="demo",
        label="clips to the project",
    )
    groups: dict[int, list[int]] = {}
    for row, clip_id in zip(rows, ids, strict=True):
        groups.setdefault(row["task"], []).append(clip_id)
    return store, [list(dict.fromkeys(groups[task])) for task in sorted(groups)]


def judge_simulated(
    config: JudgingConfig,
    candidates: Path,
    *,
    prompts: Sequence[Sequence[str]],
    gold: Gold,
    out: Path,
) -> Path:
    """Simulated annotators judge every task over the HTTP API; then the verdicts are exported.

    Args:
        candidates: folder of `make_candidates`; its tasks are the prompts of `prompts[0]`, then those of `prompts[1]`.
        prompts: the feedback and the held-out prompts.
        gold: what a perfect annotator would see in a clip; each annotator adds noise, bias and carelessness.
    Returns: `out`, with `project/`, `preferences/` and `judging.json`.
    """
    from annotation.records import prompt_id

    shutil.rmtree(out, ignore_errors=True)  # an interrupted attempt is done again: it takes seconds
    store, groups = open_project(out / PROJECT, candidates)
    spread = shown_spread(candidates, gold)
    with store:
        panels = simulated_panels(config)
        parts = groups[: len(prompts[0])], groups[len(prompts[0]) :]
        pseudonyms, counts = [], []
        for part, panel in zip(parts, panels, strict=True):
            store.create_tasks(part, need=min(config.judgments_per_task, len(panel)), label="tasks")
            names, done = run_panel(store, panel, gold, seed=config.panel_seed, spread=spread)
            pseudonyms.append(names)
            counts.append(done)
        groups_of = {
            "feedback_annotators": pseudonyms[0],
            "held_out_annotators": pseudonyms[1],
            "feedback_prompt_ids": [prompt_id(p) for p in dict.fromkeys(prompts[0])],
            "held_out_prompt_ids": [prompt_id(p) for p in dict.fromkeys(prompts[1])],
        }
        return export_project(store, out, groups_of, {"panels": counts, "spread": spread})


def shown_spread(candidates: Path, gold: Gold) -> dict[str, float]:
    """Dimension -> standard deviation of gold between the clips of one task, averaged over tasks.

    The unit of the simulated annotators' noise: a person tells apart what is shown side by side, on whatever scale it differs.
    """
    from reelhf.progress import track
    from reelhf.video import read_video

    rows = read_manifest(candidates)
    tasks = sorted({row["task"] for row in rows})[:: max(1, len(rows) // _SPREAD_CLIPS)]
    measured: dict[int, list[Mapping[str, float]]] = {}
    for row in track([r for r in rows if r["task"] in tasks], label="spread of the clips shown"):
        frames, fps = read_video(row["path"])
        measured.setdefault(row["task"], []).append(gold(frames.float() / 255, row["prompt"], fps))
    groups = [group for group in measured.values() if len(group) > 1]
    return {
        name: max(MIN_SPREAD, fmean(stdev(clip[name] for clip in group) for group in groups))
        for name in (groups[0][0] if groups else ())
    }


def simulated_panels(config: JudgingConfig) -> tuple[list[Any], list[Any]]:
    """The stated annotators, dealt alternately into two groups so that each has careful and careless ones."""
    from rlhf.simulated import default_panel

    panel = default_panel(config.annotators, config.panel_seed)
    return panel[0::2], panel[1::2]


def run_panel(
    store: Store,
    panel: Sequence[Any],
    gold: Gold,
    *,
    seed: int,
    spread: Mapping[str, float] | None = None,
) -> tuple[list[str], Any]:
    """Every annotator of a panel judges what is open to them; returns their pseudonyms and counts."""
    from annotation.api.app import create_app
    from annotation.api.server import running_server
    from rlhf.simulated import TYPICAL_SPREAD, run_annotators

    credentials, pseudonyms = {}, []
    for profile in panel:
        password = secrets.token_urlsafe(12)
        account = store.add_user(f"simulated {profile.name}", password, simulated=True)
        credentials[profile.name] = (f"simulated {profile.name}", password)
        pseudonyms.append(account.pseudonym)
    with running_server(create_app(store, page=False)) as url:
        counts = run_annotators(
            url, credentials, panel, gold=gold, seed=seed, spread=TYPICAL_SPREAD | (spread or {})
        )
    return pseudonyms, counts


def export_project(store: Store, out: Path, groups: dict, extra: dict) -> Path:
    """Preference data, and a summary with the groups and the project's counts, beside the project."""
    from annotation.export import export_preferences

    shutil.rmtree(out / PREFERENCES, ignore_errors=True)
    export_preferences(store, out / PREFERENCES)
    summary = {"groups": groups, "counts": store.counts()} | extra
    (out / SUMMARY).write_text(json.dumps(summary, indent=1, default=str))
    return out


@dataclass(frozen=True)
class HumanSession:
    """A running page at which one person judges."""

    store: Store
    account: Account
    groups: list[list[int]]
    """Clip ids per candidate task, in the candidates' order."""
    url: str
    sign_in_url: str
    """Signs in once without a password."""


def human_app(store: Store, *, wanted: int | None) -> tuple[Any, Account]:
    """The annotation site of a project and the account of the person in front of it."""
    from annotation.api.app import create_app
    from annotation.config import AnnotateConfig

    account = store.find_user(HUMAN) or store.add_user(HUMAN, secrets.token_urlsafe(12))
    config = AnnotateConfig(wanted_tasks=wanted, title="ReelHF: judge")
    return create_app(store, config), account


def human_share(config: JudgingConfig, sizes: tuple[int, int], *, top_up: bool) -> tuple[int, int]:
    """How many feedback and held-out tasks the person gets; with a top-up, simulated others judge the held-out ones."""
    held_out = 0 if top_up else min(sizes[1], max(1, config.human_tasks // 3))
    return min(sizes[0], config.human_tasks - held_out), held_out


def create_human_tasks(
    store: Store, groups: Sequence[Sequence[int]], share: tuple[int, int], num_feedback: int
) -> None:
    """The person's tasks, once per project."""
    if store.counts()["tasks"] == 0:
        chosen = [*groups[: share[0]], *groups[num_feedback : num_feedback + share[1]]]
        store.create_tasks(chosen, need=1, label="tasks")


def wait_for_human(store: Store, wanted: int, echo: Callable[[str], None]) -> None:
    """Return once the person has judged (or skipped) `wanted` tasks; says now and then how far they are."""
    started, first, said = time.monotonic(), None, None
    while True:
        counts = store.counts()
        done = counts["human_judgments"]
        first = done if first is None else first
        if done >= wanted or counts["open_tasks"] == 0:
            echo(f"      {done} of {wanted} tasks judged: going on. The page stays open.")
            return
        if done != said:
            pace = (time.monotonic() - started) / (done - first) if done > first else None
            left = (
                ""
                if pace is None
                else f", about {max(1, round(pace * (wanted - done) / 60))} min left"
            )
            echo(f"      {done} of {wanted} tasks judged{left}")
            said = done
        time.sleep(_POLL_SECONDS)


def finish_human(
    config: JudgingConfig,
    session: HumanSession,
    *,
    prompts: Sequence[Sequence[str]],
    share: tuple[int, int],
    gold: Gold | None,
    top_up: bool,
    out: Path,
) -> Path:
    """Top up with simulated votes if asked (and only then), and export. Simulated votes are marked in every table."""
    from annotation.records import prompt_id

    num_feedback = len(prompts[0])
    feedback_annotators: list[str] | None = None
    held_out_annotators: list[str] | None = None
    extra: dict[str, Any] = {"human_tasks": share[0] + share[1], "top_up": top_up}
    feedback, held_out = prompts[0][: share[0]], prompts[1][: share[1]]
    if top_up:
        if gold is None:
            raise ValueError("there is nothing to simulate votes from")
        rest = session.groups[share[0] : num_feedback], session.groups[num_feedback:]
        pseudonyms, extra["panels"] = [], []
        for part, panel in zip(rest, simulated_panels(config), strict=True):
            session.store.create_tasks(
                part, need=min(config.judgments_per_task, len(panel)), label="tasks"
            )
            names, done = run_panel(session.store, panel, gold, seed=config.panel_seed)
            pseudonyms.append(names)
            extra["panels"].append(done)
        feedback_annotators = [session.account.pseudonym, *pseudonyms[0]]
        held_out_annotators = pseudonyms[1]
        feedback, held_out = prompts[0], prompts[1]
    groups = {
        "feedback_annotators": feedback_annotators,
        "held_out_annotators": held_out_annotators,
        "feedback_prompt_ids": [prompt_id(p) for p in dict.fromkeys(feedback)],
        "held_out_prompt_ids": [prompt_id(p) for p in dict.fromkeys(held_out)],
    }
    return export_project(session.store, out, groups, extra)


def judgments_digest(store: Store) -> str:
    """A hash of everything people said in a project: what later stages depend on."""
    import sqlalchemy as sa

    from annotation import schema
    from reelhf.hashing import content_hash

    with store.read() as connection:
        rows = connection.execute(sa.select(schema.judgment).order_by(schema.judgment.c.id))
        return content_hash([[str(value) for value in row] for row in rows])


def add_before_after_tasks(store: Store, comparisons: Sequence[Path]) -> list[int]:
    """Blind tasks for a person: each holds clips of one prompt from before and after RLHF, in random order."""
    from annotation.records import ClipRecord

    groups = []
    for folder in comparisons:
        comparison = json.loads((folder / "comparison.json").read_text())
        for pair in comparison["pairs"]:
            records = [
                ClipRecord(
                    path=folder / path,
                    prompt=pair["prompt"],
                    model="toy",
                    stage=f"{comparison['role']}_{side}_rlhf",
                    language=language_of(pair["prompt"]),
                    seed=pair["seed"] + draw,
                )
                for side in ("before", "after")
                for draw, path in enumerate(pair["clips"][side])
            ]
            groups.append(store.add_clips(records, project="before and after"))
    # where a run kept its start, before and after are the same files: there is nothing to judge
    different = [group for group in groups if len(set(group)) == len(group)]
    return store.create_tasks(different, round_number=1)


def language_of(prompt: str) -> str:
    """`zh` if any character is Chinese, else `en`."""
    return "zh" if any("\u4e00" <= character <= "\u9fff" for character in prompt) else "en"

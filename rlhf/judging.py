"""The loop's annotation step: candidate clips become tasks, annotators judge them over HTTP, verdicts become preference data.

Here the annotators are simulated; `rlhf.human_judging` has a person. Two groups never meet: the first judges the feedback prompts,
from which the rewards learn that RLHF maximises; the second judges the held-out prompts, from which the held-out rewards learn that
only watch.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveInt

from reelhf.config import Config
from rlhf.candidates import read_manifest

if TYPE_CHECKING:
    from annotation.store import Store
    from rlhf.compare import Gold

PROJECT, PREFERENCES, SUMMARY = "project", "preferences", "judging.json"
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

    @classmethod
    def of(
        cls, annotators: Sequence[Sequence[str] | None], prompts: Sequence[Sequence[str]]
    ) -> Groups:
        """From the pseudonyms and the prompts' texts, each for feedback and held out."""
        from annotation.records import prompt_id

        who = [None if names is None else tuple(names) for names in annotators]
        what = [tuple(prompt_id(text) for text in dict.fromkeys(texts)) for texts in prompts]
        return cls(who[0], who[1], what[0], what[1])


def read_groups(folder: Path) -> Groups:
    """What `export_project` wrote beside the preferences."""
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
        extra = {"panels": counts, "spread": spread}
        return export_project(store, out, Groups.of(pseudonyms, prompts), extra)


def shown_spread(candidates: Path, gold: Gold) -> dict[str, float]:
    """Dimension -> standard deviation of gold between the clips of one task, averaged over tasks.

    The unit of the simulated annotators' noise: a person tells apart what is shown side by side, on whatever scale it differs.
    """
    from reelhf.progress import track
    from reelhf.video import read_videos

    rows = read_manifest(candidates)
    tasks = sorted({row["task"] for row in rows})[:: max(1, len(rows) // _SPREAD_CLIPS)]
    rows = [row for row in rows if row["task"] in tasks]
    measured: dict[int, list[Mapping[str, float]]] = {}
    shown = zip(rows, read_videos(row["path"] for row in rows), strict=True)
    for row, (frames, fps) in track(shown, label="spread of the clips shown", total=len(rows)):
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
        name, password = f"simulated {profile.name}", secrets.token_urlsafe(12)
        account = store.find_user(name)
        if account is None:
            account = store.add_user(name, password, simulated=True)
        else:  # an interrupted run made it
            store.set_password(name, password)
        credentials[profile.name] = (name, password)
        pseudonyms.append(account.pseudonym)
    with running_server(create_app(store, page=False)) as url:
        counts = run_annotators(
            url, credentials, panel, gold=gold, seed=seed, spread=TYPICAL_SPREAD | (spread or {})
        )
    return pseudonyms, counts


def export_project(store: Store, out: Path, groups: Groups, extra: Mapping[str, Any]) -> Path:
    """Preference data, and a summary with the groups and the project's counts, beside the project."""
    from annotation.export import ExportQuery, export_preferences

    shutil.rmtree(out / PREFERENCES, ignore_errors=True)
    export_preferences(store, out / PREFERENCES, ExportQuery(include_implied=True))
    summary = {"groups": asdict(groups), "counts": store.counts(), **extra}
    (out / SUMMARY).write_text(json.dumps(summary, indent=1, default=str))
    return out


def language_of(prompt: str) -> str:
    """`zh` if any character is Chinese, else `en`."""
    return "zh" if any("\u4e00" <= character <= "\u9fff" for character in prompt) else "en"

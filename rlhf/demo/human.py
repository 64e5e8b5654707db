"""A person as the loop's annotator: the page opens, the loop waits, and goes on with what they said."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from annotation.api.server import running_server
from rlhf.demo.options import DemoOptions
from rlhf.demo.printing import print_tunnel
from rlhf.human_judging import assign, export_human, human_app, verdicts_key, wait_for_human
from rlhf.rounds import Judge, LoopConfig
from rlhf.stages import Stage, StageRunner
from rlhf.world import World

KEY_FILE = "candidates.key"
"""Beside a project: which clips it was made of."""


def human_judge(options: DemoOptions, config: LoopConfig, world: World, pages: ExitStack) -> Judge:
    """A judge that serves the annotation page, waits until its tasks are done, and goes on.

    Args:
        pages: keeps the page open until it is closed, or until the next round opens its own.
    """

    def judge(runner: StageRunner, suffix: str, candidates: Stage) -> Stage:
        pages.close()  # the page of the round before: there is one port
        started = time.monotonic()
        out = own_folder(options.out / f"project{suffix}", candidates.key)
        assignment = assign(
            config.judging,
            out,
            candidates.path,
            prompts=(world.prompts.feedback, world.prompts.held_out),
            top_up=options.top_up,
        )
        store = pages.enter_context(assignment.store)
        app = human_app(store, wanted=assignment.num_tasks)
        url = pages.enter_context(running_server(app, port=options.port))
        print_turn(assignment.num_tasks, url + app.state.sign_in_link(assignment.account))
        print_tunnel([options.port])
        wait_for_human(assignment, print)
        export_human(
            assignment,
            config.judging,
            candidates=candidates.path,
            gold=world.annotator_view(candidates.path) if options.top_up else None,
            out=out,
        )
        return runner.adopt(
            f"annotation{suffix}",
            out,
            key=verdicts_key(store, out),
            seconds=time.monotonic() - started,
        )

    return judge


def print_turn(num_tasks: int, link: str) -> None:
    print(
        f"\n      Your turn: judge {num_tasks} tasks (about {num_tasks} minutes) at\n\n        {link}\n"
    )


def own_folder(folder: Path, key: str) -> Path:
    """`folder`, for the project of the candidates with this key: new, or as it was left.

    A project of other candidates is moved aside, never overwritten, and comes back when its candidates do.
    """
    if folder.exists() and _key(folder) != key:
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(aside)
        print(f"      the project of other clips is kept in {aside}")
    if not folder.exists():
        kept = (old for old in folder.parent.glob(f"{folder.name}.*") if _key(old) == key)
        if (earlier := next(kept, None)) is not None:
            earlier.rename(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / KEY_FILE).write_text(key)
    return folder


def _key(folder: Path) -> str | None:
    stamp = folder / KEY_FILE
    return stamp.read_text() if stamp.is_file() else None

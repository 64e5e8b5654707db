"""One run of the demo, from the checks to the pages."""

from __future__ import annotations

import io
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from reelhf.clips import cache_folder
from rlhf.demo.checks import check_first
from rlhf.demo.options import DemoOptions, load_loop_config

if TYPE_CHECKING:
    from rlhf.rounds import LoopConfig
    from rlhf.world import World


def run_demo(options: DemoOptions) -> Path:
    """Check, run every stage, write the report, and serve the pages if asked. Returns the report's path."""
    from rlhf.stages import StageFailed

    check_first(options)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a log file should show a stage when it begins
        sys.stdout.reconfigure(line_buffering=True)
    try:
        return _run(options)
    except StageFailed as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        print(
            "\nstopped. Run the same command again: finished stages are skipped, an interrupted one continues where it can.",
            file=sys.stderr,
        )
        raise


def _run(options: DemoOptions) -> Path:
    from rlhf.demo.human import human_judge
    from rlhf.demo.pages import serve_pages
    from rlhf.demo.printing import print_end, print_plan
    from rlhf.demo.record import describe
    from rlhf.report import RECORD, write_report
    from rlhf.rounds import run_loop, simulated_judge
    from rlhf.stages import StageRunner

    started = time.monotonic()
    config = load_loop_config(options)
    world = make_world(options, config)
    write_prompts(world, options.out / "prompts")
    runner = StageRunner(cache_folder(), config.budget_seconds, links=options.out)
    print_plan(options, config)
    with ExitStack() as pages:
        judge = (
            simulated_judge(config, world)
            if options.annotator == "simulated"
            else human_judge(options, config, world, pages)
        )
        made, rounds = run_loop(config, world, runner, judge)
        record = describe(options, config, world, runner, made, rounds[-1])
        (options.out / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False))
        report = write_report(options.out)
        print_end(config, runner, record, report, time.monotonic() - started)
        if options.serve:
            serve_pages(options, rounds[-1], pages)
    return report


def make_world(options: DemoOptions, config: LoopConfig) -> World:
    """The toy world, or the folder of real clips."""
    from rlhf.world import real_world, toy_world

    if options.clips is None:
        return toy_world(config.prompts, config.clips.variety)
    simulated = options.annotator == "simulated"
    return real_world(config.prompts, options.clips, corrupted_candidates=simulated)


def write_prompts(world: World, folder: Path) -> None:
    """The prompts of each use as text files, for the commands that take one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in vars(world.prompts).items():
        lines = "\n".join(dict.fromkeys(prompts)) + "\n"
        (folder / f"{name}.txt").write_text(lines, encoding="utf-8")

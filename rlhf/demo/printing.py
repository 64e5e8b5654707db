"""What the demo says in the terminal, apart from the stages' own lines."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reelhf.clips import cache_folder
from rlhf.demo.options import DemoOptions

if TYPE_CHECKING:
    from rlhf.rounds import LoopConfig
    from rlhf.stages import StageRunner


def print_plan(options: DemoOptions, config: LoopConfig) -> None:
    print(
        f"ReelHF, {options.preset or options.config}: about {config.total_budget_seconds / 60:.0f} minutes on 2 CPU cores the first time. "
        f"Finished stages are kept in {cache_folder()}."
    )


def print_end(
    config: LoopConfig,
    runner: StageRunner,
    record: dict[str, Any],
    report: Path,
    wall_seconds: float,
) -> None:
    """Seconds per stage against the budget, the checks, and where the report lies."""
    print_stages(config, runner)
    print(f"this run: {wall_seconds:.0f} s\n")
    for run in ("base", "refiner"):
        folder = report.parent / record["artefacts"][f"compare_{run}"]
        print_checks(run, json.loads((folder / "comparison.json").read_text())["checks"])
    print(f"\nreport: {report}")


def print_stages(config: LoopConfig, runner: StageRunner) -> None:
    """One line per stage, and their sum."""
    print(f"\n{'stage':<24}{'seconds':>9}{'budget':>9}{'peak GB':>9}")
    for stage in runner.stages.values():
        budget = config.budget_seconds.get(stage.name)
        remark = " over" if budget and stage.seconds > budget else ""
        remark += f" ({stage.beside_seconds:.0f} beside)" if stage.beside_seconds else ""
        remark += " (cached)" if stage.cached else ""
        print(
            f"{stage.name:<24}{stage.seconds:>9.1f}{f'{budget:.0f}' if budget else '':>9}"
            f"{stage.peak_bytes / 1e9:>9.2f}{remark}"
        )
    peak = max(stage.peak_bytes for stage in runner.stages.values())
    print(
        f"{'all stages':<24}{runner.seconds:>9.1f}{config.total_budget_seconds:>9.0f}{peak / 1e9:>9.2f}"
    )


def print_checks(run: str, checks: Sequence[dict[str, Any]]) -> None:
    statuses = [check["status"] for check in checks]
    failed = [check["measure"] for check in checks if check["status"] == "fail"]
    line = f"{run}: {statuses.count('pass')} of {len(statuses) - statuses.count('not_measured')} checks passed"
    print(line + (f"; not shown: {', '.join(failed)}" if failed else ""))


def print_tunnel(ports: Sequence[int]) -> None:
    """Over SSH: the line that brings the pages to the other end."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    if len(connection) == 4:
        forwards = " ".join(f"-L {port}:127.0.0.1:{port}" for port in ports)
        user = os.environ.get("USER", "user")
        print(
            f"You are connected over SSH. On your own machine run:\n\n  ssh {forwards} {user}@{connection[2]}\n"
        )

"""Does the demo stay within its time and memory, from an empty cache and again from a full one?

    python benchmarks/demo_budget.py [--preset standard|smoke]

Runs `reelhf demo --no-serve` twice with a cache of its own and prints a Markdown table of seconds and peak memory per stage.
Run it on an idle machine with the number of cores the budget is stated for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

AGAIN_SECONDS = 120
"""A second run, from cache up to the pages."""


def run(preset: str, folder: Path) -> float:
    """Wall seconds of one run; its output passes through."""
    started = time.monotonic()
    words = ["demo", "--preset", preset, "--no-serve", "--out", str(folder / "demo")]
    environment = os.environ | {"REELHF_CACHE": str(folder / "cache")}
    subprocess.run([sys.executable, "-m", "reelhf", *words], check=True, env=environment)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=("standard", "smoke"), default="standard")
    preset = parser.parse_args().preset
    with tempfile.TemporaryDirectory(prefix="reelhf-budget-") as name:
        folder = Path(name)
        first, again = run(preset, folder), run(preset, folder)
        record = json.loads((folder / "demo" / "loop.json").read_text())
    peak = max(stage["peak_bytes"] for stage in record["stages"])
    print(f"\n{record['machine']}, commit {record['commit']}, preset {preset}\n")
    print("| stage | seconds | budget | peak GB |\n|---|---|---|---|")
    for stage in record["stages"]:
        budget = "" if stage["budget"] is None else f"{stage['budget']:.0f}"
        print(
            f"| {stage['name']} | {stage['seconds']:.1f} | {budget} | {stage['peak_bytes'] / 1e9:.2f} |"
        )
    print(
        f"| first run, wall | {first:.0f} | {record['total_budget_seconds']:.0f} | {peak / 1e9:.2f} |"
    )
    print(f"| again, from cache | {again:.0f} | {AGAIN_SECONDS} | |")
    within = first <= record["total_budget_seconds"] and again <= AGAIN_SECONDS
    within = within and peak <= record["memory_budget_bytes"]
    print("\nwithin the budget" if within else "\nOVER the budget")
    raise SystemExit(0 if within else 1)


if __name__ == "__main__":
    main()

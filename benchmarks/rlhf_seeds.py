"""Does RLHF improve the generator whatever the training seed? The demo's loop with several, everything before RLHF shared.

    python benchmarks/rlhf_seeds.py --out runs/rlhf_seeds [--config configs/loop/demo_standard.yaml] [--seeds 0 1 2]

Rewards, weights, prompts, noise of the comparison and checks are the same for every seed and fixed beforehand. Writes
`results.json` and prints a Markdown table: per run and measure the difference of every seed, its interval, and the verdict.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from reelhf.clips import cache_folder
from reelhf.config import load_config
from rlhf.demo.provenance import commit, machine
from rlhf.report import measure_label
from rlhf.rounds import LoopConfig, run_loop
from rlhf.stages import StageRunner
from rlhf.world import toy_world


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/loop/demo_standard.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/rlhf_seeds"))
    parser.add_argument(
        "overrides", nargs="*", help="config overrides, such as rlhf_base.num_steps=20"
    )
    arguments = parser.parse_args()
    config = load_config(LoopConfig, arguments.config, arguments.overrides)
    world = toy_world(config.prompts, config.clips.variety)
    checks: dict[str, dict[str, list[dict]]] = {"base": {}, "refiner": {}}
    for seed in arguments.seeds:
        runner = StageRunner(
            cache_folder(), config.budget_seconds, links=arguments.out / f"seed_{seed}"
        )
        _, rounds = run_loop(config.model_copy(update={"seed": seed}), world, runner)
        for name, stage in (
            ("base", rounds[-1].compare_base),
            ("refiner", rounds[-1].compare_refiner),
        ):
            comparison = json.loads((stage.path / "comparison.json").read_text())
            for check in comparison["checks"]:
                checks[name].setdefault(check["measure"], []).append(check)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine(), "commit": commit(), "seeds": arguments.seeds, "checks": checks}
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\n{results['machine']}, commit {results['commit']}, config {arguments.config}\n")
    print(table(checks, arguments.seeds))


def table(checks: dict[str, dict[str, list[dict]]], seeds: list[int]) -> str:
    """Markdown: one row per run and measure, one column per seed."""
    lines = [
        "| run | measure | must | " + " | ".join(f"seed {seed}" for seed in seeds) + " | passed |"
    ]
    lines.append("|---" * (len(seeds) + 4) + "|")
    for run, measures in checks.items():
        for measure, results in measures.items():
            must = (
                "rise"
                if results[0]["rule"] == "rises"
                else f"stay above {results[0]['threshold']:+.3f}"
            )
            cells = [
                f"{r['difference']:+.3f} ({r['low']:+.3f} to {r['high']:+.3f})" for r in results
            ]
            passed = sum(r["status"] == "pass" for r in results)
            lines.append(
                f"| {run} | {measure_label(measure)} | {must} | {' | '.join(cells)} | {passed} of {len(results)} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""The record of a run, `loop.json`: what the report and the review page read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from annotation.records import PreferenceData, read_preferences
from reelhf.config import to_yaml
from reelhf.run import read_metrics
from rlhf.demo.options import DemoOptions
from rlhf.demo.provenance import commit, machine
from rlhf.judging import PREFERENCES, SUMMARY
from rlhf.report import RECORD_VERSION
from rlhf.rounds import GeneratorStages, LoopConfig, RoundStages, run_folder
from rlhf.stages import StageRunner
from rlhf.world import World

WHO_JUDGED = {
    "simulated": "Simulated annotators with stated noise, bias and carelessness judged every task over the same HTTP interface "
    "as the page. One half judged the prompts of the rewards, the other half those of the held-out rewards.",
    "human": "You judged in the browser.",
}
NOTE_ALL_HUMAN = (
    "All verdicts are yours. That is few for six reward models; and one person judged for the rewards and for the held-out "
    "rewards (other prompts), so the two are less independent than in a run with several annotators."
)
NOTE_TOP_UP = (
    "You judged part of the feedback tasks; simulated annotators judged the rest. "
    "Their votes are marked in every table."
)


def describe(
    options: DemoOptions,
    config: LoopConfig,
    world: World,
    runner: StageRunner,
    made: GeneratorStages,
    last: RoundStages,
) -> dict[str, Any]:
    """The record; paths in it are relative to `options.out`."""
    where = "toy world" if world.clips is None else f"real clips ({world.clips.name})"
    return {
        "schema_version": RECORD_VERSION,
        "title": f"{config.title}: {where}",
        "preset": options.preset,
        "command": options.command_line,
        "created": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "machine": machine(),
        "commit": commit(),
        "config": to_yaml(config),
        "notes": [*world.notes, *judging_notes(options)],
        "annotation": annotation_facts(options, last.judging.path),
        "generator_facts": generator_facts(made),
        "stages": stage_rows(config, runner),
        "total_budget_seconds": config.total_budget_seconds,
        "memory_budget_bytes": config.memory_budget_bytes,
        "artefacts": {
            name: os.path.relpath(path, options.out) for name, path in artefacts(made, last).items()
        },
    }


def artefacts(made: GeneratorStages, last: RoundStages) -> dict[str, Path]:
    """Name -> folder of everything a reader may want to open."""
    found = {
        "base": made.base.path,
        "refiner": made.refiner.path,
        "student": made.student.path,
        "vae": made.vae.path,
        "rlhf_base": run_folder(last.rlhf_base),
        "rlhf_refiner": run_folder(last.rlhf_refiner),
        "compare_base": last.compare_base.path,
        "compare_refiner": last.compare_refiner.path,
        "rewards": last.rewards.path,
        "rewards_evaluation": last.rewards_evaluation.path,
        "held_out_rewards": last.held_out_rewards.path,
        "held_out_evaluation": last.held_out_evaluation.path,
        "annotation": last.judging.path,
    }
    if last.gold_base is not None and last.gold_refiner is not None:
        found |= {"gold_base": last.gold_base.path, "gold_refiner": last.gold_refiner.path}
    return found


def stage_rows(config: LoopConfig, runner: StageRunner) -> list[dict[str, Any]]:
    """Time and memory of each stage beside its budget."""
    return [
        {
            "name": stage.name,
            "seconds": stage.seconds,
            "beside_seconds": stage.beside_seconds,
            "budget": config.budget_seconds.get(stage.name),
            "cached": stage.cached,
            "attempts": stage.attempts,
            "peak_bytes": stage.peak_bytes,
        }
        for stage in runner.stages.values()
    ]


def judging_notes(options: DemoOptions) -> list[str]:
    """What the verdicts' origin means for the results."""
    if options.annotator == "simulated":
        return []
    return [NOTE_TOP_UP if options.top_up else NOTE_ALL_HUMAN]


def annotation_facts(options: DemoOptions, judging: Path) -> dict[str, Any]:
    """Who judged, and counts of the verdicts."""
    counts = json.loads((judging / SUMMARY).read_text())["counts"]
    data = read_preferences(judging / PREFERENCES)
    return {
        "judgments": counts["judgments"],
        "annotators": len({row["annotator"] for row in data.judgments}),
        "summary": WHO_JUDGED[options.annotator],
        "facts": count_rows(counts, data),
    }


def count_rows(counts: Mapping[str, int], data: PreferenceData) -> list[list[Any]]:
    """Label and value of each count."""
    final = [row for row in data.judgments if row["pick"] == "final"]
    vetoed = sum(row["pick"] == "first" for row in data.judgments)
    explicit = sum(row["kind"] == "explicit" for row in data.preferences)
    implied = len(data.preferences) - explicit
    return [
        ["tasks of four clips", counts["tasks"]],
        ["judgments (task and annotator)", counts["judgments"]],
        ["of them simulated", counts["simulated_judgments"]],
        ["answers (one per dimension)", len(final)],
        ["answered as a tie", _share(sum(row["tie"] for row in final), len(final))],
        ["first picks vetoed by the admissibility rule (kept, marked)", _share(vetoed, len(final))],
        ["preference pairs, explicit and implied", f"{explicit} and {implied}"],
    ]


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.0%})" if whole else "0"


def generator_facts(made: GeneratorStages) -> list[list[str]]:
    """Figures of the generator's own training: label, value, meaning."""
    measured = read_metrics(run_folder(made.vae))[-1]
    distilled = json.loads((run_folder(made.student) / "distill.json").read_text())
    return [vae_fact(measured), *student_facts(distilled)]


def vae_fact(measured: Mapping[str, float]) -> list[str]:
    shape = measured.get("held_out/foreground_psnr", float("nan"))
    return [
        "VAE, rebuilt held-out clips",
        f"{measured['held_out/psnr']:.1f} dB",
        f"peak signal-to-noise ratio at the refined size, whole frames; the moving shape alone {shape:.1f} dB; "
        f"at half the size {measured['held_out/half_size_psnr']:.1f} dB",
    ]


def student_facts(distilled: Mapping[str, Any]) -> list[list[str]]:
    """How near the accelerated refiner came to its teacher (`distill.json`)."""
    low, high = distilled["interval"]
    distance, evaluations = distilled["distance_to_teacher"], distilled["nfe"]["student"]
    verdict = "closer" if distilled["student_is_closer"] else "NOT shown to be closer"
    return [
        [
            "Accelerated refiner, distance to the teacher's full output",
            f"{distance['student']:.3f}",
            f"at {evaluations:.0f} evaluations; the teacher itself at as few: {distance['teacher_few_steps']:.3f}",
        ],
        [
            "How much closer the student is",
            f"{distilled['difference']:+.3f}",
            f"paired interval {low:+.3f} to {high:+.3f} over {distilled['num_prompts']} held-out prompts, equal noise; {verdict}",
        ],
    ]

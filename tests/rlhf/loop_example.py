"""A finished loop with made-up numbers, in the very files a real one leaves."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from reelhf.video import write_video
from rlhf.report import RECORD

DIMENSIONS = ("prompt_following", "structural_stability", "motion_quality", "aesthetic_quality")


def write_example_loop(folder: Path, *, gold: bool = True, size: int = 32) -> Path:
    """A small finished loop with made-up numbers, in the very files a real one leaves."""
    rng = random.Random(0)
    for run in ("base", "refiner"):
        _write_run(folder / f"rlhf_{run}", rng)
        _write_comparison(folder / f"compare_{run}", run, gold, size)
        if gold:
            (folder / f"gold_{run}").mkdir(parents=True)
            rows = [
                {
                    "step": step,
                    "n": 8,
                    **{f"gold/{d}": 0.5 + step / 100 for d in (*DIMENSIONS, "composite")},
                }
                for step in (0, 10, 20)
            ]
            (folder / f"gold_{run}" / "gold_curve.json").write_text(json.dumps(rows))
    for name in ("rewards_evaluation", "held_out_evaluation"):
        (folder / name).mkdir()
        one = {
            "accuracy": 0.68,
            "interval": [0.61, 0.74],
            "n": 211,
            "explicit_accuracy": 0.78,
            "explicit_n": 57,
            "chance": 0.5,
            "stage_identity": 0.5,
        }
        one |= {"sharpness": 0.56, "ceiling": 0.86}
        (folder / name / "evaluation.json").write_text(
            json.dumps({"dimensions": dict.fromkeys(DIMENSIONS, one)})
        )
    record = {
        "schema_version": 1,
        "title": "One round of the loop, toy world",
        "created": "2026-01-01 12:00",
        "machine": "2 CPU cores",
        "commit": "abc1234",
        "command": "reelhf demo --preset standard",
        "config": "preset: standard\n",
        "notes": [],
        "total_budget_seconds": 1200,
        "annotation": {
            "judgments": 960,
            "annotators": 8,
            "summary": "Simulated annotators over HTTP.",
            "facts": [["tasks", 120], ["slot chi-square p", 0.4]],
        },
        "generator_facts": [["VAE PSNR", "31.2 dB", "whole frames, held-out clips"]],
        "stages": [
            {
                "name": n,
                "seconds": s,
                "budget": b,
                "cached": False,
                "attempts": 1,
                "peak_bytes": 2.1e9,
            }
            for n, s, b in (("vae", 55.0, 60.0), ("base", 252.0, 240.0), ("rewards", 90.0, None))
        ],
        "artefacts": {
            **{
                f"{kind}_{run}": f"{kind}_{run}"
                for kind in ("rlhf", "compare")
                for run in ("base", "refiner")
            },
            **({f"gold_{run}": f"gold_{run}" for run in ("base", "refiner")} if gold else {}),
            "rewards_evaluation": "rewards_evaluation",
            "held_out_evaluation": "held_out_evaluation",
        },
    }
    (folder / RECORD).write_text(json.dumps(record))
    return folder


def _write_run(run: Path, rng: random.Random) -> None:
    run.mkdir(parents=True)
    lines = []
    for step in range(31):
        row = {"step": step, "attempt": 1}
        for dimension in (*DIMENSIONS, "total"):
            row[f"reward/{dimension}"] = row[f"z/{dimension}"] = step / 30 + rng.gauss(0, 0.2)
            if step % 10 == 0:
                row["best/step"] = min(step, 20)
                for kind in ("validation", "held_out"):
                    row[f"{kind}/{dimension}"] = row[f"{kind}_z/{dimension}"] = step / 30
        lines.append(json.dumps(row))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def _write_comparison(folder: Path, run: str, gold: bool, size: int) -> None:
    folder.mkdir(parents=True)
    frames = torch.rand(3, 5, size, size)
    for side in ("before", "after"):
        write_video(folder / "pairs" / f"00_{side}.mp4", frames, 8.0)
    checks = [
        {"measure": "reward/total", "rule": "rises", "threshold": 0.0, "status": "pass"}
        | {"before": 0.1, "after": 0.5, "difference": 0.4, "low": 0.3, "high": 0.5},
        {
            "measure": "reward/motion_quality",
            "rule": "does_not_fall",
            "threshold": -0.1,
            "status": "fail",
        }
        | {"before": 0.1, "after": 0.0, "difference": -0.1, "low": -0.2, "high": 0.02},
        {
            "measure": "gold/composite",
            "rule": "rises",
            "status": "not_measured",
            "reason": "real clips have no gold",
        },
    ]
    if gold:
        checks[2] = checks[0] | {
            "measure": "gold/composite",
            "difference": 0.04,
            "low": 0.02,
            "high": 0.06,
        }
    measures = {
        "held_out/total": {
            "before": 0.0,
            "after": 0.2,
            "difference": 0.2,
            "low": 0.1,
            "high": 0.3,
            "n": 64,
        }
    }
    main = "gold/composite" if gold else "held_out/total"
    pair = {"prompt": "A red <ring>.", "seed": 7}
    pair["clips"] = {side: [f"pairs/00_{side}.mp4"] for side in ("before", "after")}
    comparison = {
        "schema_version": 1,
        "role": run,
        "fps": 8.0,
        "num_frames": 5,
        "num_prompts": 64,
        "seeds_per_prompt": 2,
        "unit": "prompt",
        "resamples": 4000,
        "confidence": 0.95,
        "has_gold": gold,
        "measures": measures,
        "checks": checks,
        "pairs": [pair | {"measures": {main: [0.4, 0.6]}}],
    }
    (folder / "comparison.json").write_text(json.dumps(comparison))

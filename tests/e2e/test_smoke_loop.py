"""The whole loop, small: every step real, the results where they should be, and a second run that trains nothing again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reelhf.run import read_metrics, verify

ROOT = Path(__file__).resolve().parents[2]
BUDGET_SECONDS = 180
DIMENSIONS = {"prompt_following", "structural_stability", "motion_quality", "aesthetic_quality"}


def run_demo(out: Path, cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "REELHF_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "reelhf",
            "demo",
            "--preset",
            "smoke",
            "--no-serve",
            "--out",
            str(out),
            *words,
        ],
        cwd=out.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One smoke demo in a private cache: (its folder, its cache, its output)."""
    folder = tmp_path_factory.mktemp("smoke")
    out, cache = folder / "demo", folder / "cache"
    done = run_demo(out, cache)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return out, cache, done.stdout


def test_every_stage_is_timed_and_the_report_is_named(demo):
    out, _, printed = demo
    record = json.loads((out / "loop.json").read_text())
    names = [stage["name"] for stage in record["stages"]]
    assert names[:6] == ["clips", "text_encoder", "vae", "base", "refiner", "student"]
    assert {"annotation", "rewards", "held_out_rewards", "rlhf_base", "rlhf_refiner"} <= set(names)
    assert all(stage["seconds"] > 0 and not stage["cached"] for stage in record["stages"])
    assert "all stages" in printed
    assert f"report: {out / 'report.html'}" in printed
    assert max(stage["peak_bytes"] for stage in record["stages"]) < 6e9


def test_the_database_holds_every_judgment_and_marks_it_simulated(demo):
    from annotation.records import read_preferences
    from annotation.store import Store

    out, _, _ = demo
    with Store.open(out / "annotation" / "project", create=False) as store:
        counts = store.counts()
    assert counts["tasks"] == 12 + 8
    assert counts["judgments"] == counts["simulated_judgments"] == 2 * counts["tasks"]
    data = read_preferences(out / "annotation" / "preferences")
    assert {row["dimension"] for row in data.preferences} == DIMENSIONS
    assert all(row["simulated"] for row in data.preferences)
    stages = {row["stage"] for row in data.clips}
    assert stages == {"base", "refiner"}


def test_the_two_panels_share_neither_annotators_nor_prompts(demo):
    from rlhf.judging import read_groups

    groups = read_groups(demo[0] / "annotation")
    assert groups.feedback_annotators
    assert not set(groups.feedback_annotators) & set(groups.held_out_annotators or ())
    assert not set(groups.feedback_prompt_ids) & set(groups.held_out_prompt_ids)


def test_rewards_are_measured_beside_chance_baselines_and_ceiling(demo):
    for name in ("rewards_evaluation", "held_out_evaluation"):
        evaluation = json.loads((demo[0] / name / "evaluation.json").read_text())
        assert set(evaluation["dimensions"]) == DIMENSIONS
        for measured in evaluation["dimensions"].values():
            assert measured["n"] > 0
            assert 0 <= measured["accuracy"] <= 1
            assert None not in (measured["chance"], measured["sharpness"], measured["ceiling"])


def test_backbones_are_pre_trained_while_verdicts_are_given(demo):
    rows = {row["name"]: row for row in json.loads((demo[0] / "loop.json").read_text())["stages"]}
    beside = {name for name, row in rows.items() if row["beside_seconds"] > 0}
    assert beside
    assert beside <= {"annotation", "reward_backbones"}


@pytest.mark.parametrize(("run", "before"), [("rlhf_base", "base"), ("rlhf_refiner", "student")])
def test_rlhf_changes_the_weights_and_leaves_curves(demo, run, before):
    out, _, _ = demo
    best = (out / run).resolve()
    folder = best.parent
    verify(best)
    trained = load_file(folder / "last" / "denoiser.safetensors")
    start = load_file(out / before / "denoiser.safetensors")
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    rows = read_metrics(folder)
    for dimension in DIMENSIONS:
        assert sum(f"reward/{dimension}" in row for row in rows) >= 4
        assert sum(f"held_out/{dimension}" in row for row in rows) >= 2


def test_both_runs_are_compared_on_the_test_prompts_with_intervals(demo):
    for run in ("base", "refiner"):
        comparison = json.loads((demo[0] / f"compare_{run}" / "comparison.json").read_text())
        assert comparison["role"] == run
        assert comparison["num_prompts"] == 8
        assert {f"gold/{d}" for d in DIMENSIONS} <= set(comparison["measures"])
        assert {f"held_out/{d}" for d in DIMENSIONS} <= set(comparison["measures"])
        for check in comparison["checks"]:
            assert check["low"] <= check["difference"] <= check["high"]
            assert check["status"] == ("pass" if check["low"] > check["threshold"] else "fail")


def test_gold_is_measured_along_both_curves(demo):
    for run in ("base", "refiner"):
        rows = json.loads((demo[0] / f"gold_{run}" / "gold_curve.json").read_text())
        assert len(rows) >= 2
        assert rows[0]["step"] == 0
        assert {f"gold/{d}" for d in DIMENSIONS} < set(rows[0])


def test_the_report_shows_curves_of_both_runs_and_the_clips(demo):
    page = (demo[0] / "report.html").read_text()
    assert "Curves of the base" in page
    assert "Curves of the accelerated refiner" in page
    assert page.count('class="chart"') >= 2 * (5 + 5)
    assert page.count("<video") == 2 * 2 * 3
    assert "https://" not in page


def test_a_second_run_trains_nothing_again(demo):
    out, cache, _ = demo
    done = run_demo(out, cache)
    assert done.returncode == 0, done.stderr[-3000:]
    stages = json.loads((out / "loop.json").read_text())["stages"]
    assert all(stage["cached"] for stage in stages)
    line = next(line for line in done.stdout.splitlines() if line.startswith("this run: "))
    assert float(line.split()[2]) < 60


def test_the_review_page_finds_the_loop(demo):
    from fastapi.testclient import TestClient

    from rlhf.review import create_review_app, find_runs

    root = demo[0].parent
    names = [one.name for one in find_runs(root)]
    assert {"demo: RLHF of the base", "demo: RLHF of the refiner"} <= set(names)
    client = TestClient(create_review_app(root))
    clip = client.get(f"/clip/{names[0]}", params={"file": "pairs/00_0_before.mp4"})
    assert clip.status_code == 200
    assert clip.headers["content-type"] == "video/mp4"
    escape = client.get(f"/clip/{names[0]}", params={"file": "../../../loop.json.mp4"})
    assert escape.status_code == 404
    assert "Did the base get better?" in client.get(f"/report/{names[0]}").text


@pytest.mark.slow
@pytest.mark.realdata
def test_real_clips_go_round_the_same_loop_and_the_report_says_there_is_no_gold(
    real_data, tmp_path
):
    out = tmp_path / "demo"
    done = run_demo(out, tmp_path / "cache", "--clips", str(real_data / "clips"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "they have no gold" in (out / "report.html").read_text()
    comparison = json.loads((out / "compare_base" / "comparison.json").read_text())
    assert not comparison["has_gold"]
    assert not any(name.startswith("gold/") for name in comparison["measures"])
    gold = [check for check in comparison["checks"] if check["measure"].startswith("gold/")]
    assert gold
    assert {check["status"] for check in gold} == {"not_measured"}
    assert not (out / "gold_base").exists()

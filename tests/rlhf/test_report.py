"""The report page: everything it shows comes from the loop's own files, and nothing from outside the page."""

from __future__ import annotations

import json
import re

import pytest
from loop_example import write_example_loop

from reelhf.errors import UserError
from rlhf.report import (
    RECORD,
    LoopRecord,
    curve_names,
    kept_step,
    render_page,
    reward_series,
    write_report,
)


def test_the_page_needs_nothing_from_outside(tmp_path):
    page = write_report(write_example_loop(tmp_path / "loop")).read_text()
    references = re.findall(r"(?:src|href|url)\s*[=(]\s*['\"]?([^'\")\s>]+)", page)
    assert references
    assert all(ref.startswith(("data:", "#")) for ref in references)
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_every_curve_of_both_runs_is_drawn(tmp_path):
    page = write_report(write_example_loop(tmp_path / "loop")).read_text()
    # per run: four dimensions and the composite, once as rewards and once as gold
    assert page.count('class="chart"') == 2 * 2 * 5
    assert page.count("<video") == 4


def test_a_failed_check_is_said_at_the_top(tmp_path):
    page = write_report(write_example_loop(tmp_path / "loop")).read_text()
    assert "4 of 6" in page
    assert "Not shown by this run: base: Motion quality (reward)" in page


def test_a_loop_without_gold_says_so_and_draws_none(tmp_path):
    page = write_report(write_example_loop(tmp_path / "loop", gold=False)).read_text()
    assert "real clips have no ground truth" in page
    assert page.count("not measured") == 2
    assert page.count('class="chart"') == 2 * 5


def test_prompts_are_text_not_markup(tmp_path):
    page = write_report(write_example_loop(tmp_path / "loop")).read_text()
    assert "A red &lt;ring&gt;." in page


def test_a_folder_without_a_loop_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no loop\.json"):
        write_report(tmp_path)


def test_a_record_of_another_version_is_refused(tmp_path):
    (tmp_path / RECORD).write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(UserError, match="version 99"):
        LoopRecord.read(tmp_path)


def test_curves_are_split_into_training_validation_and_held_out():
    rows = [{"step": 0, "reward/total": 0.1, "validation/total": 0.2, "held_out/total": 0.3}]
    rows[0] |= {
        "reward/motion_quality": 9.0,
        "z/motion_quality": 1.1,
        "validation_z/motion_quality": 1.2,
    }
    assert curve_names(rows, "reward") == ["motion_quality", "total"]
    assert [s.points for s in reward_series(rows, "total")] == [[(0, 0.1)], [(0, 0.2)], [(0, 0.3)]]
    assert [s.points for s in reward_series(rows, "motion_quality")] == [[(0, 1.1)], [(0, 1.2)]]


def test_the_kept_step_is_read_from_the_metrics():
    assert kept_step([{"step": 0}]) is None
    assert kept_step([{"best/step": 0.0}, {"best/step": 12.0}, {"step": 20}]) == 12


def test_both_kinds_of_pairs_have_a_verdict_of_their_own(tmp_path):
    """What people said may reach the target where what follows from it does not; the page says both."""
    page = write_report(write_example_loop(tmp_path / "loop")).read_text()
    row = next(line for line in page.split("<tr>") if "0.780" in line and "57 pairs" in line)
    said, every = row.split("<td class='n'>")[1:3]
    assert "0.780" in said
    assert ">pass<" in said
    assert "57 pairs" in said
    assert "0.680" in every
    assert ">fail<" in every
    assert "211 pairs, 0.61" in every


def test_page_lists_stage_seconds_against_the_budget(tmp_path):
    page = render_page(LoopRecord.read(write_example_loop(tmp_path / "loop")))
    row = re.search(r"<tr><td>base</td>.*?</tr>", page, re.S)
    assert row
    assert "fail" in row[0]
    assert "252.0" in row[0]

from __future__ import annotations

import csv
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from annotation import claims, export, preference_files
from annotation.export import ExportQuery, export_preferences
from annotation.pairs import best_worst_pairs, score_pairs, tie_pairs
from annotation.preference_files import csv_cell
from annotation.quality.agreement import agreement_by_dimension
from annotation.records import (
    Choice,
    ClipRecord,
    Verdict,
    read_preferences,
    split_of,
    write_preferences,
)
from annotation.store import Store
from reelhf.errors import UserError
from tests.annotation.annotation_cases import PASSWORD, SMALL, plain_verdict

ALL_PAIRS = ExportQuery(include_implied=True)


@given(st.integers(2, 6), st.data())
def test_best_and_worst_order_exactly_2k_minus_3_pairs(num_clips, data):
    best, worst = data.draw(st.permutations(range(num_clips)))[:2]
    pairs = best_worst_pairs(best, worst, num_clips)
    assert len(pairs) == len({frozenset((p.a, p.b)) for p in pairs}) == 2 * num_clips - 3
    assert [p.kind for p in pairs].count("explicit") == 1
    for utilities in range(3):
        rng = random.Random(utilities)
        middle = [rng.random() for _ in range(num_clips)]
        middle[best], middle[worst] = 2.0, -1.0
        assert all(middle[p.a] > middle[p.b] for p in pairs)


@given(st.integers(2, 6))
def test_a_tie_ties_every_pair_and_weighs_as_much_as_a_pick(num_clips):
    pairs = tie_pairs(num_clips, random.Random(0))
    assert len(pairs) == num_clips * (num_clips - 1) // 2
    assert all(p.preference == 0 for p in pairs)
    assert [p.kind for p in pairs].count("explicit") == 1


def test_equal_ratings_become_ties():
    found = {(p.a, p.b): (p.preference, p.kind) for p in score_pairs([3.0, 5.0, 5.0, 1.0], 1, 3)}
    assert found[1, 2] == (0, "implied")
    assert found[0, 1] == (-1, "implied")
    assert found[1, 3] == (1, "explicit")


def judge(store, name, verdict_of):
    account = store.find_user(name)
    while task := claims.claim(store, account, lease_seconds=60):
        claims.submit(
            store, account, task.presentation, f"key-{task.presentation}", verdict_of(task)
        )


def vetoed_verdict(task) -> Verdict:
    """First row free; second vetoed, then another pair; third vetoed, then none; fourth a tie."""
    a, b, c, d = task.dimensions
    free = {"first_best": 1, "first_worst": 0}
    return Verdict(
        (
            Choice(a, 0, 1),
            Choice(b, 2, 3, constrained=True, **free),
            Choice(c, status="no_valid_pair", **free),
            Choice(d, status="tie"),
        )
    )


def test_the_export_reads_back_with_every_clip_and_the_counts_of_its_manifest(
    new_project, tmp_path
):
    store = new_project(tasks=3, annotators=1)
    judge(store, "ann0", plain_verdict)
    data = read_preferences(export_preferences(store, tmp_path / "out", ALL_PAIRS))
    assert (len(data.clips), len(data.judgments), len(data.preferences)) == (12, 12, 60)
    assert data.manifest["guideline_version"] == store.guideline.version
    assert "include_implied=True" in data.manifest["source_query"]
    assert data.manifest["answers"] == {"ok": 12}
    for clip in data.clips:
        assert data.clip_path(clip["sha256"]).read_bytes()
        assert clip["model"].startswith("secretmodel")
    for judgment in data.judgments:
        assert judgment["best"] == 0
        assert judgment["worst"] == 1
        assert judgment["seconds"] == 4.0
        assert judgment["annotator"].startswith("annotator-")
        assert judgment["submitted_at"] >= judgment["shown_at"]
    by_id = {j["judgment_id"]: j for j in data.judgments}
    for row in data.preferences:
        judgment = by_id[row["judgment_ids"][0]]
        if row["kind"] == "explicit":
            winner = row["clip_a"] if row["preference"] > 0 else row["clip_b"]
            assert winner == judgment["candidates"][judgment["best"]]
            assert row["weight"] == 1.0
        else:
            assert row["weight"] < 1.0
        stage = {clip["sha256"]: clip["stage"] for clip in data.clips}
        assert row["same_stage"] == (stage[row["clip_a"]] == stage[row["clip_b"]])
    assert Counter(row["kind"] for row in data.preferences) == {"explicit": 12, "implied": 48}


def test_which_clip_is_a_says_nothing_of_which_is_better(new_project, tmp_path):
    store = new_project(tasks=40, annotators=1)
    judge(store, "ann0", plain_verdict)
    data = read_preferences(export_preferences(store, tmp_path / "out"))
    assert len(data.preferences) == 160
    assert {row["kind"] for row in data.preferences} == {"explicit"}
    wins_a = sum(row["preference"] > 0 for row in data.preferences)
    assert 55 < wins_a < 105  # 160 fair coins: 80 +- 4 standard deviations


def test_vetoed_constrained_and_tied_picks_keep_their_meaning(new_project, tmp_path):
    store = new_project(tasks=1, annotators=1)
    judge(store, "ann0", vetoed_verdict)
    data = read_preferences(export_preferences(store, tmp_path / "out", ALL_PAIRS))
    picks = Counter(
        (j["pick"], j["status"], j["admissible"], j["constrained"]) for j in data.judgments
    )
    assert picks == {
        ("final", "ok", True, False): 1,
        ("first", "vetoed", False, False): 2,
        ("final", "ok", True, True): 1,
        ("final", "no_valid_pair", False, False): 1,
        ("final", "tie", True, False): 1,
    }
    by_id = {j["judgment_id"]: j for j in data.judgments}
    kinds = Counter()
    for row in data.preferences:
        judgment = by_id[row["judgment_ids"][0]]
        assert (row["admissible"], row["constrained"]) == (
            judgment["admissible"],
            judgment["constrained"],
        )
        kinds[judgment["pick"], judgment["status"], row["constrained"], row["kind"]] += 1
    assert kinds == {
        ("final", "ok", False, "explicit"): 1,
        ("final", "ok", False, "implied"): 4,
        ("first", "vetoed", False, "explicit"): 2,
        ("first", "vetoed", False, "implied"): 8,
        ("final", "ok", True, "explicit"): 1,  # a constrained pick implies nothing
        ("final", "tie", False, "explicit"): 1,
        ("final", "tie", False, "implied"): 5,
    }
    assert data.manifest["answers"] == {
        "ok": 1,
        "vetoed": 2,
        "constrained": 1,
        "no_valid_pair": 1,
        "tie": 1,
    }


def test_simulated_judgments_are_marked_and_can_be_left_out(new_project, tmp_path):
    store = new_project(tasks=2, need=2, annotators=1)
    store.add_user("robot", PASSWORD, simulated=True)
    judge(store, "ann0", plain_verdict)
    judge(store, "robot", plain_verdict)
    both = read_preferences(export_preferences(store, tmp_path / "both"))
    assert Counter(j["simulated"] for j in both.judgments) == {True: 8, False: 8}
    human = read_preferences(
        export_preferences(store, tmp_path / "human", ExportQuery(exclude_simulated=True))
    )
    assert {j["simulated"] for j in human.judgments} == {False}
    assert "exclude_simulated=True" in human.manifest["source_query"]


def test_jsonl_says_the_same_as_parquet_and_the_same_store_exports_the_same(new_project, tmp_path):
    store = new_project(tasks=2, annotators=1)
    judge(store, "ann0", vetoed_verdict)
    parquet = read_preferences(export_preferences(store, tmp_path / "a"))
    jsonl = read_preferences(export_preferences(store, tmp_path / "b", fmt="jsonl"))
    assert parquet.preferences == jsonl.preferences
    assert parquet.judgments == jsonl.judgments
    again = read_preferences(export_preferences(store, tmp_path / "c"))
    assert again.manifest["files"] == parquet.manifest["files"]


def test_a_prompt_lies_in_one_split_whatever_the_round(new_project, tmp_path):
    store = new_project(tasks=3, annotators=1)
    judge(store, "ann0", plain_verdict)
    first = read_preferences(export_preferences(store, tmp_path / "a"))
    store.create_tasks([[1, 2, 3]], round_number=1)
    judge(store, "ann0", plain_verdict)
    second = read_preferences(export_preferences(store, tmp_path / "b"))
    assert {row["round"] for row in second.preferences} == {0, 1}
    for row in second.preferences:
        assert row["split"] == split_of(row["prompt_id"])
    only = read_preferences(export_preferences(store, tmp_path / "c", ExportQuery(min_round=1)))
    assert {row["round"] for row in only.preferences} == {1}
    assert len(first.preferences) < len(second.preferences)


def test_agreement_of_a_pair_counts_the_other_annotators(new_project, tmp_path):
    store = new_project(tasks=1, need=3, annotators=3)

    def by_clip(first, last):
        def verdict(task):
            order = {url: index for index, url in enumerate(media_of(store, task))}
            return plain_verdict(task, best=order[first], worst=order[last])

        return verdict

    judge(store, "ann0", by_clip(1, 2))
    judge(store, "ann1", by_clip(1, 2))
    judge(store, "ann2", by_clip(2, 1))
    data = read_preferences(export_preferences(store, tmp_path / "out"))
    assert sorted(row["agreement"] for row in data.preferences) == [0.0] * 4 + [0.5] * 8
    found = agreement_by_dimension(data.judgments)["motion_quality"]
    assert found.num_units == 5


def media_of(store, task):
    """Clip ids in the order shown (the test may look behind the tokens)."""
    from sqlalchemy import select

    from annotation import schema

    with store.read() as connection:
        return connection.execute(
            select(schema.presentation.c.clip_order).where(
                schema.presentation.c.token == task.presentation
            )
        ).scalar_one()


def test_an_answer_with_cannot_judge_yields_no_pair(new_project, tmp_path):
    store = new_project(tasks=1, annotators=1)

    def verdict(task):
        choices = plain_verdict(task).choices
        return Verdict(
            (replace(choices[0], best=None, worst=None, status="cannot_judge"), *choices[1:])
        )

    judge(store, "ann0", verdict)
    data = read_preferences(export_preferences(store, tmp_path / "out"))
    assert len(data.preferences) == 3
    assert Counter(j["status"] for j in data.judgments) == {"ok": 3, "cannot_judge": 1}


@pytest.mark.parametrize("fmt", ["parquet", "jsonl"])
def test_no_row_is_lost_where_batches_and_pages_meet(new_project, tmp_path, monkeypatch, fmt):
    """As many rows come out as without batches, whatever their size and however the rows arrive."""
    store = new_project(tasks=7, annotators=2, need=2)
    judge(store, "ann0", vetoed_verdict)
    judge(store, "ann1", plain_verdict)
    whole = read_preferences(export_preferences(store, tmp_path / "whole", ALL_PAIRS))
    for batch, page in ((1, 1), (3, 2), (5, 4)):
        monkeypatch.setattr(preference_files, "BATCH_ROWS", batch)
        monkeypatch.setattr(export, "PAGE_JUDGMENTS", page)
        monkeypatch.setattr(export, "PAGE_CLIPS", page)
        monkeypatch.setattr(export, "KEPT_TASKS", page)
        monkeypatch.setattr(export, "KEPT_CLIPS", 3 + page)  # less than a page needs
        out = tmp_path / f"{batch}"
        found = read_preferences(export_preferences(store, out, ALL_PAIRS, fmt=fmt))
        assert found.preferences == whole.preferences, "agreement counts votes of other pages"
        assert found.judgments == whole.judgments
        assert found.clips == whole.clips
        again = write_preferences(
            tmp_path / f"again{batch}",
            clips=whole.clips,
            judgments=whole.judgments,
            preferences=iter(whole.preferences),
            guideline_version="x",
            source_query="x",
            fmt=fmt,
        )
        assert read_preferences(again).preferences == whole.preferences


def test_csv_is_written_for_eyes_and_formulas_are_defused(tmp_path, clip_files):
    evil = [
        "=1+1 is two",
        "+cmd|' /C calc'!A0",
        "-2+3 cats",
        "@SUM(A1) dogs",
        "\tA tab",
        "A ball, red",
    ]
    assert [csv_cell(text) for text in evil] == [
        *("'" + text for text in evil[:5]),
        "A ball, red",
    ]
    assert csv_cell(-1) == -1
    with Store.open(tmp_path / "project") as store:
        ids = store.add_clips(
            [
                ClipRecord(path, evil[0], f"@model{index}", "s")
                for index, path in enumerate(clip_files[:4])
            ]
        )
        store.create_tasks([ids], presentation=SMALL)
        store.add_user("ann0", PASSWORD)
        judge(store, "ann0", plain_verdict)
        folder = export_preferences(store, tmp_path / "out", fmt="csv")
    with (folder / "clips.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["prompt"] for row in rows} == {"'" + evil[0]}
    assert {row["model"][:2] for row in rows} == {"'@"}
    with (folder / "preferences.csv").open(newline="") as file:
        assert {row["preference"] for row in csv.DictReader(file)} <= {"1", "-1"}
    with pytest.raises(UserError, match="is CSV, which is to look at"):
        read_preferences(folder)

"""Real ratings of real clips go in as tasks and come out as preferences, and their figures are those of the ratings themselves."""

from __future__ import annotations

import json
from collections import defaultdict
from statistics import fmean

import pytest

from annotation.export import ExportQuery, export_preferences
from annotation.importers import FETV_DIMENSIONS, fetv
from annotation.presentation import PresentationConfig
from annotation.quality.report import leaderboard_report, load_judged
from annotation.records import read_preferences
from annotation.snapshots import problem, take
from annotation.store import Store

QUICK = PresentationConfig(min_side=32, max_side=48, max_seconds=0.5)


@pytest.mark.realdata
def test_all_of_fetv_goes_in_as_tasks_and_out_as_preferences_with_its_own_means(
    real_data, tmp_path
):
    source = real_data / "fetv"
    ratings = defaultdict(list)
    for line in (source / "ratings.jsonl").read_text().splitlines():
        for clip in json.loads(line)["clips"]:
            for name, dimension in FETV_DIMENSIONS.items():
                if clip.get(name) is not None:
                    ratings[clip["model"], dimension].append(clip[name])
    with Store.open(tmp_path / "project") as store:
        done = fetv(source, store, need=2, presentation=QUICK)
        assert (done.num_tasks, done.num_clips, done.num_judgments) == (20, 80, 20)
        assert store.counts()["open_tasks"] == 20, "people judge them too"
        query = ExportQuery(project="fetv", include_implied=True)
        snapshot = take(store, "fetv", query)
        assert problem(snapshot) is None
        explicit = read_preferences(export_preferences(store, tmp_path / "explicit"))
    data = read_preferences(snapshot.folder)
    number = sum(len(found) for found in ratings.values())
    assert len(data.clips) == 80
    assert len(data.judgments) == number // 4
    assert len(data.preferences) == number // 4 * 6, "every pair of four rated clips"
    assert {row["kind"] for row in explicit.preferences} == {"explicit"}
    assert 0 < len(explicit.preferences) < number // 4 + 1, "a shared extreme has no explicit pair"
    report = leaderboard_report(load_judged(snapshot.folder), num_bootstrap=50)
    means = {(one["name"], one["dimension"]): one for one in report["opinion_scores"]}
    assert means.keys() == ratings.keys()
    for key, found in ratings.items():
        assert means[key]["mean"] == pytest.approx(fmean(found))
        assert means[key]["number"] == len(found)
        assert means[key]["low"] <= means[key]["mean"] <= means[key]["high"]
    assert len(report["ratings"]) == 4
    assert sum(rank["wins"] for rank in report["ratings"]) == sum(
        row["preference"] != 0 for row in data.preferences
    )

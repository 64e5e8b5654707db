"""The review page reads runs and loops, and nothing else."""

from __future__ import annotations

import json

import pytest
from loop_example import write_example_loop

from reelhf.errors import UserError
from rlhf.review import (
    check_runs,
    clip_folders,
    create_review_app,
    find_runs,
    plain_metrics,
    reward_frame,
    verdict_table,
)


@pytest.fixture
def runs(tmp_path):
    write_example_loop(tmp_path / "runs" / "demo")
    bare = tmp_path / "runs" / "vae"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "attempt": 1, "time": 0.0, "loss": 0.5})
    )
    (tmp_path / "runs" / "secret.mp4").write_bytes(b"not yours")
    return tmp_path / "runs"


def test_loops_come_first_then_bare_runs(runs):
    names = [one.name for one in find_runs(runs)]
    assert names == ["demo: RLHF of the refiner", "demo: RLHF of the base", "vae"]


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        check_runs(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        check_runs(tmp_path / "nowhere")


def test_curves_name_training_validation_and_held_out(runs):
    from rlhf.review import _metrics

    frame = reward_frame(_metrics(runs / "demo" / "rlhf_base"), "motion_quality")
    assert set(frame["curve"]) == {"training batch", "validation", "held-out judge"}
    assert plain_metrics(
        [{"step": 1, "attempt": 1, "time": 0.0, "loss": 0.5, "seconds/x": 1.0}]
    ) == ["loss"]


def test_verdicts_of_a_loop_without_gold_say_why(tmp_path):
    loop = write_example_loop(tmp_path / "loop", gold=False)
    table = verdict_table(json.loads((loop / "compare_base" / "comparison.json").read_text()))
    assert list(table["verdict"]) == ["pass", "fail", "not measured"]
    assert table["interval"][2] == "real clips have no gold"


def test_only_clips_of_known_runs_are_served(runs):
    from fastapi.testclient import TestClient

    client = TestClient(create_review_app(runs))
    name = "demo: RLHF of the base"
    good = client.get(f"/clip/{name}", params={"file": "pairs/00_before.mp4"})
    assert good.status_code == 200
    assert good.headers["content-type"] == "video/mp4"
    for file in ("../../secret.mp4", "comparison.json", "/etc/hostname.mp4", "pairs/none.mp4"):
        assert client.get(f"/clip/{name}", params={"file": file}).status_code == 404
    assert client.get("/clip/unknown", params={"file": "pairs/00_before.mp4"}).status_code == 404
    assert client.get("/report/vae").status_code == 404
    assert "Curves of the base" in client.get(f"/report/{name}").text
    assert len(clip_folders(find_runs(runs)[0])) == 2

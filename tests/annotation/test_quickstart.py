from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from annotation.export import ExportQuery, export_preferences
from annotation.importers import derive_pick, fetv
from annotation.quickstart import plan_project, quickstart
from annotation.records import read_preferences
from annotation.store import Store
from reelhf.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, clip_files: list[Path]) -> Path:
    """`<model>/<prompt>.mp4`: three prompts by three models, with one of everything that can be wrong."""
    root = tmp_path / "clips"
    files = iter(clip_files)
    for model in ("alpha", "beta", "gamma"):
        for prompt in ("a_red_ball_rolls", "a blue cube"):
            (root / model).mkdir(parents=True, exist_ok=True)
            shutil.copy(next(files), root / model / f"{prompt}.mp4")
    shutil.copy(next(files), root / "alpha" / "only here.mp4")
    shutil.copy(clip_files[0], root / "gamma" / "same bytes.mp4")
    (root / "beta" / "cut short.mp4").write_bytes(clip_files[0].read_bytes()[:200])
    (root / "beta" / "readme.txt").write_text("hello")
    (root / "beta" / ".hidden.mp4").write_text("")
    shutil.copy(next(files), root / "stray.mp4")
    (root / "gamma" / "a blue cube.mp4").unlink()
    return root


def test_a_folder_becomes_tasks_and_every_mismatch_is_listed(folder):
    plan = plan_project(folder, k=4)
    assert {g[0].prompt: [c.model for c in g] for g in plan.groups} == {
        "a red ball rolls": ["alpha", "beta", "gamma"],
        "a blue cube": ["alpha", "beta"],
    }
    text = "\n".join(plan.mismatches)
    for words in (
        "stray.mp4 lies outside a model's folder",
        "readme.txt is no video",
        "cut short.mp4",
        "same bytes.mp4 has the same bytes as",
        "prompt 'only here' has 1 clip: left out",
        "prompt 'a blue cube' has no clip by gamma",
    ):
        assert words in text
    assert len(plan.mismatches) == 6


def test_a_dry_run_writes_nothing(folder, tmp_path):
    project = quickstart(folder, tmp_path / "out", dry_run=True)
    assert len(project.plan.groups) == 2
    assert not (tmp_path / "out").exists()


def test_one_command_makes_a_project_someone_can_sign_in_to(folder, tmp_path):
    project = quickstart(folder, tmp_path / "out", need=2)
    with Store.open(tmp_path / "out", create=False) as store:
        assert store.check_password("admin", project.password).role == "admin"
        counts = store.counts()
        assert (counts["tasks"], counts["clips"], counts["judgments"]) == (2, 5, 0)
    assert project.password not in repr(project)
    with pytest.raises(UserError, match="already holds a project"):
        quickstart(folder, tmp_path / "out")


def test_more_clips_than_k_become_several_tasks(tmp_path, clip_files):
    for index, path in enumerate(clip_files[:7]):
        (tmp_path / f"m{index}").mkdir()
        shutil.copy(path, tmp_path / f"m{index}" / "one prompt.mp4")
    assert [len(g) for g in plan_project(tmp_path, k=4).groups] == [4, 3]
    plan = plan_project(tmp_path, k=3)
    assert [len(g) for g in plan.groups] == [3, 3]
    assert "one clip is over" in plan.mismatches[-1]


@pytest.mark.parametrize("k", [0, 1, 9])
def test_k_below_2_or_above_8_is_refused(folder, tmp_path, k):
    with pytest.raises(UserError, match=f"k is {k}; best and worst need 2 to 8 clips"):
        quickstart(folder, tmp_path / "out", k=k)


def test_sources_that_are_nothing_of_the_kind_are_named(tmp_path, clip_files):
    with pytest.raises(UserError, match="no folder or manifest at"):
        plan_project(tmp_path / "nowhere", k=4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"holds neither `<model>/<prompt>\.mp4` nor one of manifest\.csv"
    ):
        plan_project(tmp_path / "empty", k=4)
    (tmp_path / "lonely" / "alpha").mkdir(parents=True)
    shutil.copy(clip_files[0], tmp_path / "lonely" / "alpha" / "a prompt.mp4")
    with pytest.raises(UserError, match="no prompt has 2 usable clips"):
        quickstart(tmp_path / "lonely", tmp_path / "out")


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_csv_and_jsonl_manifests_say_the_same(tmp_path, clip_files):
    rows = [
        {
            "path": str(path),
            "prompt": f"提示 {i // 2}",
            "model": f"m{i % 2}",
            "stage": "base",
            "seed": str(i),
        }
        for i, path in enumerate(clip_files[:4])
    ]
    table = write_csv(tmp_path / "list.csv", rows)
    lines = tmp_path / "list.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = plan_project(table, k=2), plan_project(lines, k=2)
    assert first == second
    assert [(c.prompt, c.stage, c.seed) for c in first.groups[0]] == [
        ("提示 0", "base", 0),
        ("提示 0", "base", 1),
    ]


def test_a_manifest_names_its_wrong_lines(tmp_path, clip_files):
    rows = [{"path": str(p), "promt": "x", "model": "m"} for p in clip_files[:2]]
    with pytest.raises(UserError, match=r"list\.csv line 2 has no prompt\. Did you mean 'promt'"):
        plan_project(write_csv(tmp_path / "list.csv", rows), k=2)
    (tmp_path / "bad.jsonl").write_text('{"path": 1}\nnot json\n')
    with pytest.raises(UserError, match=r"bad\.jsonl line 2 is not JSON"):
        plan_project(tmp_path / "bad.jsonl", k=2)
    rows = [
        {"path": name, "prompt": "x", "model": name}
        for name in (str(clip_files[0]), "gone.mp4", str(clip_files[1]))
    ]
    plan = plan_project(write_csv(tmp_path / "gone.csv", rows), k=2)
    assert len(plan.groups) == 1
    assert "line 3" in plan.mismatches[0]
    assert "gone.mp4 is missing" in plan.mismatches[0]


# --- FETV ---


def test_only_a_single_highest_and_lowest_rating_make_a_pick():
    assert (derive_pick([3.0, 5.0, 4.0, 1.0]).best, derive_pick([3.0, 5.0, 4.0, 1.0]).worst) == (
        1,
        3,
    )
    assert derive_pick([5.0, 5.0, 4.0, 1.0]).best is None
    assert derive_pick([2.0, 2.0]).tie


@pytest.fixture
def some_fetv(real_data: Path, tmp_path: Path) -> Path:
    """Four prompts of FETV, two rated for alignment, two for quality."""
    lines = (real_data / "fetv" / "ratings.jsonl").read_text().splitlines()
    (tmp_path / "fetv").mkdir()
    (tmp_path / "fetv" / "ratings.jsonl").write_text("\n".join(lines[:4]) + "\n")
    (tmp_path / "fetv" / "clips").symlink_to(real_data / "fetv" / "clips")
    return tmp_path / "fetv"


@pytest.mark.realdata
def test_the_whole_of_fetv_fits_as_twenty_tasks_of_four(real_data):
    plan = plan_project(real_data / "fetv", k=4)
    assert [len(group) for group in plan.groups] == [4] * 20
    assert plan.mismatches == []
    assert {clip.model for group in plan.groups for clip in group} == {
        "cogvideo",
        "text2video-zero",
        "modelscope",
        "zeroscope",
    }


@pytest.mark.realdata
def test_fetv_ratings_come_out_as_judgments_ties_and_preferences(some_fetv, tmp_path):
    rows = [json.loads(line) for line in (some_fetv / "ratings.jsonl").read_text().splitlines()]
    with Store.open(tmp_path / "project") as store:
        done = fetv(some_fetv, store)
        assert (done.num_tasks, done.num_clips, done.num_judgments) == (4, 16, 4)
        assert fetv(some_fetv, store).num_tasks == 0, "a second import adds nothing"
        assert store.counts()["open_tasks"] == 4, "people still judge every task"
        data = read_preferences(
            export_preferences(store, tmp_path / "out", ExportQuery(include_implied=True))
        )
    assert {j["kind"] for j in data.judgments} == {"score"}
    assert not any(j["simulated"] for j in data.judgments)
    score = {}
    for row in rows:
        for name, dimension in (
            ("alignment", "prompt_following"),
            ("static_quality", "aesthetic_quality"),
            ("temporal_quality", "motion_quality"),
        ):
            for clip in row["clips"]:
                if name in clip:
                    score[row["prompt"], dimension, clip["model"]] = clip[name]
    model = {clip["sha256"]: clip["model"] for clip in data.clips}
    expected = Counter(dimension for _, dimension, _ in score)
    assert Counter(p["dimension"] for p in data.preferences) == {
        d: n // 4 * 6 for d, n in expected.items()
    }
    for row in data.preferences:
        a, b = (score[row["prompt"], row["dimension"], model[row[c]]] for c in ("clip_a", "clip_b"))
        assert row["preference"] == (a > b) - (a < b)
    assert any(row["preference"] == 0 for row in data.preferences)


@pytest.mark.realdata
def test_a_fetv_line_without_its_fields_is_named(some_fetv, tmp_path):
    path = some_fetv / "ratings.jsonl"
    path.write_text(
        path.read_text() + '{"prompt": "x", "clips": [{"model": "m"}, {"model": "n"}]}\n'
    )
    with (
        Store.open(tmp_path / "project") as store,
        pytest.raises(UserError, match="line 5: a clip has no path"),
    ):
        fetv(some_fetv, store)

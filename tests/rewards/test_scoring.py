"""Scoring files: nothing stops for one bad clip, nothing is scored twice, every way of running gives the same rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_rewards import CAPTIONS, smooth_clip, tiny_models

from reelhf.cli import main
from reelhf.errors import UserError
from reelhf.video import read_video, write_video
from rewards import load_composite
from rewards.scoring import run as module
from rewards.scoring.cache import ScoreCache
from rewards.scoring.run import ScoreRun, score_all, summary
from rewards.scoring.scorer import Scorer, ScoreSettings
from rewards.scoring.sources import Item, find_items

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ScoreSettings({})


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    for name in ("motion", "aesthetic"):
        tiny_models()[name].save(folder / name)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos: two shapes, two rates, one of them damaged."""
    folder = tmp_path_factory.mktemp("clips")
    for i, (size, fps) in enumerate([(32, 8.0), (48, 8.0), (32, 8.0), (32, 4.0)]):
        write_video(folder / f"{i}.mp4", smooth_clip(i, 5, size), fps)
    whole = (folder / "0.mp4").read_bytes()
    (folder / "broken.mp4").write_bytes(whole[: len(whole) // 3])
    rows = [{"path": f"{i}.mp4", "caption": CAPTIONS[i]} for i in range(4)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REELHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def without_cached(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "cached"} for row in rows]


def test_a_corrupt_clip_in_a_batch_is_invalid_and_counted_and_the_rest_is_scored(
    rewards: Path, clips: Path
):
    items = find_items([clips], prompt="anything")
    rows = score_all(ScoreRun(rewards, SETTINGS), items)
    assert [row["valid"] for row in rows] == [True] * 4 + [False]
    assert "broken.mp4" in rows[4]["reason"]
    assert "total" not in rows[4]
    assert summary(rows).startswith("4 of 5 clips scored, 0 of them from the cache\ninvalid: ")
    composite = load_composite(rewards, {"motion_quality": 1.0, "aesthetic_quality": 1.0})
    for i in range(4):  # as each is scored alone
        frames, fps = read_video(clips / f"{i}.mp4")
        with torch.no_grad():
            alone = composite.score(frames[None].float() / 255, fps=fps, prompts=[CAPTIONS[i]])
        assert rows[i]["prompt"] == CAPTIONS[i]
        assert rows[i]["total"] == pytest.approx(alone.total.item(), abs=1e-4)
        for name, value in zip(alone.dimensions, alone.values[0].tolist(), strict=True):
            assert rows[i]["dimensions"][name]["value"] == pytest.approx(value, abs=1e-4)


def test_a_score_beyond_the_validated_range_says_by_how_much(clips: Path, tmp_path: Path):
    model = tiny_models()["motion"]
    frames, fps = read_video(clips / "0.mp4")
    asked = {"selection": model.select(frames.shape[1], fps), "fps": fps, "prompts": ["a"]}
    with torch.no_grad():
        value = model.score(frames[None].float() / 255, **asked).values.item()
    model.std.fill_(0.5)
    model.high.fill_(value - 1.0)
    model.low.fill_(value - 2.0)
    model.save(tmp_path / "rewards" / "motion")
    (row,) = score_all(ScoreRun(tmp_path / "rewards", SETTINGS), [Item(clips / "0.mp4", "a")])
    assert row["dimensions"]["motion_quality"]["beyond_range"] == pytest.approx(2.0, abs=1e-3)


def test_what_was_scored_is_not_scored_again_until_clip_prompt_or_rewards_change(
    rewards: Path, clips: Path, tmp_path: Path
):
    run, items = ScoreRun(rewards, SETTINGS), find_items([clips / "0.mp4", clips / "1.mp4"], "a")
    first = score_all(run, items)
    again = score_all(run, items)
    assert [row["cached"] for row in first + again] == [False] * 2 + [True] * 2
    assert without_cached(first) == without_cached(again)
    other_prompt = score_all(run, [Item(items[0].path, "b")])
    weighted = score_all(ScoreRun(rewards, ScoreSettings({"motion_quality": 2.0})), items)
    copy = tmp_path / "other"
    tiny_models(1)["motion"].save(copy / "motion")
    other_rewards = score_all(ScoreRun(copy, SETTINGS), items[:1])
    assert not any(row["cached"] for row in other_prompt + weighted + other_rewards)
    moved = tmp_path / "moved.mp4"
    moved.write_bytes(items[0].path.read_bytes())
    assert score_all(run, [Item(moved, "a")])[0]["cached"]  # a clip is its content


def test_a_run_that_was_stopped_goes_on_where_it_was(
    rewards: Path, clips: Path, monkeypatch: pytest.MonkeyPatch
):
    items = find_items([clips / f"{i}.mp4" for i in range(4)], "a")
    scored = Scorer.score_clips
    calls = []

    def stop_at_the_third(self: Scorer, found: Any, prompts: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return scored(self, found, prompts)

    monkeypatch.setattr(Scorer, "score_clips", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        score_all(ScoreRun(rewards, SETTINGS, batch_size=1), items)
    monkeypatch.setattr(Scorer, "score_clips", scored)
    rows = score_all(ScoreRun(rewards, SETTINGS, batch_size=1), items)
    assert [row["cached"] for row in rows] == [True, True, False, False]


@pytest.mark.slow
def test_two_workers_and_two_launched_processes_give_the_rows_of_one(
    rewards: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    items = find_items([clips], "x")
    one = without_cached(score_all(ScoreRun(rewards, SETTINGS), items))
    monkeypatch.setenv("REELHF_CACHE", str(tmp_path / "second"))
    two = without_cached(score_all(ScoreRun(rewards, SETTINGS, workers=2), items))
    assert [r["path"] for r in two] == [r["path"] for r in one]
    assert [r.get("total") for r in two] == pytest.approx([r.get("total") for r in one], abs=1e-5)
    out = tmp_path / "launched.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "reelhf"]  # fmt: skip
    command += ["rewards", "score", str(rewards), str(clips), "--prompt", "x", "--out", str(out)]
    environment = os.environ | {"REELHF_CACHE": str(tmp_path / "third"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launched = [json.loads(line) for line in out.read_text().splitlines()]
    assert sum(row["cached"] for row in launched) == 4  # each was scored by one of the two
    assert [r.get("total") for r in launched] == pytest.approx([r.get("total") for r in one], abs=1e-5)  # fmt: skip


@pytest.mark.slow
def test_ray_gives_the_rows_of_one_process(rewards: Path, clips: Path, tmp_path: Path, monkeypatch: Any):  # fmt: skip
    pytest.importorskip("ray", reason="Ray is optional: pip install 'reelhf[ray]'")
    items = find_items([clips], "x")
    one = without_cached(score_all(ScoreRun(rewards, SETTINGS), items))
    monkeypatch.setenv("REELHF_CACHE", str(tmp_path / "ray"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    rows = without_cached(score_all(ScoreRun(rewards, SETTINGS, workers=2, engine="ray"), items))
    assert [row["path"] for row in rows] == [row["path"] for row in one]
    assert [r.get("total") for r in rows] == pytest.approx([r.get("total") for r in one], abs=1e-5)


def test_ray_that_is_not_there_is_one_line(rewards: Path, clips: Path, monkeypatch: Any):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--engine ray needs Ray.*reelhf\[ray\].*--engine local"):
        score_all(ScoreRun(rewards, SETTINGS, engine="ray"), [Item(clips / "0.mp4", "a")])


def test_sources_are_files_folders_and_manifests(clips: Path, tmp_path: Path):
    (tmp_path / "list.csv").write_text(f"path,prompt\n{clips / '1.mp4'},own\n{clips / '2.mp4'},\n")
    found = find_items([clips / "0.mp4", tmp_path / "list.csv", clips], "given")
    assert [(item.path.name, item.prompt) for item in found] == [
        ("0.mp4", "given"),
        ("1.mp4", "own"),
        ("2.mp4", "given"),
        *[(f"{i}.mp4", CAPTIONS[i]) for i in range(4)],
        ("broken.mp4", "given"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.txt", "a", "is no folder, no manifest"),
        ("x.jsonl", "{", "line 1 is not JSON"),
        ("x.jsonl", '{"prompt": "a"}', "line 1 names no clip; expected one of path, video"),
        ("x.csv", "path,prompt\n", "names no clips"),
        ("x.csv", "path\na.mp4\n", "1 of 1 clips have no prompt, first .*a.mp4; give --prompt"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_line(tmp_path: Path, name: str, text: str, words: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        find_items([tmp_path / name], None)
    with pytest.raises(UserError, match="holds no videos"):
        find_items([tmp_path], None)


def test_the_command_prints_a_table_or_writes_lines(
    rewards: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main(["rewards", "score", str(rewards), str(clips / "0.mp4"), "--prompt", "a disc"])
    out = capsys.readouterr().out
    assert "\tmotion_quality\tlogit " in out
    assert "\tbounded z " in out
    path = tmp_path / "scores.jsonl"
    main(["rewards", "score", str(rewards), str(clips), "--prompt", "a", "--out", str(path), "--weight", "motion_quality=0.5"])  # fmt: skip
    assert "4 of 5 clips scored" in capsys.readouterr().out
    assert len(path.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--weight", "motoin_quality=1"], "Did you mean 'motion_quality'"),
        (["--weight", "motion_quality"], "--weight 'motion_quality'; expected DIMENSION=NUMBER"),
        (["--engine", "spark"], "engine 'spark'; expected local or ray"),
        (["--pessimism", "1"], "pessimism is 1, but none of these rewards"),
    ],
)
def test_a_bad_option_ends_with_exit_code_2(
    rewards: Path, clips: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        main(["rewards", "score", str(rewards), str(clips / "0.mp4"), "--prompt", "a", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_list_without_one_clip_that_can_be_scored_fails(
    rewards: Path, clips: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        main(["rewards", "score", str(rewards), str(clips / "broken.mp4"), str(clips / "gone.mp4"), "--prompt", "a"])  # fmt: skip
    assert ended.value.code == 2
    assert "none of 2 clips could be scored" in capsys.readouterr().err


def test_the_cache_is_one_file_that_many_may_open(tmp_path: Path):
    caches = [ScoreCache(tmp_path / "deep" / "scores.sqlite") for _ in range(2)]
    caches[0].put({f"k{i}": {"total": float(i)} for i in range(1200)})
    caches[1].put({"k3": {"total": -1.0}})
    found = caches[0].get([f"k{i}" for i in range(1300)])
    assert len(found) == 1200
    assert found["k3"] == {"total": -1.0}
    assert module.score_cache_path().name == "scores.sqlite"

"""Published formats, from tiny files written by hand and from the real ones where they are at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_rewards import smooth_clip, tiny_models

from annotation.records import read_preferences
from reelhf.cli import main
from reelhf.errors import UserError
from reelhf.video import probe_video, write_video
from rewards.data import load_tasks
from rewards.evaluation.published import evaluate_published, format_published
from rewards.importers import reader
from rewards.importers.alike import Alike, nearest_frames
from rewards.importers.tables import write_tasks

SIZES = {"a": (24, 8.0, 8), "b": (32, 10.0, 12), "c": (40, 8.0, 8), "d": (32, 8.0, 9)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    for i, (name, (size, fps, frames)) in enumerate(SIZES.items()):
        write_video(folder / f"{name}.mp4", smooth_clip(i, frames, size), fps)
    return folder


def save(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def pairs_of(folder: Path) -> set[tuple[str, str, str]]:
    """(winner, loser, dimension) by file name; a tie is in both orders."""
    data = read_preferences(folder)
    names = {row["sha256"]: Path(row["uri"]).stem for row in data.clips}
    found = set()
    for row in data.preferences:
        a, b = names[row["clip_a"]], names[row["clip_b"]]
        found |= {(a, b, row["dimension"])} if row["preference"] >= 0 else set()
        found |= {(b, a, row["dimension"])} if row["preference"] <= 0 else set()
    return found


CSV = """path_A,path_B,prompt,VQ,MQ,TA,fps_A,num_frames_A,fps_B,num_frames_B
a.mp4,./b.mp4,"A disc, red.",B,same,A,8.0,8,10.0,12
c.mp4,d.mp4,A box.,A,,B,8.0,8,8.0,9
a.mp4,./b.mp4,"A disc, red.",B,same,A,8.0,8,10.0,12
"""


def test_videoalign_pairs_become_verdicts_and_repeated_rows_count_once(
    source: Path, tmp_path: Path
):
    tasks = reader("videoalign")(save(source, "pairs.csv", CSV))
    counts = write_tasks(tasks, tmp_path / "out", project="videoalign")
    assert (counts.tasks, counts.clips, counts.verdicts, counts.repeated) == (2, 4, 5, 1)
    assert pairs_of(tmp_path / "out") == {
        ("b", "a", "aesthetic_quality"),
        ("a", "b", "motion_quality"),
        ("b", "a", "motion_quality"),
        ("a", "b", "prompt_following"),
        ("c", "d", "aesthetic_quality"),
        ("d", "c", "prompt_following"),
    }
    data = read_preferences(tmp_path / "out")
    assert {row["kind"] for row in data.judgments} == {"gsb"}
    best = next(r for r in data.judgments if r["dimension"] == "aesthetic_quality" and r["best"])
    assert (best["best"], best["worst"]) == (1, 0)  # B won
    assert all(Path(data.clip_path(row["sha256"])).is_file() for row in data.clips)


BENCH = """path_A,path_B,A_model,B_model,prompt,VQ,MQ,TA,Overall
a.mp4,b.mp4,one,two,A disc.,A,A,A,A
c.mp4,d.mp4,one,two,A box.,B,same,same,B
"""


def test_the_benchmark_is_scored_by_the_published_convention(source: Path, tmp_path: Path):
    tasks = reader("videogen-rewardbench")(save(source, "bench.csv", BENCH))
    write_tasks(tasks, tmp_path / "data", project="videogen-rewardbench", split="test")
    data = read_preferences(tmp_path / "data")
    assert {row["split"] for row in data.preferences} == {"test"}
    assert {row["model"] for row in data.clips} == {"one", "two"}
    for name, model in tiny_models().items():
        model.save(tmp_path / "rewards" / name)
    found = evaluate_published(tmp_path / "data", tmp_path / "out", rewards=tmp_path / "rewards")
    assert found["overall_sums"] == ["aesthetic_quality", "motion_quality", "prompt_following"]
    rows = found["dimensions"]
    assert list(rows) == [*found["overall_sums"], "overall"]
    assert all(row["with_ties"] >= row["tie_share"] for row in rows.values())
    assert rows["motion_quality"]["tie_share"] == 0.5
    assert json.loads((tmp_path / "out" / "published.json").read_text()) == found
    assert "by the published convention" in format_published(found)


def test_another_models_scores_are_scored_by_the_same_convention(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tasks = reader("videogen-rewardbench")(save(source, "bench.csv", BENCH))
    write_tasks(tasks, tmp_path / "data", project="videogen-rewardbench", split="test")
    lines = ["path,reward_VQ,reward_TA", "a.mp4,1.0,0.5", "./b.mp4,0.0,0.4", "c.mp4,0.2,0", "d.mp4,0.9,3"]  # fmt: skip
    table = save(tmp_path, "scores.csv", "\n".join(lines))
    words = ["rewards", "benchmark", "--preferences", str(tmp_path / "data"), "--out"]
    main([*words, str(tmp_path / "out"), "--scores", str(table)])
    rows = json.loads((tmp_path / "out" / "published.json").read_text())["dimensions"]
    assert list(rows) == ["aesthetic_quality", "prompt_following", "overall"]
    assert rows["aesthetic_quality"]["without_ties"] == 1.0
    # gaps 0.1 (people: A) and -3 (a tie): the smallest is called a tie in any case, as published
    assert rows["prompt_following"]["with_ties"] == 0.5
    assert rows["overall"]["without_ties"] == 1.0  # the sum: 1.1 and -3.7
    assert "100.00" in capsys.readouterr().out
    with pytest.raises(UserError, match="give a folder of rewards or --scores, and not both"):
        evaluate_published(tmp_path / "data", tmp_path / "x")
    short = save(tmp_path, "short.csv", "\n".join(lines[:-1]))
    with pytest.raises(UserError, match=r"has no score of .*d.mp4"):
        evaluate_published(tmp_path / "data", tmp_path / "x", table=short)
    bad = "path,reward_VQ\na.mp4,high\nb.mp4,0\nc.mp4,0\nd.mp4,0"
    wrong = save(tmp_path, "wrong.csv", bad)
    with pytest.raises(UserError, match=r"reward_VQ of a.mp4 is 'high'; expected a number"):
        evaluate_published(tmp_path / "data", tmp_path / "x", table=wrong)
    with pytest.raises(UserError, match="needs the columns path and some of reward_VQ"):
        evaluate_published(tmp_path / "data", tmp_path / "x", table=source / "bench.csv")


def test_votes_of_genai_bench_are_verdicts_over_all(source: Path, tmp_path: Path):
    votes = ("leftvote", "rightvote", "tievote", "bothbad_vote")
    rows = [
        {"prompt": f"p{i}", "left_video": "a.mp4", "right_video": "b.mp4", "vote_type": vote}
        for i, vote in enumerate(votes)
    ]
    listed = reader("genai-bench")(save(source, "votes.json", json.dumps(rows)))
    lines = reader("genai-bench")(save(source, "v.jsonl", "\n".join(map(json.dumps, rows))))
    assert lines == listed
    assert [task.verdicts[0].preference for task in listed] == [1, -1, 0, 0]
    write_tasks(listed, tmp_path / "out", project="genai-bench")
    assert {r["dimension"] for r in read_preferences(tmp_path / "out").preferences} == {"overall"}


def fetv_line(**ratings: list[float]) -> str:
    clips: list[dict[str, Any]] = [
        {"model": name, "path": f"{name}.mp4", **{k: v[i] for k, v in ratings.items()}}
        for i, name in enumerate(SIZES)
    ]
    return json.dumps({"prompt": "A red disc.", "clips": clips})


def test_fetv_ratings_become_every_pair_and_equal_ones_tie(source: Path, tmp_path: Path):
    save(source, "ratings.jsonl", fetv_line(alignment=[1.0, 3.0, 3.0, 5.0]))
    write_tasks(reader("fetv")(source), tmp_path / "out", project="fetv")
    found = pairs_of(tmp_path / "out")
    wins = {(w, x) for w, x, _ in found}
    assert wins == {("b", "a"), ("c", "a"), ("d", "a"), ("d", "b"), ("d", "c"), ("b", "c"), ("c", "b")}  # fmt: skip
    judgment = read_preferences(tmp_path / "out").judgments[0]
    assert (judgment["best"], judgment["worst"]) == (3, 0)
    assert judgment["scores"] == [1.0, 3.0, 3.0, 5.0]


def test_clips_made_alike_differ_in_nothing_but_their_pictures(source: Path, tmp_path: Path):
    save(source, "ratings.jsonl", fetv_line(static_quality=[1, 2, 3, 4]))
    alike = Alike(size=16, fps=4.0, num_frames=3)
    write_tasks(reader("fetv")(source), tmp_path / "out", project="fetv", alike=alike)
    data = read_preferences(tmp_path / "out")
    told = {(r["num_frames"], r["fps"], r["width"], r["height"]) for r in data.clips}
    assert told == {(3, 4.0, 16, 16)}
    info = probe_video(data.clip_path(data.clips[0]["sha256"]))
    assert (info.frames, info.width) == (3, 16)
    assert {p.name for p in (tmp_path / "out" / "media").iterdir()} == {f"{r['sha256']}.mp4" for r in data.clips}  # fmt: skip
    assert nearest_frames(8, 8.0, alike) == [0, 2, 4]
    assert nearest_frames(12, 10.0, alike) == [0, 2, 5]  # at 0, .25 and .5 s
    assert nearest_frames(4, 8.0, alike) is None


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("videoalign", "path_A,path_B\na.mp4,b.mp4\n", "expected path_A, path_B, prompt and some"),
        ("videoalign", "path_A,path_B,prompt,VQ\na.mp4,b.mp4,x,better\n", "line 2: VQ is 'better'; expected A, B or same"),
        ("videoalign", "path_A,path_B,prompt,VQ\na.mp4,b.mp4,x,\n", "line 2 has no label"),
        ("videoalign", "", "of an empty file"),
        ("genai-bench", '[{"prompt": "x"}]', "row 1: no left_video, right_video, vote_type"),
        ("genai-bench", "[oops", "is not JSON"),
        ("genai-bench", '[{"prompt":"x","left_video":"a.mp4","right_video":"b.mp4","vote_type":"up"}]', "vote_type 'up'; expected leftvote"),
        ("fetv", '{"prompt": "x", "clips": [{"model": "m"}]}', "line 1: KeyError 'path'"),
        ("fetv", '{"prompt": "x", "clips": [{"model": "m", "path": "a.mp4"}]}', "1 clips rated in 0"),
        ("fetv", "", "holds no rated prompts"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_clear_line(source: Path, name: str, text: str, words: str):
    with pytest.raises(UserError, match=words.replace("[", r"\[")):
        reader(name)(save(source, "bad.txt", text))


def test_nothing_is_written_when_a_clip_is_missing_broken_or_too_short(
    source: Path, tmp_path: Path
):
    row = "path_A,path_B,prompt,VQ\n{},b.mp4,x,A\n"
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"1 of 2 clips are missing, first .*gone.mp4"):
        write_tasks(reader("videoalign")(save(source, "x.csv", row.format("gone.mp4"))), out, project="v")  # fmt: skip
    (source / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"broken.mp4 cannot be read as a video"):
        write_tasks(reader("videoalign")(save(source, "x.csv", row.format("broken.mp4"))), out, project="v")  # fmt: skip
    with pytest.raises(UserError, match=r"a.mp4 lasts 1.00 s; 20 frames at 5 per second need 3.80"):
        write_tasks(reader("videoalign")(save(source, "x.csv", row.format("a.mp4"))), out, project="v", alike=Alike(16, 5.0, 20))  # fmt: skip
    assert not (out / "manifest.json").exists()


def test_the_command_imports_and_an_unknown_format_names_the_known(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save(source, "pairs.csv", CSV)
    main(["rewards", "import", "videoalign", str(source / "pairs.csv"), "--out", str(tmp_path / "d"), "--size", "16", "--frames", "3"])  # fmt: skip
    assert "2 tasks, 4 clips, 5 verdicts; 1 rows repeated" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"expected one of fetv, .* Did you mean 'videoalign'"):
        reader("videoaling")


@pytest.mark.realdata
def test_the_real_videoalign_pairs_train_evaluate_and_export(real_data: Path, tmp_path: Path):
    from rewards.evaluation.held_out import evaluate_rewards
    from rewards.train import RewardTrainConfig, train_rewards

    tasks = reader("videoalign")(real_data / "videoalign")
    alike = Alike(size=32, fps=4.0, num_frames=6)
    data = tmp_path / "data"
    counts = write_tasks(tasks, data, project="videoalign", alike=alike)
    assert (counts.tasks, counts.clips, counts.verdicts, counts.repeated) == (3, 6, 9, 9)
    assert sum(row["preference"] == 0 for row in read_preferences(data).preferences) == 4
    for name, model in tiny_models().items():
        model.save(tmp_path / "backbones" / name)
    config = RewardTrainConfig(models=("motion", "aesthetic"), epochs=2.0)
    rewards = train_rewards(config, data, tmp_path / "backbones", tmp_path / "r", splits=None)
    found = evaluate_rewards(rewards, data, tmp_path / "e", split=None)["dimensions"]
    assert found["aesthetic_quality"]["n"] == 2
    assert found["motion_quality"]["n"] == 1
    published = evaluate_published(data, tmp_path / "p", rewards=rewards)["dimensions"]
    assert published["motion_quality"]["with_ties"] >= 2 / 3  # two of three are ties


@pytest.mark.realdata
def test_the_real_fetv_ratings_become_preferences(real_data: Path, tmp_path: Path):
    tasks = reader("fetv")(real_data / "fetv")
    counts = write_tasks(tasks[:2] + tasks[2:4], tmp_path / "d", project="fetv", alike=Alike(32, 5.0, 6))  # fmt: skip
    assert len(tasks) == 20
    assert sum(len(task.clips) for task in tasks) == 80
    assert sum(len(task.scores) for task in tasks) == 12 + 2 * 8
    assert counts.tasks == 4
    loaded = load_tasks(tmp_path / "d")
    assert all(len(task.clips) == 4 for task in loaded)
    assert {row["model"] for row in read_preferences(tmp_path / "d").clips} == {
        "cogvideo",
        "text2video-zero",
        "modelscope",
        "zeroscope",
    }

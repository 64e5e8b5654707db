"""Clips made by configured commands, and tasks that mix stages by configured shares."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest
import sqlalchemy as sa

from annotation import schema
from annotation.candidates.generate import CandidatesConfig, Source, draw_prompts, run_source
from annotation.candidates.mix import Candidate, MixConfig, load_candidates, mix
from annotation.prompts.pool import import_prompts
from annotation.prompts.sources import RawPrompt
from annotation.records import ClipRecord
from annotation.store import Store
from reelhf.cli import main
from reelhf.errors import UserError
from tests.annotation.annotation_cases import SMALL


@pytest.fixture
def database() -> str:
    return "sqlite"


def candidates(num_prompts, **clips_of):
    """`base=3` gives every prompt three clips of stage base."""
    found = []
    for prompt in range(num_prompts):
        for group, number in clips_of.items():
            for _ in range(number):
                found.append(Candidate(len(found), f"p{prompt}", "t2v", group))
    return found


# --- mixing --------------------------------------------------------------------------------------


def test_shares_of_the_clips_shown_are_those_that_were_configured():
    config = MixConfig(shares={"base": 1, "refiner": 2, "other": 1})
    found = mix(candidates(200, base=4, refiner=4, other=4), config)
    assert found.shown == {"base": 200, "refiner": 400, "other": 200}
    assert all(len(clips) == 4 for clips in found.groups)
    for clips in found.groups:
        assert len({clip.prompt_id for clip in clips}) == 1
        assert len({clip.clip_id for clip in clips}) == 4


def test_every_task_shows_a_wanted_pair_and_pairs_take_turns():
    config = MixConfig(pairs=(("a", "b"), ("b", "c"), ("c", "c")), clips_per_task=2)
    found = mix(candidates(90, a=2, b=2, c=2), config)
    pairs = Counter(tuple(sorted(clip.group for clip in clips)) for clips in found.groups)
    assert pairs == {("a", "b"): 30, ("b", "c"): 30, ("c", "c"): 30}
    assert found.met[("a", "b")] == 30


def test_what_gives_no_task_is_counted_with_its_reason():
    config = MixConfig(pairs=(("a", "b"),), clips_per_task=2, max_tasks=3)
    clips = candidates(4, a=1, b=1)
    clips += [Candidate(100, "only", "t2v", "a"), Candidate(101, "only", "t2v", "a")]
    found = mix(clips, config)
    assert len(found.groups) == 3
    assert (
        found.left_out["enough tasks already"] + found.left_out["no pair of the wanted groups"] == 2
    )
    alone = mix([Candidate(1, "p", "t2v", "a")], MixConfig())
    assert alone.left_out == {"fewer than two clips": 1}


def test_a_clip_is_shown_once_however_many_tasks_a_prompt_gives_and_draws_repeat():
    config = MixConfig(tasks_per_prompt=5, clips_per_task=3)
    clips = candidates(10, a=5, b=4)
    found = mix(clips, config)
    ids = [clip.clip_id for task in found.groups for clip in task]
    assert len(ids) == len(set(ids)) == 90
    assert mix(clips, config) == found
    assert mix(clips, MixConfig(tasks_per_prompt=5, clips_per_task=3, seed=1)) != found


def test_i2v_and_t2v_clips_of_a_prompt_never_meet():
    clips = [Candidate(i, "p", "t2v" if i % 2 else "i2v", "a") for i in range(8)]
    assert [len({c.task_kind for c in task}) for task in mix(clips, MixConfig()).groups] == [1, 1]


def test_a_mix_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="pairs name 'b', which has no share"):
        MixConfig(shares={"a": 1}, pairs=(("a", "b"),))
    with pytest.raises(ValueError, match="by is 'colour'"):
        MixConfig(by="colour")


def test_clips_of_other_projects_and_of_tasks_of_this_round_stay_out(new_project):
    store = new_project(tasks=1)
    config = MixConfig(by="model")
    found = load_candidates(store, config)
    assert {clip.clip_id for clip in found} == set(range(5, 13)), "the first four are in a task"
    assert len(load_candidates(store, MixConfig(by="model", round=1))) == 12
    with pytest.raises(UserError, match=r"shares name 'secretmodel9'.*secretmodel"):
        load_candidates(store, MixConfig(by="model", shares={"secretmodel9": 1}))
    with pytest.raises(UserError, match="no project 'other'"):
        load_candidates(store, MixConfig(project="other"))


def test_the_verb_shows_the_mix_and_makes_the_tasks_in_their_project(new_project, tmp_path, capsys):
    store = new_project(tasks=1)
    config = tmp_path / "mix.yaml"
    config.write_text("by: stage\nclips_per_task: 2\npairs: [[secretstage0, secretstage1]]\n")
    words = ["annotate", "tasks", "mix", str(config), "--project", str(store.media.parent)]
    main([*words, "--dry-run"])
    said = capsys.readouterr().out
    assert "2 tasks, 4 clips shown" in said
    assert "secretstage0 meets secretstage1 in 2 tasks" in said
    assert store.counts()["tasks"] == 1
    main([*words, "tasks_per_prompt=2", "judgments_per_task=3"])
    with store.read() as connection:
        rows = connection.execute(
            sa.select(schema.task.c.need_n, schema.task.c.project_id).where(schema.task.c.id > 1)
        ).all()
    assert rows == [(3, schema.DEFAULT_PROJECT_ID)] * 4


# --- generating ----------------------------------------------------------------------------------

MAKER = """
import json, shutil, sys
from pathlib import Path
prompts, out, clip, seed = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
with (out / "captions.jsonl").open("w") as file:
    for number, prompt in enumerate(prompts.read_text().splitlines()[:2]):
        data = Path(clip).read_bytes() + bytes([seed, number])  # trailing bytes: another clip, still a video
        (out / f"{number}.mp4").write_bytes(data)
        file.write(json.dumps({"path": f"{number}.mp4", "caption": prompt, "seed": seed + number}) + "\\n")
"""


@pytest.fixture
def maker(tmp_path, clip_files):
    (tmp_path / "maker.py").write_text(MAKER)
    clip = shutil.copy(clip_files[0], tmp_path / "a clip.mp4")
    return f"{{python}} {tmp_path / 'maker.py'} {{prompts}} {{out}} '{clip}' {{seed}}"


@pytest.fixture
def pool(tmp_path):
    texts = ("A red ball rolls over grass", "Two dogs run on a beach", "一只猫在草地上走", "a ball")
    with Store.open(tmp_path / "project") as store:
        import_prompts(store, [RawPrompt(text, "test") for text in texts])
    return tmp_path / "project"


def test_configured_models_make_clips_of_the_same_prompts(pool, maker, tmp_path, capsys):
    config = tmp_path / "candidates.yaml"
    sources = [
        {"model": "ours", "stage": "base", "command": maker, "checkpoint": "ck", "seed": 5},
        {"model": "ours", "stage": "refiner", "command": maker, "seed": 9},
    ]
    config.write_text(json.dumps({"num_prompts": 3, "sources": sources}))
    out = tmp_path / "made folder"
    words = [
        "annotate",
        "clips",
        "generate",
        str(config),
        "--project",
        str(pool),
        "--out",
        str(out),
    ]
    main([*words, "--dry-run"])
    said = capsys.readouterr().out
    assert "3 prompts, 2 sources" in said
    assert "nothing was run" in said
    assert not out.exists()
    main(words)
    assert "2 clips, none of 1 prompts" in capsys.readouterr().out
    with Store.open(pool) as store, store.read() as connection:
        rows = connection.execute(sa.select(schema.clip).order_by(schema.clip.c.id)).all()
        languages = {row.prompt_id for row in rows}
    assert [(row.stage, row.checkpoint, row.seed) for row in rows] == [
        ("base", "ck", 5),
        ("base", "ck", 6),
        ("refiner", None, 9),
        ("refiner", None, 10),
    ]
    assert len(languages) == 2, "both models were given the same prompts"


def test_a_command_that_fails_or_writes_nothing_of_use_is_named(pool, tmp_path, clip_files):
    def source(command):
        return Source(model="m", stage="s", command=command)

    prompts = ["A red ball rolls over grass"]
    fails = source("{python} -c 'import sys; sys.exit(\"no memory\")' {prompts} {out}")
    with pytest.raises(UserError, match=r"m: .* ended with 1: no memory"):
        run_source(fails, prompts, tmp_path / "a")
    with pytest.raises(UserError, match="cannot run no-such-program"):
        run_source(source("no-such-program {prompts} {out}"), prompts, tmp_path / "b")
    with pytest.raises(UserError, match=r"captions\.jsonl"):
        run_source(source("{python} -c pass {prompts} {out}"), prompts, tmp_path / "c")
    with pytest.raises(UserError, match="is there already"):
        run_source(fails, prompts, tmp_path / "a")
    for command, words in (
        ("sample {out}", "where {prompts} goes"),
        ("sample {prompts} {out} {model}", "unknown blank {model}"),
    ):
        with pytest.raises(ValueError, match=words):
            source(command)
    config = CandidatesConfig(sources=(fails,), project="default", language="other")
    with Store.open(pool) as store, pytest.raises(UserError, match="has no active prompt"):
        draw_prompts(store, config)


# --- what is shown gives nothing away ------------------------------------------------------------


def test_copies_of_clips_of_any_make_have_one_size_rate_length_and_no_metadata(tmp_path):
    """Sizes, rates and lengths differ between models; the copies that are shown must not."""
    import av
    import torch

    from reelhf.video import probe_video, write_video

    shapes = ((32, 48, 5, 8.0), (64, 40, 12, 12.0), (48, 48, 9, 24.0))
    clips = []
    for number, (height, width, frames, fps) in enumerate(shapes):
        path = tmp_path / f"secretmodel{number}.mp4"
        write_video(path, torch.rand(3, frames, height, width), fps)
        clips.append(ClipRecord(path, "A prompt.", f"secretmodel{number}", "s"))
    with Store.open(tmp_path / "project") as store:
        store.create_tasks([store.add_clips(clips)], presentation=SMALL)
        copies = sorted((store.media / "shown").iterdir())
        facts = set()
        for copy in copies:
            info = probe_video(copy)
            with av.open(str(copy)) as container:
                stream = container.streams.video[0]
                told = {**container.metadata, **stream.metadata}
                facts.add(
                    (info.width, info.height, info.frames, info.fps, stream.codec_context.name)
                )
            assert not any("secret" in f"{key}{value}" for key, value in told.items())
            assert "secret" not in copy.name
            assert b"secretmodel" not in copy.read_bytes()
    assert len(copies) == 3
    assert len(facts) == 1

"""Prompts never have two uses; real clips have no gold and say so."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
import torch

from reelhf.errors import UserError
from reelhf.video import write_video
from rlhf.candidates import (
    CandidatesConfig,
    CorruptionOracle,
    plan_stages,
    read_manifest,
    strayed,
)
from rlhf.corruptions import corrupt
from rlhf.world import PromptsConfig, real_world, split_captions, toy_world

SMALL = PromptsConfig(feedback=6, held_out=4, training=8, validation=3, test=5)


def _assert_disjoint(prompts):
    groups = [
        {*prompts.feedback, *prompts.training},
        {*prompts.held_out},
        {*prompts.validation},
        {*prompts.test},
    ]
    assert all(not (a & b) for a, b in combinations(groups, 2))


def test_toy_prompts_have_one_use_each():
    world = toy_world(SMALL)
    _assert_disjoint(world.prompts)
    assert len(world.prompts.training) == 8
    assert world.prompts.training[:6] == world.prompts.feedback
    assert world.gold is not None


@pytest.mark.parametrize("count", [4, 5, 12, 300])
def test_captions_are_dealt_out_without_overlap(count):
    prompts = split_captions([f"caption {i}" for i in range(count)] * 2, SMALL)
    _assert_disjoint(prompts)
    assert all([prompts.feedback, prompts.held_out, prompts.validation, prompts.test])


def test_the_split_of_a_caption_does_not_depend_on_the_order_of_the_files():
    captions = [f"caption {i}" for i in range(20)]
    assert split_captions(captions, SMALL) == split_captions(captions[::-1], SMALL)


def test_too_few_captions_are_refused():
    with pytest.raises(UserError, match="3 distinct captions; expected at least 4"):
        split_captions(["a", "b", "c", "a"], SMALL)


def test_real_clips_have_no_gold_and_the_notes_say_so(tmp_path):
    rows = []
    for index in range(5):
        write_video(tmp_path / f"{index}.mp4", torch.rand(3, 9, 32, 32), 8.0)
        rows.append({"path": f"{index}.mp4", "caption": f"caption {index}"})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    world = real_world(SMALL, tmp_path, corrupted_candidates=True)
    assert world.gold is None
    assert "no gold" in world.notes[0]
    assert "5 distinct captions" in world.notes[1]
    assert len(world.prompts.feedback) == 6  # fewer captions than tasks: they come back
    people = real_world(SMALL, tmp_path, corrupted_candidates=False)
    with pytest.raises(UserError, match="only a person can judge"):
        people.annotator_view(tmp_path)


def test_stage_plan_keeps_the_stated_shares():
    config = CandidatesConfig(base_fraction=0.4, refiner_fraction=0.4)
    plan = plan_stages(config, 20)
    kinds = [len(set(stages)) for stages in plan]
    assert len(plan) == 20
    assert kinds.count(2) == 4
    assert sum(stages == ["base"] * 4 for stages in plan) == 8
    assert plan == plan_stages(config, 20)


def test_strays_are_made_from_a_prompt_much_like_the_tasks_own():
    prompts = ["a red disc moves left", "a red disc moves right", "two ships at sea", "nothing"]
    config = CandidatesConfig(stray_fraction=0.25)
    made = [[strayed(config, prompts, task, slot) for slot in range(400)] for task in range(2)]
    assert made == [[strayed(config, prompts, t, slot) for slot in range(400)] for t in range(2)]
    for task, own in enumerate(made):
        strays = [prompt for prompt in own if prompt != prompts[task]]
        assert set(strays) == {prompts[1 - task]}  # the most alike of so few
        assert 0.18 < len(strays) / len(own) < 0.32
    assert strayed(CandidatesConfig(stray_fraction=1), ["alone"], 0, 0) == "alone"


def test_fractions_above_one_are_refused():
    with pytest.raises(ValueError, match="exceed 1"):
        CandidatesConfig(base_fraction=0.7, refiner_fraction=0.7)


def test_a_spoiled_copy_is_recognised_after_encoding(tmp_path):
    torch.manual_seed(0)
    clip = torch.nn.functional.interpolate(
        torch.rand(1, 3, 9, 8, 8), (9, 64, 64), mode="trilinear"
    )[0]
    kinds = [None, "blur", "noise", "freeze"]
    rows = []
    for slot, kind in enumerate(kinds):
        frames = clip if kind is None else corrupt(kind, clip, strength=0.9, seed=slot)
        write_video(tmp_path / f"{slot}.mp4", frames, 8.0)
        rows.append(
            {
                "path": f"{slot}.mp4",
                "prompt": "p",
                "corruption": kind,
                "strength": 0.9 if kind else 0.0,
            }
        )
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    oracle = CorruptionOracle(tmp_path)
    from reelhf.video import read_video

    for row in read_manifest(tmp_path):
        write_video(tmp_path / "shown.mp4", read_video(row["path"])[0], 8.0, crf=20)
        seen = oracle(read_video(tmp_path / "shown.mp4")[0].float() / 255, "p", 8.0)
        worst = min(seen, key=seen.__getitem__)
        if row["corruption"] is None:
            assert set(seen.values()) == {1.0}
        else:
            assert seen[worst] == pytest.approx(0.1)

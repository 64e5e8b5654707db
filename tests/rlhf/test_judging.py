"""The loop's annotation step, with simulated annotators and with a person at the page."""

from __future__ import annotations

import json
import threading

import pytest

from annotation.api.server import running_server
from annotation.client import AnnotationClient
from annotation.records import Choice, Verdict, read_preferences
from generator.toyworld import render, scene_from_caption
from reelhf.video import write_video
from rlhf.judging import (
    HUMAN,
    PREFERENCES,
    PROJECT,
    HumanSession,
    JudgingConfig,
    add_before_after_tasks,
    create_human_tasks,
    finish_human,
    human_app,
    human_share,
    judge_simulated,
    judgments_digest,
    open_project,
    read_groups,
    simulated_panels,
    wait_for_human,
)
from rlhf.world import PromptsConfig, toy_world

WORLD = toy_world(PromptsConfig(feedback=3, held_out=2, training=3, validation=1, test=2))
PROMPTS = (WORLD.prompts.feedback, WORLD.prompts.held_out)
SMALL = JudgingConfig(annotators=2, judgments_per_task=1, human_tasks=3)


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    """Rendered clips in place of generated ones: three feedback and two held-out tasks."""
    folder = tmp_path_factory.mktemp("candidates")
    rows = []
    for task, prompt in enumerate([*PROMPTS[0], *PROMPTS[1]]):
        scene = scene_from_caption(prompt)
        assert scene is not None
        for slot in range(4):
            frames = render(scene, num_frames=5, size=32, fps=8, seed=slot)
            path = folder / f"{task}_{slot}.mp4"
            write_video(path, frames * (1 - 0.2 * slot), 8.0)
            rows.append(
                {
                    "prompt": prompt,
                    "task": task,
                    "stage": "base",
                    "seed": 10 * task + slot,
                    "path": path.name,
                }
                | {"model": "toy", "checkpoint": "abc", "fps": 8.0}
            )
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_simulated_annotators_judge_every_task_and_the_panels_stay_apart(candidates, tmp_path):
    out = judge_simulated(SMALL, candidates, prompts=PROMPTS, gold=WORLD.gold, out=tmp_path / "out")
    data, groups = read_preferences(out / PREFERENCES), read_groups(out)
    assert len({(row["task_id"], row["annotator"]) for row in data.judgments}) == 5
    assert all(row["simulated"] for row in data.judgments)
    by_prompt: dict[str, set[str]] = {}
    for row in data.judgments:
        by_prompt.setdefault(row["prompt_id"], set()).add(row["annotator"])
    for prompt, annotators in by_prompt.items():
        own = (
            groups.feedback_annotators
            if prompt in groups.feedback_prompt_ids
            else groups.held_out_annotators
        )
        assert annotators <= set(own or ())


def test_panels_are_alike():
    first, second = simulated_panels(JudgingConfig(annotators=8))
    kinds = [[profile.name.rsplit("-", 1)[0] for profile in panel] for panel in (first, second)]
    assert len(first) == len(second) == 4
    assert kinds[0].count("careful") == kinds[1].count("careful")


def test_a_person_gets_two_thirds_feedback_tasks_or_all_of_them_with_a_top_up():
    assert human_share(JudgingConfig(), (80, 48), top_up=False) == (8, 4)
    assert human_share(JudgingConfig(), (80, 48), top_up=True) == (12, 0)
    assert human_share(JudgingConfig(), (5, 48), top_up=True) == (5, 0)


def _session(candidates, folder):
    store, groups = open_project(folder / PROJECT, candidates)
    share = human_share(SMALL, (3, 2), top_up=False)
    create_human_tasks(store, groups, share, 3)
    site, account = human_app(store, wanted=sum(share))
    return store, groups, share, site, account


def _judge(url, password, count):
    with AnnotationClient(url, HUMAN, password) as client:
        for _ in range(count):
            task = client.claim()
            assert task is not None
            client.submit(task, Verdict(tuple(Choice(d, 0, 3) for d in task.dimensions)))


def test_a_person_judges_and_the_loop_goes_on_with_those_votes_alone(candidates, tmp_path):
    store, groups, share, site, account = _session(candidates, tmp_path)
    store.set_password(HUMAN, "a long password")
    said: list[str] = []
    with store, running_server(site) as url:
        person = threading.Thread(target=_judge, args=(url, "a long password", 3))
        person.start()
        wait_for_human(store, 3, said.append)
        person.join()
        session = HumanSession(store, account, groups, url, url)
        out = finish_human(
            SMALL, session, prompts=PROMPTS, share=share, gold=None, top_up=False, out=tmp_path
        )
    assert "3 of 3 tasks judged" in said[-1]
    data = read_preferences(out / PREFERENCES)
    assert {row["simulated"] for row in data.judgments} == {False}
    found = read_groups(out)
    assert found.feedback_annotators is None
    assert (len(found.feedback_prompt_ids), len(found.held_out_prompt_ids)) == share


def test_a_top_up_is_marked_and_leaves_the_held_out_panel_apart(candidates, tmp_path):
    store, groups = open_project(tmp_path / PROJECT, candidates)
    share = human_share(JudgingConfig(human_tasks=2), (3, 2), top_up=True)
    create_human_tasks(store, groups, share, 3)
    site, account = human_app(store, wanted=2)
    store.set_password(HUMAN, "a long password")
    with store, running_server(site) as url:
        _judge(url, "a long password", 2)
        session = HumanSession(store, account, groups, url, url)
        out = finish_human(
            SMALL, session, prompts=PROMPTS, share=share, gold=WORLD.gold, top_up=True, out=tmp_path
        )
        counts = store.counts()
    assert counts["human_judgments"] == 2
    assert counts["simulated_judgments"] == 3
    found = read_groups(out)
    assert account.pseudonym in (found.feedback_annotators or ())
    assert account.pseudonym not in (found.held_out_annotators or ())
    marked = {
        row["annotator"]: row["simulated"] for row in read_preferences(out / PREFERENCES).judgments
    }
    assert marked.pop(account.pseudonym) is False
    assert set(marked.values()) == {True}


def test_opening_the_project_again_keeps_clips_tasks_and_judgments(candidates, tmp_path):
    store, _, _, site, _ = _session(candidates, tmp_path)
    store.set_password(HUMAN, "a long password")
    with store, running_server(site) as url:
        _judge(url, "a long password", 1)
        before, digest = store.counts(), judgments_digest(store)
    again, groups, *_ = _session(candidates, tmp_path)
    with again:
        assert again.counts() == before
        assert judgments_digest(again) == digest
        assert [len(group) for group in groups] == [4] * 5


def test_before_and_after_become_blind_tasks(candidates, tmp_path):
    pairs = [
        {
            "prompt": PROMPTS[0][0],
            "seed": 5,
            "clips": {"before": ["0_0.mp4", "0_1.mp4"], "after": ["0_2.mp4", "0_3.mp4"]},
        }
    ]
    for name in ("0_0.mp4", "0_1.mp4", "0_2.mp4", "0_3.mp4"):
        (tmp_path / name).write_bytes((candidates / name).read_bytes())
    (tmp_path / "comparison.json").write_text(json.dumps({"role": "base", "pairs": pairs}))
    store, _ = open_project(tmp_path / PROJECT, candidates)
    with store:
        assert len(add_before_after_tasks(store, [tmp_path])) == 1
        assert store.counts()["open_tasks"] == 1

"""A person's part of the annotation step: what is asked, what is kept, what comes out."""

from __future__ import annotations

import json
import threading
import time

import pytest
from rendered_candidates import write_candidates

from annotation.api.server import running_server
from annotation.client import AnnotationClient
from annotation.records import Choice, Verdict, read_preferences
from reelhf.errors import UserError
from rlhf.human_judging import (
    HUMAN,
    add_before_after_tasks,
    assign,
    export_human,
    human_app,
    human_share,
    verdicts_key,
    wait_for_human,
)
from rlhf.judging import PREFERENCES, PROJECT, JudgingConfig, open_project, read_groups
from rlhf.world import PromptsConfig, toy_world

WORLD = toy_world(PromptsConfig(feedback=3, held_out=2, training=3, validation=1, test=2))
PROMPTS = (WORLD.prompts.feedback, WORLD.prompts.held_out)
PASSWORD = "a long password"


def asking(tasks: int) -> JudgingConfig:
    return JudgingConfig(annotators=2, judgments_per_task=1, human_tasks=tasks)


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    """Three feedback and two held-out tasks."""
    return write_candidates(tmp_path_factory.mktemp("candidates"), [*PROMPTS[0], *PROMPTS[1]])


@pytest.fixture
def work(candidates, tmp_path):
    """`work(config)` opens the project as a run of the loop does and signs the person in: (assignment, client)."""
    opened = []

    def open_it(config: JudgingConfig, *, top_up: bool = False):
        assignment = assign(config, tmp_path, candidates, prompts=PROMPTS, top_up=top_up)
        assignment.store.set_password(HUMAN, PASSWORD)
        server = running_server(human_app(assignment.store, wanted=assignment.num_tasks))
        client = AnnotationClient(server.__enter__(), HUMAN, PASSWORD)
        opened.append((client, server, assignment.store))
        return assignment, client

    yield open_it
    for client, server, store in opened:
        client.close()
        server.__exit__(None, None, None)
        store.close()


def judge(client: AnnotationClient, count: int) -> None:
    for _ in range(count):
        task = client.claim()
        assert task is not None
        time.sleep(0.25)  # at twice the speed, the clips have been seen by then
        choices = tuple(Choice(d, 0, 3) for d in task.dimensions)
        client.submit(task, Verdict(choices, watched_seconds=(0.6,) * task.num_clips))


def test_a_person_gets_two_thirds_feedback_tasks_or_all_of_them_with_a_top_up():
    assert human_share(JudgingConfig(), (80, 48), top_up=False) == (8, 4)
    assert human_share(JudgingConfig(), (80, 48), top_up=True) == (12, 0)
    assert human_share(JudgingConfig(), (5, 48), top_up=True) == (5, 0)


def test_a_person_judges_and_the_loop_goes_on_with_those_votes_alone(work, candidates, tmp_path):
    assignment, client = work(asking(3))
    said: list[str] = []
    person = threading.Thread(target=judge, args=(client, 3))
    person.start()
    wait_for_human(assignment, said.append)
    person.join()
    out = export_human(assignment, asking(3), candidates=candidates, gold=None, out=tmp_path)
    assert "3 of 3 tasks judged" in said[-1]
    data = read_preferences(out / PREFERENCES)
    assert {row["simulated"] for row in data.judgments} == {False}
    found = read_groups(out)
    assert found.feedback_annotators is None
    assert (len(found.feedback_prompt_ids), len(found.held_out_prompt_ids)) == (2, 1)


def test_a_skipped_task_is_not_waited_for(work):
    assignment, client = work(asking(3))
    client.skip(client.claim(), "cannot_tell")
    judge(client, 2)
    said: list[str] = []
    wait_for_human(assignment, said.append)
    assert said == ["      2 of 3 tasks judged, 1 skipped: going on. The page stays open."]


def test_rewards_without_a_single_verdict_are_refused_in_words(work):
    assignment, client = work(asking(3))
    judge(client, 2)
    client.skip(client.claim(), "broken_clip")
    with pytest.raises(UserError, match="skipped all 1 tasks of the held-out prompts"):
        wait_for_human(assignment, print)


def test_a_top_up_is_marked_and_leaves_the_held_out_panel_apart(work, candidates, tmp_path):
    assignment, client = work(asking(2), top_up=True)
    judge(client, 2)
    export = {"candidates": candidates, "gold": WORLD.gold, "out": tmp_path}
    out = export_human(assignment, asking(2), **export)
    counts = assignment.store.counts()
    assert counts["human_judgments"] == 2
    assert counts["simulated_judgments"] == 3
    found, me = read_groups(out), assignment.account.pseudonym
    assert me in (found.feedback_annotators or ())
    assert me not in (found.held_out_annotators or ())
    marked = {
        row["annotator"]: row["simulated"] for row in read_preferences(out / PREFERENCES).judgments
    }
    assert marked.pop(me) is False
    assert set(marked.values()) == {True}

    key = verdicts_key(assignment.store, out)
    again, _ = work(asking(2), top_up=True)
    wait_for_human(again, print)
    export_human(again, asking(2), **export)
    assert again.store.counts() == counts, "the same command again asks nobody twice"
    assert verdicts_key(again.store, out) == key


def test_asking_for_more_keeps_what_was_judged_and_asks_for_the_rest(work):
    first, client = work(asking(2))
    judge(client, 2)
    wait_for_human(first, print)
    more, client = work(asking(4))
    assert set(first.parts[0].tasks) < set(more.parts[0].tasks)
    judge(client, 2)
    assert client.claim() is None
    wait_for_human(more, print)
    assert more.store.counts()["human_judgments"] == more.store.counts()["tasks"] == 4


def test_who_teaches_which_rewards_is_part_of_the_key(work, candidates, tmp_path):
    keys = []
    for config in (asking(3), asking(2)):
        assignment, client = work(config)
        judge(client, 3 if not keys else 0)
        export_human(assignment, config, candidates=candidates, gold=None, out=tmp_path)
        keys.append(verdicts_key(assignment.store, tmp_path))
    assert keys[0] != keys[1]


def test_before_and_after_become_blind_tasks(candidates, tmp_path):
    names = ("0_0.mp4", "0_1.mp4", "0_2.mp4", "0_3.mp4")
    for name in names:
        (tmp_path / name).write_bytes((candidates / name).read_bytes())
    clips = {"before": names[:2], "after": names[2:]}
    pairs = [{"prompt": PROMPTS[0][0], "seed": 5, "clips": clips}]
    (tmp_path / "comparison.json").write_text(json.dumps({"role": "base", "pairs": pairs}))
    store, _ = open_project(tmp_path / PROJECT, candidates)
    with store:
        assert len(add_before_after_tasks(store, [tmp_path])) == 1
        assert store.counts()["open_tasks"] == 1

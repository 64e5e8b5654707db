"""The loop's annotation step with simulated annotators."""

from __future__ import annotations

import pytest
from rendered_candidates import write_candidates

from annotation.records import read_preferences
from rlhf.judging import (
    PREFERENCES,
    JudgingConfig,
    judge_simulated,
    read_groups,
    simulated_panels,
)
from rlhf.world import PromptsConfig, toy_world

WORLD = toy_world(PromptsConfig(feedback=3, held_out=2, training=3, validation=1, test=2))
PROMPTS = (WORLD.prompts.feedback, WORLD.prompts.held_out)
SMALL = JudgingConfig(annotators=2, judgments_per_task=1)


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    """Three feedback and two held-out tasks."""
    return write_candidates(tmp_path_factory.mktemp("candidates"), [*PROMPTS[0], *PROMPTS[1]])


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

"""Leave-one-out folds share nothing they must not share, and their summary is a hand table's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_rewards import smooth_clip, tiny_models, write_tiny_preferences

from reelhf.errors import UserError
from rewards.data import RewardTask, Vote
from rewards.evaluation import cross_validate as module
from rewards.evaluation.cross_validate import (
    CrossValidateConfig,
    cross_validate,
    format_cross_validation,
    summarise,
)
from rewards.evaluation.folds import leave_one_out, without_clips
from rewards.train import RewardTrainConfig

LOOK = "aesthetic_quality"


def task(number: int) -> RewardTask:
    votes = tuple(Vote(a, b, LOOK, 1, 1.0, True, False) for a, b in ((0, 1), (1, 2), (2, 0)))
    clips = tuple(f"{maker}{number}" for maker in "xyz")
    return RewardTask(f"t{number}", "text", f"p{number}", "train", clips, votes)


TASKS = [task(i) for i in range(4)]
MAKERS = {f"{maker}{i}": maker for maker in "xyz" for i in range(4)}


def test_a_prompt_left_out_is_in_no_training_task():
    folds = list(leave_one_out(TASKS, "prompt", MAKERS))
    assert [fold.name for fold in folds] == ["p0", "p1", "p2", "p3"]
    for fold in folds:
        assert fold.name not in {t.prompt_id for t in fold.training}
        assert len(fold.training) == 3
        assert {t.prompt_id for t, _ in fold.held} == {fold.name}
        assert len(fold.held) == 3


def test_a_generator_left_out_has_no_clip_in_training_and_one_in_every_held_pair():
    for fold in leave_one_out(TASKS, "generator", MAKERS):
        assert fold.name not in {MAKERS[sha] for t in fold.training for sha in t.clips}
        assert [len(t.votes) for t in fold.training] == [1] * 4
        assert len(fold.held) == 8
        for t, vote in fold.held:
            assert fold.name in (MAKERS[t.clips[vote.a]], MAKERS[t.clips[vote.b]])


def test_verdicts_keep_their_clips_when_others_go():
    cut = without_clips(TASKS[1], {"x1"})
    assert cut.clips == ("y1", "z1")
    assert [(cut.clips[v.a], cut.clips[v.b], v.preference) for v in cut.votes] == [("y1", "z1", 1)]
    assert without_clips(TASKS[1], {"x1", "y1"}).votes == ()


def row(verdict: int, reward: float, prompt: str, **others: float) -> dict[str, Any]:
    baselines = {"majority": 1, "generator": 0.0, "sharpness": -1.0} | others
    found = {"verdict": verdict, "reward": reward, "prompt_id": prompt, "left_out": "x"}
    return found | baselines | {"threshold": 0.5, "dimension": LOOK}


def test_the_summary_of_four_verdicts_by_hand():
    rows = [row(1, 2.0, "a"), row(1, -1.0, "a"), row(-1, -3.0, "b"), row(0, 0.2, "b")]
    found = summarise(rows, "generator")
    assert found["n"] == 3
    assert found["reward"]["accuracy"] == pytest.approx(2 / 3)
    assert found["majority"]["accuracy"] == pytest.approx(2 / 3)
    assert found["generator"]["accuracy"] == 0.5  # it cannot tell
    assert found["sharpness"]["accuracy"] == pytest.approx(1 / 3)
    assert found["with_ties"]["accuracy"] == pytest.approx(3 / 4)
    assert found["with_ties"]["tie_share"] == pytest.approx(1 / 4)
    assert found["by_generator"]["x"] == {"accuracy": pytest.approx(2 / 3), "n": 3}
    assert found["reward_minus"]["majority"] == (-0.5, 1.0)  # both from a, one each, both from b
    text = format_cross_validation({"generator": {LOOK: found}})
    assert "one generator left out" in text
    assert f"{LOOK}: not shown to be better than chance, majority, generator" in text


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_preferences(
        tmp_path_factory.mktemp("preferences") / "data",
        quality=lambda i: i % 3,
        make=lambda i: 0.4 * smooth_clip(i, 3, 32) + 0.3 * (i % 3),  # brighter is better
        num_tasks=3,
        clips_per_task=3,
    )


def test_every_prompt_is_predicted_by_a_reward_that_never_saw_it_and_folds_are_kept(
    preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tiny_models()["aesthetic"].save(tmp_path / "backbones" / "aesthetic")
    train = RewardTrainConfig(models=("aesthetic",), epochs=6, head_lr=5e-3, tasks_per_batch=2)
    config = CrossValidateConfig(leave=("prompt",), train=train)
    path = cross_validate(config, preferences, tmp_path / "backbones", tmp_path / "out")
    result = json.loads(path.read_text())
    found = result["prompt"][LOOK]
    assert found["folds"] == found["prompts"] == 3
    assert found["n"] == 6
    assert found["reward"]["accuracy"] > 0.7  # brightness is easy
    before = path.read_text()
    monkeypatch.setattr(module, "fit", lambda *_, **__: pytest.fail("trained again"))
    cross_validate(config, preferences, tmp_path / "backbones", tmp_path / "out")
    assert path.read_text() == before


def test_an_ensemble_predicts_with_all_its_members(
    preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tiny_models()["aesthetic"].save(tmp_path / "backbones" / "aesthetic")
    taught, whole = [], []
    fit, score = module.fit, module.score_clips

    def remember(model: Any, tasks: Any, clips: Any, config: Any, **options: Any) -> Any:
        taught.append((config.seed, len(tasks)))
        return fit(model, tasks, clips, config, **options)

    def compare(model: Any, clips: Any, wanted: Any) -> Any:
        found = score(model, clips, wanted)
        if hasattr(model, "members"):
            each = [score(m, clips, wanted) for m in model.members]
            for key, value in found.items():
                z = [(s[key] - m.mean) / m.std for s, m in zip(each, model.members, strict=True)]
                torch.testing.assert_close(value, torch.stack(z).mean(0))
            whole.append(len(model.members))
        return found

    monkeypatch.setattr(module, "fit", remember)
    monkeypatch.setattr(module, "score_clips", compare)
    train = RewardTrainConfig(models=("aesthetic",), epochs=1, ensemble=2, seed=5)
    config = CrossValidateConfig(leave=("prompt",), train=train)
    cross_validate(config, preferences, tmp_path / "backbones", tmp_path / "out")
    assert taught == [(5, 2), (6, 2)] * 3
    assert whole == [2] * 3


def test_a_missing_backbone_is_named(preferences: Path, tmp_path: Path):
    with pytest.raises(
        UserError, match=r"no backbone at .*foundational; `reelhf rewards pretrain`"
    ):
        cross_validate(CrossValidateConfig(), preferences, tmp_path, tmp_path / "out")

"""An evaluation end to end on tiny models, its page, and what it is made of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_rewards import CAPTIONS, smooth_clip, tiny_models, write_tiny_preferences

from annotation.records import read_preferences
from reelhf.cli import main
from reelhf.errors import UserError
from rewards.base import RewardScores
from rewards.data import Clip, RewardTask, Vote, load_tasks
from rewards.evaluation.baselines import majority_verdict
from rewards.evaluation.details import describe_ties
from rewards.evaluation.held_out import Subject, evaluate_rewards, position_flips
from rewards.evaluation.page import _probes, not_better, render, write_page
from rewards.evaluation.pairs import verdict_pairs
from rewards.evaluation.people import people_agreement, rank_correlation, win_balance
from rewards.evaluation.probes import SEVERITIES, describe_ladder, probe_corruptions

LOOK = "aesthetic_quality"


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    tiny_models()["aesthetic"].save(folder / "aesthetic")
    return folder


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_preferences(
        tmp_path_factory.mktemp("preferences") / "data",
        quality=lambda i: (i * 7) % 11,
        make=lambda i: smooth_clip(i, 3, 32),
        num_tasks=30,
        clips_per_task=3,
    )


@pytest.fixture(scope="module")
def evaluated(
    rewards: Path, preferences: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("evaluation")
    return out, evaluate_rewards(rewards, preferences, out, thorough=True)


def test_the_thorough_evaluation_leaves_the_headline_as_it_is(
    rewards: Path, preferences: Path, evaluated: tuple[Path, dict[str, Any]], tmp_path: Path
):
    quick = evaluate_rewards(rewards, preferences, tmp_path)
    thorough = json.loads(json.dumps(evaluated[1]))
    details = thorough["dimensions"][LOOK].pop("details")
    assert thorough == json.loads((tmp_path / "evaluation.json").read_text())
    assert quick["dimensions"][LOOK]["n"] == details["by_stage"]["base"]["n"]
    assert details["by_model"]["toy"]["accuracy"] == quick["dimensions"][LOOK]["accuracy"]
    assert details["ties"]["threshold_chosen_on"] == "validation"
    assert details["ties"]["tie_share"] == 0.0
    assert details["people"] is None  # each task was judged once
    assert set(details["probes"]) == {"blur", "blocks", "noise", "colour", "flicker"}
    assert all(row["clips"] > 0 for row in details["probes"].values())


def test_the_page_tells_what_the_numbers_do_not_show(evaluated: tuple[Path, dict[str, Any]]):
    result = json.loads(json.dumps(evaluated[1]))
    result["dimensions"][LOOK] |= {"accuracy": 0.6, "interval": [0.45, 0.7], "sharpness": 0.5}
    page = render(result)
    for part in ("accuracy", "ties", "calibration", "people", "sources", "probes", "slots"):
        assert f"<section id='{part}'>" in page
    assert "Aesthetic quality: not shown to be better than every baseline" in page
    assert "src='http" not in page
    assert "None" not in page
    assert ">nan" not in page


def test_a_corruption_that_had_nothing_to_change_has_neither_passed_nor_failed():
    rows = {
        "freeze": {"lowered": None, "monotone": None, "rank": None, "drop": None, "clips": 0},
        "jitter": {"lowered": 1.0, "monotone": 1.0, "rank": -1.0, "drop": None, "clips": 3},
        "drift": {"lowered": 0.0, "monotone": 0.0, "rank": 1.0, "drop": None, "clips": 3},
    }
    table = _probes({"motion_quality": {"probes": rows}})
    frozen, jittered, drifted = table.split("<tr>")[2:]
    assert "status" not in frozen
    assert "status pass" in jittered
    assert "status fail" in drifted


def test_a_page_of_a_quick_evaluation_has_no_empty_sections(evaluated: tuple[Path, dict[str, Any]]):
    result = json.loads(json.dumps(evaluated[1]))
    del result["dimensions"][LOOK]["details"]
    page = render(result)
    assert "id='accuracy'" in page
    assert "id='probes'" not in page


def test_a_reward_is_better_only_where_its_interval_says_so():
    row = {"accuracy": 0.8, "interval": (0.7, 0.9), "chance": 0.5, "sharpness": 0.6}
    row["stage_identity"] = 0.5
    assert not_better(row) is None
    assert not_better(row | {"sharpness": 0.75}) == (
        "its interval reaches down to 0.70, sharpness has 0.75"
    )
    assert not_better(row | {"sharpness": 0.85}) == "0.80 against 0.85 of sharpness"
    assert not_better(row | {"accuracy": None}) == "no same-stage pairs to measure on"


def test_the_command_writes_both_files_and_a_folder_without_rewards_is_one_line(
    rewards: Path, preferences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main(["rewards", "eval", str(rewards), "--preferences", str(preferences), "--out", str(tmp_path / "e"), "--quick"])  # fmt: skip
    assert (tmp_path / "e" / "report.html").is_file()
    assert str(tmp_path / "e" / "report.html") in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no reward model; expected one of foundational"):
        evaluate_rewards(tmp_path, preferences, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="rewards eval"):
        write_page(tmp_path)


def test_no_tie_threshold_is_chosen_on_pairs_it_is_reported_on(
    rewards: Path, preferences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["rewards", "eval", str(rewards), "--preferences", str(preferences), "--out"]
    main([*words, str(tmp_path / "v"), "--split", "validation"])
    of_validation = json.loads((tmp_path / "v" / "evaluation.json").read_text())
    ties = of_validation["dimensions"][LOOK]["details"]["ties"]
    assert ties["threshold_chosen_on"] == "train"
    main([*words, str(tmp_path / "a"), "--split", "all"])
    of_all = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert of_all["split"] is None
    assert of_all["dimensions"][LOOK]["details"]["ties"]["threshold_chosen_on"] is None
    with pytest.raises(SystemExit):
        main([*words, str(tmp_path / "x"), "--split", "tset"])
    assert "split 'tset'; expected test, validation, train or all" in capsys.readouterr().err


def task(votes: list[tuple[int, int, int]], number: int = 0, clips: int = 3) -> RewardTask:
    made = tuple(Vote(a, b, LOOK, verdict, 1.0, True, True) for a, b, verdict in votes)
    names = tuple(f"{number}-{i}" for i in range(clips))
    return RewardTask(f"t{number}", "a disc", f"p{number}", "test", names, made)


def test_people_and_reward_are_compared_on_the_same_pairs():
    def row(annotator: str, a: str, b: str, verdict: int, number: int) -> dict[str, Any]:
        return {
            "annotator": annotator,
            "clip_a": a,
            "clip_b": b,
            "preference": verdict,
            "constrained": False,
            "prompt_id": f"p{number}",
            "task_id": f"t{number}",
        }

    score = {"x": 1.0, "y": 0.0, "z": -1.0}
    rows = [
        row("ann", "x", "y", 1, 0),
        row("bob", "y", "x", -1, 0),  # the same opinion, seen the other way round
        row("ann", "y", "z", 1, 1),
        row("bob", "y", "z", -1, 1),
        row("cat", "y", "z", 1, 1),
        row("ann", "x", "z", -1, 2),  # alone: nobody to agree with
        row("bob", "x", "z", 0, 2),  # a tie decides nothing
    ]
    found = people_agreement(rows, lambda r: score[r["clip_a"]] - score[r["clip_b"]])
    assert found is not None
    assert found["pairs"] == 2
    assert found["people"] == pytest.approx((1 + 1 / 3) / 2)
    assert found["reward"] == pytest.approx((1 + 2 / 3) / 2)
    assert people_agreement(rows[-2:], lambda r: 0.0) is None


def test_a_score_in_the_order_of_the_wins_has_rank_correlation_one():
    tasks = [task([(0, 1, 1), (1, 2, 1), (0, 2, 1)]), task([(0, 1, -1), (2, 1, -1), (0, 2, 1)], 1)]
    assert win_balance(tasks[0], LOOK) == {0: 1.0, 1: 0.0, 2: -1.0}
    order = {"0-0": 3, "0-1": 2, "0-2": 1, "1-1": 9, "1-0": 8, "1-2": 7}
    found = rank_correlation(tasks, LOOK, lambda t, i: order[t.clips[i]])
    assert found["within_tasks"] == pytest.approx(1.0)
    assert found["tasks"] == 2
    assert found["all_clips"] < 1.0  # the second task's worst outscores the first's best
    reverse = rank_correlation(tasks, LOOK, lambda t, i: -order[t.clips[i]])
    assert reverse["within_tasks"] == pytest.approx(-1.0)


def test_the_tie_threshold_comes_from_other_pairs_and_the_published_number_is_kept_apart():
    tasks = [task([(0, 1, 0), (1, 2, 1), (0, 2, 1)])]
    scores = [1.0, 0.6, 0.5]
    pairs = verdict_pairs(tasks, LOOK)
    found = describe_ties(
        lambda t, i: scores[i], pairs, threshold=0.2, chosen_on="validation", majority=0
    )
    assert found is not None
    assert found["accuracy"] == pytest.approx(1 / 3)  # gaps .4, .1, .5 against tie, win, win
    assert found["published_convention"] == pytest.approx(2 / 3)
    assert found["majority"] == pytest.approx(1 / 3)
    assert majority_verdict(pairs) == 1
    assert describe_ties(lambda t, i: 0.0, [], threshold=0.0, chosen_on=None, majority=0) is None


def test_a_ladder_of_scores_by_hand():
    scores = torch.tensor([[4.0, 3.0, 2.0], [4.0, 5.0, 1.0], [0.0, 0.0, 1.0], [1.0, float("nan"), 0.0]])  # fmt: skip
    found = describe_ladder(scores, 2.0)
    assert found["clips"] == 3
    assert found["lowered"] == pytest.approx(2 / 3)
    assert found["monotone"] == pytest.approx(1 / 3)
    assert found["drop"] == pytest.approx([0.0, 0.0, (2 + 3 - 1) / 3 / 2])
    assert describe_ladder(torch.full((2, 3), float("nan")), 1.0)["lowered"] is None


class DarkIsBad(torch.nn.Module):
    """Scores a clip by how far it is from its own darkest: any loss of contrast lowers it."""

    dimensions, compares = (LOOK,), False
    std = torch.ones(1)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def select(self, *_: Any) -> None:
        return None

    def score(self, frames: torch.Tensor, **_: Any) -> RewardScores:
        flat = frames.flatten(3)
        sharp = flat.diff(dim=-1).abs().mean((1, 2, 3))[:, None]
        return RewardScores(self.weight * sharp, torch.ones(len(frames), dtype=torch.bool))


def test_a_sharpness_score_falls_with_every_severity_of_blur():
    noise = torch.randint(0, 256, (3, 4, 48, 48), generator=torch.Generator().manual_seed(0))
    clips = [(Clip(noise.to(torch.uint8), 8.0), CAPTIONS[0])]
    found = probe_corruptions(DarkIsBad(), 0, clips)["blur"]
    assert found["lowered"] == found["monotone"] == 1.0
    assert found["rank"] == pytest.approx(-1.0)
    assert found["drop"][0] == 0.0
    assert len(found["drop"]) == len(SEVERITIES)
    assert probe_corruptions(DarkIsBad(), 0, [])["blur"]["clips"] == 0


class EarlyIsGood(DarkIsBad):
    """Knows the order of frames: the darker the first ones, the better."""

    dimensions = ("motion_quality",)

    def score(self, frames: torch.Tensor, **_: Any) -> RewardScores:
        time = torch.arange(frames.shape[2], dtype=torch.float)
        late = (frames.mean((1, 3, 4)) * time).sum(1, keepdim=True)
        return RewardScores(self.weight * late, torch.ones(len(frames), dtype=torch.bool))


def test_a_corruption_is_measured_on_the_clips_it_changes():
    still = torch.full((3, 9, 16, 16), 80, dtype=torch.uint8)
    rising = still + torch.arange(0, 90, 10, dtype=torch.uint8).view(1, 9, 1, 1)
    clips = [(Clip(frames, 8.0), CAPTIONS[0]) for frames in (still, rising, rising)]
    found = probe_corruptions(EarlyIsGood(), 0, clips)
    assert found["shuffle"]["clips"] == found["freeze"]["clips"] == 2
    assert found["shuffle"]["lowered"] == 1.0


class SecondIsBetter(DarkIsBad):
    """A comparing model that follows the order it is shown in whenever the clips are much alike."""

    compares = True

    def score(self, frames: torch.Tensor, *, reference: torch.Tensor, **_: Any) -> RewardScores:
        gap = frames.mean((1, 2, 3, 4)) - reference.mean((1, 2, 3, 4))
        flips = (gap.abs() < 0.2).float()
        return RewardScores(gap[:, None], torch.ones(1, dtype=torch.bool), None, {"position_flip": flips})  # fmt: skip


def test_the_flips_of_a_comparing_model_are_those_of_its_decided_pairs(preferences: Path):
    tasks = [task([(0, 1, 1), (0, 2, -1), (1, 2, 1), (0, 2, 0)])]
    levels = {"0-0": 0, "0-1": 255, "0-2": 20}
    clips = {
        name: Clip(torch.full((3, 2, 4, 4), level, dtype=torch.uint8), 8.0)
        for name, level in levels.items()
    }
    data = read_preferences(preferences)
    subject = Subject(data, tasks, [], clips, {}, {})
    assert position_flips(SecondIsBetter(), subject, LOOK) == pytest.approx(1 / 3)
    assert position_flips(SecondIsBetter(), replace(subject, tasks=[]), LOOK) is None


def test_rows_of_the_held_out_split_alone_are_counted(preferences: Path, evaluated: Any):
    held = load_tasks(preferences, splits=("test",))
    assert evaluated[1]["tasks"] == len(held) > 0

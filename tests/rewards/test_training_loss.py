"""Which loss, which weights: from judged tasks to one number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_rewards import AESTHETIC, CAPTIONS, smooth_clip, tiny_models, write_tiny_preferences
from torch import Tensor

from reelhf.errors import UserError
from rewards import load_reward, train
from rewards.aesthetic import AestheticReward
from rewards.data import Clip, Pick, RewardTask, Vote, load_tasks
from rewards.losses import best_worst_loss, bradley_terry_ties_loss, gaussian_preference_loss
from rewards.training.config import LossConfig, RewardTrainConfig
from rewards.training.loss import TaskScores, tie_widths, verdict_loss
from rewards.training.weights import annotator_weights, weighted

NAMES = ("motion_quality", "aesthetic_quality")
WIDTH = torch.tensor([0.3, 0.6])


def vote(a: int, b: int, preference: int, dimension: str = NAMES[0], **more: object) -> Vote:
    return Vote(a, b, dimension, preference, 1.0, True, True, **more)  # type: ignore[arg-type]


def task(*votes: Vote, picks: tuple[Pick, ...] = (), num_clips: int = 4) -> RewardTask:
    return RewardTask("t", CAPTIONS[0], "p", "train", tuple("abcd")[:num_clips], votes, picks)


def scores(values: Tensor, std: Tensor | None = None) -> TaskScores:
    return TaskScores(values, std, [0])


def loss(values: Tensor, one: RewardTask, config: LossConfig, std: Tensor | None = None) -> Tensor:
    return verdict_loss(scores(values, std), [one], NAMES, tie_width=WIDTH, config=config)[0]


def test_best_worst_takes_the_place_of_the_pairs_of_its_own_judgment() -> None:
    values = torch.randn(4, 2)
    pick = Pick(2, 0, (3, 2, 1, 0), NAMES[0], judgment="j1")
    pairs = [vote(2, 0, 1, judgment="j1"), vote(2, 1, 1, judgment="j1")]
    tie = vote(1, 3, 0, judgment="j2")
    config = LossConfig(kind="best_worst")
    expected = best_worst_loss(values[None, [3, 2, 1, 0], 0], torch.tensor([1]), torch.tensor([3]))
    torch.testing.assert_close(loss(values, task(*pairs, picks=(pick,)), config), expected[0])
    of_tie = bradley_terry_ties_loss(
        values[1:2, 0], values[3:4, 0], torch.zeros(1), tie_width=WIDTH[0]
    )
    both = loss(values, task(*pairs, tie, picks=(pick,)), config)
    torch.testing.assert_close(both, (expected[0] + of_tie[0]) / 2)


def test_a_pick_whose_best_is_invalid_counts_nothing_and_any_other_invalid_clip_is_left_out() -> (
    None
):
    config = LossConfig(kind="best_worst")
    pick = Pick(2, 0, (0, 1, 2, 3), NAMES[0], judgment="j1")
    one = task(vote(2, 0, 1, judgment="j1"), picks=(pick,))
    values = torch.randn(4, 2)
    without = best_worst_loss(values[None, [0, 2, 3], 0], torch.tensor([1]), torch.tensor([0]))
    values[1] = float("nan")
    torch.testing.assert_close(loss(values, one, config), without[0])
    values[2] = float("nan")
    assert loss(values, one, config) == 0


def test_the_gradient_of_best_worst_is_finite_where_a_clip_is_invalid() -> None:
    raw = torch.randn(4, 2, requires_grad=True)
    values = raw.masked_fill(torch.tensor([False, True, False, False])[:, None], float("nan"))
    pick = Pick(2, 0, (0, 1, 2, 3), NAMES[0], judgment="j1")
    loss(values, task(picks=(pick,)), LossConfig(kind="best_worst")).backward()
    assert raw.grad is not None and raw.grad.isfinite().all()
    assert (raw.grad[[0, 2, 3], 0] != 0).all() and (raw.grad[1] == 0).all()


def test_the_gaussian_loss_reads_the_spread_of_each_clip() -> None:
    values, std = torch.randn(4, 2), torch.rand(4, 2) + 0.1
    one = task(vote(0, 1, 1), vote(2, 3, 0))
    expected = gaussian_preference_loss(
        values[[0, 2], 0],
        values[[1, 3], 0],
        std[[0, 2], 0],
        std[[1, 3], 0],
        torch.tensor([1, 0]),
        tie_width=WIDTH[0],
    )
    torch.testing.assert_close(loss(values, one, LossConfig(kind="gaussian"), std), expected.mean())


def test_an_annotator_nobody_agrees_with_weighs_less_and_the_mean_verdict_one() -> None:
    good = [vote(0, 1, 1, annotator="good", agreement=0.9) for _ in range(60)]
    bad = [vote(0, 1, 1, annotator="bad", agreement=0.34) for _ in range(60)]
    tasks = [task(*good, *bad)]
    weights = annotator_weights(tasks)
    assert weights["bad"] < 0.2 < 1.5 < weights["good"]
    (new,) = weighted(tasks, LossConfig(annotator_weights=True))
    assert sum(v.weight for v in new.votes) == pytest.approx(len(new.votes))
    assert annotator_weights([task(vote(0, 1, 1, annotator="alone"))]) == {"alone": 1.0}


def test_agreement_weighs_by_its_power_and_what_nobody_repeated_counts_fully() -> None:
    votes = [vote(0, 1, 1, agreement=a) for a in (1.0, 0.5, None)]
    (new,) = weighted([task(*votes)], LossConfig(agreement_power=2))
    assert [v.weight for v in new.votes] == [1.0, 0.25, 1.0]
    assert weighted([task(*votes)], LossConfig())[0].votes == tuple(votes)


def test_picks_are_read_from_free_judgments_only(tmp_path: Path) -> None:
    folder = write_tiny_preferences(
        tmp_path / "data", quality=float, make=lambda i: smooth_clip(i, 2, 16), num_tasks=3
    )
    tasks = load_tasks(folder)
    for one in tasks:
        (pick,) = one.picks
        explicit = next(v for v in one.votes if v.explicit)
        winner, loser = (explicit.a, explicit.b)[:: explicit.preference]
        assert (pick.best, pick.worst) == (winner, loser)
        assert sorted(pick.shown) == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def brightness_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[RewardTask], dict]:
    """Tasks of four flat clips, the brighter the better; every fourth task is a tie of two equal ones."""
    draws = torch.Generator().manual_seed(0)
    tasks, clips = [], {}
    for i in range(16):
        levels = torch.rand(4, generator=draws)
        if i % 4 == 0:
            levels[1] = levels[0]
        names = tuple(f"{i}-{k}" for k in range(4))
        for name, level in zip(names, levels, strict=True):
            clips[name] = Clip((torch.full((3, 3, 16, 16), float(level)) * 255).byte(), 8.0)
        order = levels.argsort().tolist()
        judgment = f"j{i}"
        votes = [
            replace(vote(order[3], k, 1, NAMES[1]), judgment=judgment, explicit=k == order[0])
            for k in order[:3]
        ]
        picks: tuple[Pick, ...] = (Pick(order[3], order[0], (0, 1, 2, 3), NAMES[1], judgment),)
        if i % 4 == 0:
            votes, picks = [vote(0, 1, 0, NAMES[1])], ()
        tasks.append(RewardTask(f"t{i}", CAPTIONS[i % 8], "p", "train", names, tuple(votes), picks))
    return tasks, clips


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "best_worst"},
        {"kind": "gaussian"},
        {"ties": "learned"},
        {"margin": 0.5, "ties": 0.2},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_every_loss_learns_what_is_better(brightness_data, options: dict) -> None:
    tasks, clips = brightness_data
    tokenizer = tiny_models()["aesthetic"].tokenizer
    torch.manual_seed(0)
    config = AESTHETIC.model_copy(update={"uncertainty": options.get("kind") == "gaussian"})
    model = AestheticReward(config, tokenizer)
    training = RewardTrainConfig(loss=LossConfig(**options), epochs=8, head_lr=3e-3, shift=0)
    model, metrics = train.fit(model, tasks, clips, training, label="aesthetic")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    last = [row["accuracy"] for row in metrics[-4:]]
    assert sum(last) / len(last) > 0.75
    (width,) = model.tie_width
    (start,) = tie_widths(model.dimensions, tasks).tolist()
    if options.get("ties") == "learned":
        assert width != pytest.approx(start, rel=1e-3) and width > 0
        assert "log_tie_width" not in model.state_dict()
    else:
        assert width == pytest.approx(options.get("ties", start))
    values = model.score(
        smooth_clip(0, 3, 16)[None], selection=model.select(3, 8.0), fps=8.0, prompts=["x"]
    )
    assert (values.std is not None) == config.uncertainty
    assert values.std is None or (values.std > 0).all()


def test_a_gaussian_loss_without_a_spread_says_which_switch_to_set() -> None:
    model = tiny_models()["aesthetic"]
    config = RewardTrainConfig(loss=LossConfig(kind="gaussian"))
    with pytest.raises(UserError, match="uncertainty: true"):
        train.fit(model, [], {}, config, label="aesthetic")


def test_spread_and_tie_width_travel_with_the_checkpoint(tmp_path: Path) -> None:
    tokenizer = tiny_models()["aesthetic"].tokenizer
    model = AestheticReward(AESTHETIC.model_copy(update={"uncertainty": True}), tokenizer)
    torch.nn.init.normal_(model.spread.weight)
    model.tie_width = [0.25]
    loaded = load_reward(model.save(tmp_path / "aesthetic"))
    assert loaded.tie_width == [0.25]
    frames = smooth_clip(1)[None]
    options = {"selection": model.select(5, 8.0), "fps": 8.0, "prompts": CAPTIONS[:1]}
    torch.testing.assert_close(
        loaded.score(frames, **options).std, model.score(frames, **options).std
    )


def test_verdicts_that_are_all_ties_are_refused(tmp_path: Path) -> None:
    from annotation.records import read_preferences, write_preferences

    folder = write_tiny_preferences(
        tmp_path / "data", quality=float, make=lambda i: smooth_clip(i, 2, 16), num_tasks=8
    )
    data = read_preferences(folder)
    write_preferences(
        folder,
        clips=data.clips,
        judgments=data.judgments,
        preferences=[row | {"preference": 0} for row in data.preferences],
        guideline_version="test",
        source_query="test",
    )
    tiny_models()["aesthetic"].save(tmp_path / "backbones" / "aesthetic")
    with pytest.raises(UserError, match=r"every verdict on aesthetic_quality .* is a tie"):
        train.train_rewards(
            RewardTrainConfig(models=("aesthetic",)), folder, tmp_path / "backbones", tmp_path / "o"
        )

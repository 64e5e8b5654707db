"""What no reward should stumble over: named errors for what cannot be scored, invalid clips counted, all others scored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_backbones import WRITERS, reward_on
from tiny_rewards import CAPTIONS, SIZES, smooth_clip, tiny_models, write_tiny_preferences
from torch import Tensor

from annotation.records import read_preferences
from reelhf.errors import UserError
from rewards.data import UNREADABLE, load_clips, load_tasks
from rewards.ensemble import EnsembleReward
from rewards.evaluation.held_out import evaluate_rewards
from rewards.generative import GenerativeConfig, GenerativeReward
from rewards.heads import set_heads
from rewards.module import RewardModule
from rewards.tokens import train_tokenizer
from rewards.train import train_rewards
from rewards.training.config import RewardTrainConfig

TINY = ("foundational", "motion", "aesthetic")
NAMES = (*TINY, *WRITERS, "generative", "ensemble", "heads")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RewardModule]:
    folder, made = tmp_path_factory.mktemp("bad"), tiny_models()
    config = GenerativeConfig(**SIZES, vision_layers=1, area=32 * 32, num_frames=4, asks="single")
    made["generative"] = GenerativeReward(config, train_tokenizer(CAPTIONS, vocab_size=300))
    made["ensemble"] = EnsembleReward([tiny_models(seed)["foundational"] for seed in (0, 1)])
    made["heads"] = tiny_models()["foundational"]
    set_heads(made["heads"], 3)
    made["heads"].freeze()

    def get(name: str) -> RewardModule:
        if name not in made:
            made[name] = reward_on(name, folder / name)
        return made[name]

    return get


def values(model: RewardModule, frames: Tensor, **options: object) -> Tensor:
    given = {"fps": 8.0, "prompts": CAPTIONS[: len(frames)], **options}
    selection = model.select(frames.shape[2], 8.0)
    return model.score(frames, selection=selection, **given).values  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_clip_is_invalid_and_the_rest_of_the_batch_is_scored(
    models: Callable[[str], RewardModule], name: str
) -> None:
    model = models(name)
    frames = torch.stack([smooth_clip(i) for i in range(3)])
    expected = values(model, frames)
    for bad in (float("nan"), float("inf")):
        broken = frames.clone()
        broken[1, 0, model.select(5, 8.0).needed(5)[0], 3, 3] = bad
        broken.requires_grad_()
        found = values(model, broken)
        assert found[1].isnan().all()
        torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], atol=1e-5, rtol=1e-4)
        found[[0, 2]].sum().backward()
        assert broken.grad is not None and broken.grad.isfinite().all()
        assert (broken.grad[1] == 0).all()


@pytest.mark.parametrize("num_frames", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_one_frame_and_few_and_odd_frames_are_scored_up_to_the_last(
    models: Callable[[str], RewardModule], name: str, num_frames: int
) -> None:
    model = models(name)
    frames = smooth_clip(0, num_frames, 40)[None].requires_grad_()
    values(model, frames).sum().backward()
    assert frames.grad is not None
    chosen = model.select(num_frames, 8.0).needed(num_frames)
    assert chosen[-1] == num_frames - 1 or len(chosen) < num_frames
    assert (frames.grad[:, :, chosen].abs().amax(dim=(0, 1, 3, 4)) > 0).all()


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_clip_of_one_grey_is_scored_with_a_finite_gradient(
    models: Callable[[str], RewardModule], name: str, level: float
) -> None:
    frames = torch.full((1, 3, 4, 32, 32), level, requires_grad=True)
    out = values(models(name), frames)
    out.sum().backward()
    assert out.isfinite().all()
    assert frames.grad is not None and frames.grad.isfinite().all()


@pytest.mark.parametrize("name", [*TINY, "generative", "internvl", "ensemble", "heads"])
@pytest.mark.parametrize("fps", [None, 0.0, -3.0, float("nan"), torch.tensor([8.0, 0.0])])
def test_a_missing_or_impossible_rate_is_named(
    models: Callable[[str], RewardModule], name: str, fps: object
) -> None:
    frames = torch.stack([smooth_clip(i) for i in range(2)])
    with pytest.raises(UserError, match=r"fps is (missing|\[|0|-3|nan)"):
        values(models(name), frames, fps=fps)


@pytest.mark.parametrize("name", ["foundational", "motion", "generative", "internvl", "ensemble"])
def test_an_empty_prompt_is_named_where_it_is_read(
    models: Callable[[str], RewardModule], name: str
) -> None:
    frames = torch.stack([smooth_clip(i) for i in range(2)])
    with pytest.raises(UserError, match="prompt 2 of 2 is empty"):
        values(models(name), frames, prompts=[CAPTIONS[0], "  "])
    blind = values(models("aesthetic"), frames, prompts=["", ""])
    torch.testing.assert_close(blind, values(models("aesthetic"), frames))


def test_a_prompt_longer_than_the_context_is_cut_with_a_warning_or_refused(
    models: Callable[[str], RewardModule],
) -> None:
    model, frames = models("foundational"), smooth_clip(0)[None]
    long = " ".join(CAPTIONS * 8)
    with pytest.warns(UserWarning, match=r"has \d+ tokens, max_text_tokens is 128"):
        assert values(model, frames, prompts=[long]).isfinite().all()
    own = model.settings
    try:
        model.settings = own.model_copy(update={"long_prompts": "refuse"})
        with pytest.raises(UserError, match="shorten it"):
            values(model, frames, prompts=[long])
    finally:
        model.settings = own
    text = model.backbone.config.text_config
    try:
        text.max_position_embeddings, kept = 10, text.max_position_embeddings
        with pytest.raises(UserError, match="the backbone reads 10"):
            values(model, frames)
    finally:
        text.max_position_embeddings = kept


@pytest.mark.parametrize("name", ["generative", "internvl", "ensemble", "heads"])
def test_a_clip_and_prompt_longer_than_any_backbone_reads_are_named(
    models: Callable[[str], RewardModule], name: str
) -> None:
    model, frames = models(name), smooth_clip(0)[None]
    first = model.members[0] if name == "ensemble" else model
    text = first.backbone.config.text_config
    try:
        text.max_position_embeddings, kept = 10, text.max_position_embeddings
        with pytest.raises(UserError, match="the backbone reads 10"):
            values(model, frames)
    finally:
        text.max_position_embeddings = kept


def test_clips_of_the_wrong_shape_say_what_was_expected(
    models: Callable[[str], RewardModule],
) -> None:
    for frames in (
        torch.rand(1, 5, 3, 32, 32),
        torch.rand(3, 5, 32, 32),
        torch.rand(1, 3, 0, 8, 8),
    ):
        with pytest.raises(ValueError, match=r"expected frames \[B, 3, F, H, W\]"):
            models("motion").score(
                frames, selection=models("motion").select(1, 8.0), fps=8.0, prompts=["x"]
            )


@pytest.fixture(scope="module")
def one_corrupt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Verdicts on clips one of which is cut short on disk."""
    folder = tmp_path_factory.mktemp("corrupt")
    write_tiny_preferences(
        folder / "data",
        quality=float,
        make=lambda i: smooth_clip(i, 3, 32),
        num_tasks=10,
        clips_per_task=3,
    )
    victim = read_preferences(folder / "data").preferences[0]["clip_a"]
    path = folder / "data" / "media" / f"{victim}.mp4"
    path.write_bytes(path.read_bytes()[:200])
    tiny_models()["aesthetic"].save(folder / "backbones" / "aesthetic")
    return folder


def test_a_corrupt_file_is_counted_and_all_others_teach_and_are_measured(
    one_corrupt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RewardTrainConfig(models=("aesthetic",), epochs=1)
    data = one_corrupt / "data"
    out = train_rewards(config, data, one_corrupt / "backbones", tmp_path, splits=None)
    assert "1 of 30 clips cannot be read and count nothing; the first:" in capsys.readouterr().out
    result = evaluate_rewards(out, data, tmp_path / "eval", split=None)
    row = result["dimensions"]["aesthetic_quality"]
    assert row["invalid_clips"] == 1
    assert row["accuracy"] is not None


def test_when_no_clip_can_be_read_the_first_is_named(one_corrupt: Path, tmp_path: Path) -> None:
    data = read_preferences(one_corrupt / "data")
    tasks = load_tasks(data)
    clips = load_clips(data, tasks)
    broken = [sha for sha, clip in clips.items() if clip.frames is UNREADABLE]
    assert len(broken) == 1
    alone = [task for task in tasks if broken[0] in task.clips]
    only = [type(t)(t.task_id, t.prompt, t.prompt_id, t.split, (broken[0],), ()) for t in alone]
    with pytest.raises(UserError, match=broken[0]):
        load_clips(data, only)

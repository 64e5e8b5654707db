"""Every family of backbones, loaded from a folder: pixels, time, saving, named errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_backbones import WRITERS, reward_on, write_backbone
from tiny_rewards import (
    CAPTIONS,
    FOUNDATIONAL,
    smooth_clip,
    tiny_models,
    tiny_pretrain_config,
)
from torch import Tensor

from reelhf.errors import UserError
from rewards import load_reward
from rewards.backbones import LANGUAGE
from rewards.backbones.video import VideoMae
from rewards.foundational import FoundationalReward
from rewards.module import RewardModule
from rewards.pretrain import PRETRAIN, build_models
from rewards.recipes import PixelRecipe

NAMES = tuple(WRITERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backbones")


def score(
    model: RewardModule, frames: Tensor, fps: float | Tensor = 8.0, prompts: int = 0
) -> Tensor:
    selection = model.select(frames.shape[2], 8.0)
    texts = CAPTIONS[prompts : prompts + len(frames)]
    return model.score(frames, selection=selection, fps=fps, prompts=texts).values


def clips(count: int = 2, num_frames: int = 5, size: int = 40) -> Tensor:
    return torch.stack([smooth_clip(i, num_frames, size) for i in range(count)])


@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_comes_with_its_weights_and_goes_into_the_checkpoint(
    folders: Path, name: str, tmp_path: Path
) -> None:
    model = reward_on(name, folders / name)
    expected = model.family.model_class().from_pretrained(folders / name).state_dict()
    found = model.backbone.state_dict()
    for key, value in expected.items():
        if "embed_tokens" not in key:  # rows for the reward tokens are added
            torch.testing.assert_close(found[key], value, rtol=0, atol=0)
    loaded = load_reward(model.save(tmp_path / "reward"))
    assert loaded.recipe == model.recipe
    torch.testing.assert_close(score(loaded, clips()), score(model, clips()), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_processors_own_sizes_travel_with_the_checkpoint(
    folders: Path, name: str, tmp_path: Path
) -> None:
    write_backbone(name, tmp_path / "base")
    numbers = {
        "size": {"shortest_edge": 1000, "longest_edge": 3000, "height": 40, "width": 40},
        "crop_size": {"height": 24, "width": 24},
        "image_mean": [0.4, 0.4, 0.4],
    }
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(numbers))
    if name == "internvl":  # whole groups of merged patches
        numbers["size"] |= {"height": 48, "width": 48}
    if name not in ("qwen2_5_vl", "qwen3_vl"):  # an edge, not a number of pixels
        numbers["size"] |= {"shortest_edge": 32}
        (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(numbers))
    model = reward_on(name, tmp_path / "base", preprocessing="processor")
    assert model.recipe.mean == (0.4, 0.4, 0.4)
    assert model.recipe.sizing != "area"
    expected = score(model, clips())
    assert expected.isfinite().all()
    (tmp_path / "base" / "preprocessor_config.json").unlink()  # gone, or another by now
    loaded = load_reward(model.save(tmp_path / "reward"))
    assert loaded.recipe == model.recipe
    torch.testing.assert_close(score(loaded, clips()), expected, rtol=0, atol=0)


def test_numbers_of_ones_own_take_the_place_of_the_processors(folders: Path) -> None:
    recipe = PixelRecipe(
        sizing="area", kernel="bilinear", mean=(0, 0, 0), std=(1, 1, 1), multiple=8, area=256
    )
    model = reward_on("siglip", folders / "siglip", preprocessing=recipe)
    assert model.recipe == recipe


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_the_frame_rate_reaches_both_qwens(folders: Path, name: str) -> None:
    model = reward_on(name, folders / name)
    slow, fast = (score(model, clips(1), fps) for fps in (2.0, 24.0))
    assert (slow - fast).abs().max() > 1e-6


@pytest.mark.parametrize("name", LANGUAGE)
def test_clips_of_two_rates_share_a_batch(folders: Path, name: str) -> None:
    model, frames = reward_on(name, folders / name), clips(2)
    together = score(model, frames, torch.tensor([2.0, 24.0]))
    alone = torch.cat([score(model, frames[:1], 2.0), score(model, frames[1:], 24.0, prompts=1)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_language_model_is_told_where_the_video_is(
    folders: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mm_token_type_ids` is 2 at every patch of the clip and nowhere else; without it Qwen2.5-VL silently takes 1-D positions."""
    model = reward_on(name, folders / name)
    seen: dict[str, Tensor] = {}
    own = type(model.backbone).get_rope_index

    def spy(self: object, input_ids: Tensor, mm_token_type_ids: Tensor, **more: object) -> object:
        seen.update(ids=input_ids, types=mm_token_type_ids, **more)
        return own(self, input_ids, mm_token_type_ids=mm_token_type_ids, **more)

    monkeypatch.setattr(type(model.backbone), "get_rope_index", spy)
    score(model, clips(1), 8.0)
    is_video = seen["ids"] == model.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert is_video.any()
    assert seen["types"].equal(2 * is_video.long())
    if name == "qwen2_5_vl":  # 4 of 5 frames over 4 intervals are left: 8 * 3 / 4 frames a second
        rate = 8.0 * 3 / 4
        torch.testing.assert_close(seen["second_per_grid_ts"], torch.tensor([2 / rate]))


def test_internvl_sees_what_transformers_sees_and_rectangles_besides(folders: Path) -> None:
    """Its own projection of the vision tower's states, which `get_image_features` knows for squares alone."""
    model = reward_on("internvl", folders / "internvl")
    frames = clips(2, 3, 32)
    seen, grid = model.look(frames)
    pictures = model.recipe(frames).transpose(1, 2).flatten(0, 1)
    theirs = model.backbone.get_image_features(pictures, return_dict=True).pooler_output
    ours = torch.cat(list(seen.pooler_output))
    assert grid == (3, 4, 4)
    torch.testing.assert_close(ours, theirs.flatten(0, 1))
    wide = torch.rand(1, 3, 3, 24, 48, requires_grad=True)
    seen, grid = model.look(wide)
    assert grid[2] > grid[1]
    assert seen.pooler_output[0].shape == (grid[0] * grid[1] * grid[2] // 4, 32)
    # a merged patch sees its own corner first: turning the picture turns the places
    upright = model.look(wide.transpose(-1, -2))[1]
    assert upright == (grid[0], grid[2], grid[1])


def test_an_internvl_side_that_does_not_merge_is_named(folders: Path) -> None:
    recipe = {"sizing": "square", "kernel": "bicubic", "mean": (0, 0, 0), "std": (1, 1, 1)}
    odd = PixelRecipe(**recipe, side=40)
    model = reward_on("internvl", folders / "internvl", preprocessing=odd)
    with pytest.raises(UserError, match=r"40 x 40.*multiples of 16"):
        score(model, clips(1))


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_language_model_sees_the_order_of_frames(folders: Path, name: str) -> None:
    model, frames = reward_on(name, folders / name), clips(1)
    assert (score(model, frames) - score(model, frames.flip(2))).abs().max() > 1e-6


def test_an_internvl_tokenizer_keeps_its_own_marks(tmp_path: Path) -> None:
    from rewards.backbones.internvl import marks
    from rewards.tokens import INTERNVL_MARKS, load_tokenizer, train_tokenizer

    plain = train_tokenizer(CAPTIONS, vocab_size=300)
    assert marks(plain) == ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
    plain.add_tokens(list(INTERNVL_MARKS), special_tokens=True)
    plain.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), dimensions=("prompt_following",))
    assert marks(loaded) == INTERNVL_MARKS
    assert len(loaded) == len(plain) + 1  # the reward token


def test_videomae_equals_transformers_at_its_own_size_and_stretches_to_any(folders: Path) -> None:
    model = reward_on("videomae", folders / "videomae")
    pixels = torch.randn(1, 8, 3, 32, 32)
    torch.testing.assert_close(
        VideoMae().tokens(model.backbone, pixels), model.backbone(pixels).last_hidden_state
    )
    assert VideoMae().tokens(model.backbone, torch.randn(1, 6, 3, 24, 40)).shape == (1, 45, 32)


def test_siglip2_keeps_the_aspect_ratio(folders: Path) -> None:
    model = reward_on("siglip2", folders / "siglip2", preprocessing="processor")
    height, width = model.recipe.size(40, 80, 1)
    assert width > 1.5 * height
    assert height * width // 64 <= 36
    assert score(model, torch.rand(1, 3, 3, 40, 80)).isfinite().all()


def test_frames_at_fixed_seconds_are_looked_at_whatever_the_rate(folders: Path) -> None:
    model = reward_on("vjepa2", folders / "vjepa2", sample_fps=4.0)
    base = torch.nn.functional.interpolate(clips(1, 5, 32), size=(24, 32, 32), mode="trilinear")
    doubled = base.repeat_interleave(2, dim=2)  # the same clip at twice the rate
    one, two = (
        model.score(
            frames, selection=model.select(frames.shape[2], fps), fps=fps, prompts=CAPTIONS[:1]
        ).values
        for frames, fps in ((base, 12.0), (doubled, 24.0))
    )
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)
    foundational = FoundationalReward(
        FOUNDATIONAL.model_copy(update={"sample_fps": 4.0}), tiny_models()["foundational"].tokenizer
    )
    assert len(foundational.select(240, 24.0).indices) == FOUNDATIONAL.num_frames  # no more


def test_a_backbone_of_another_kind_and_a_folder_without_one_are_named(
    folders: Path, tmp_path: Path
) -> None:
    write_backbone("clip", tmp_path / "clip")
    with pytest.raises(UserError, match=r"clip_vision_model.*stands on vjepa2, videomae"):
        reward_on("vjepa2", tmp_path / "clip")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no backbone in the folder"):
        reward_on("vjepa2", tmp_path / "empty")


@pytest.mark.parametrize("model_type", ["qwen3_vl", "internvl"])
def test_a_tiny_one_of_another_family_is_pre_trained_like_a_tiny_qwen2_5(model_type: str) -> None:
    torch.manual_seed(0)
    config = tiny_pretrain_config(steps=4)
    named = config.foundational.model_copy(update={"family": model_type})
    config = config.model_copy(update={"foundational": named, "words_share": 0.5})
    model = build_models(config, CAPTIONS)["foundational"]
    assert model.backbone.config.model_type == model_type
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    windows = (torch.stack([smooth_clip(i) for i in range(8)]) * 255).byte()
    PRETRAIN["foundational"](model, config, windows, CAPTIONS)
    moved = [not torch.equal(p, before[name]) for name, p in model.backbone.named_parameters()]
    assert all(moved)

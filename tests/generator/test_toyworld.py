"""The toy world: captions say everything and nothing else, pictures do not depend on the grid, splits never meet."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from generator.shots import parse_shots, shot_latents
from generator.toyworld import (
    _CHOICES,
    BACKGROUNDS,
    COLOURS,
    Scene,
    ToyDatasetConfig,
    caption,
    caption_shots,
    prompt_split,
    render,
    render_dataset,
    render_shots,
    sample_scene,
    sample_shot_frames,
    sample_shots,
    scene_from_caption,
    scene_split,
    scenes_from_caption,
    trajectory,
)
from reelhf.clips import load_clip_folder
from reelhf.errors import UserError
from reelhf.video import probe_video, read_video

SPLITS = ("train", "feedback", "held_out", "validation", "test")


def all_scenes() -> list[Scene]:
    return [
        Scene(*values)
        for values in itertools.product(*_CHOICES.values())
        if (values[4] == "still") == (values[5] == "none")
    ]


def scenes(n: int, seed: int = 0, variety: str = "rich") -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, variety) for _ in range(n)]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_scene_has_its_own_caption_that_reads_back_exactly(language):
    every = all_scenes()
    captions = [caption(scene, language) for scene in every]
    assert len(set(captions)) == len(every)
    assert [scene_from_caption(text) for text in captions] == every


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A cat walks on the grass.",
        "A large solid red circle on a plain white background.",
        # two shapes that disagree, and a still shape with a direction
        "A large solid red circle on a plain white background. The square stays where it is and the camera does not move.",
        "A large solid red circle on a plain white background. The circle stays where it is upwards and the camera does not move.",
        "A large solid red circle on a plain white background. The circle moves slowly and the camera does not move.",
    ],
)
def test_a_text_that_is_not_wholly_ours_is_no_scene(text):
    assert scene_from_caption(text) is None


def test_a_scene_that_cannot_be_is_refused_with_the_nearest_name():
    good = dict(
        zip(
            _CHOICES,
            ("circle", "red", "small", "plain", "left", "slow", "static", "white"),
            strict=True,
        )
    )
    Scene(**good)
    with pytest.raises(
        UserError, match=r"scene colour 'rde'; expected one of .*Did you mean 'red'"
    ):
        Scene(**good | {"colour": "rde"})
    with pytest.raises(UserError, match="motion 'left' with speed 'none'"):
        Scene(**good | {"speed": "none"})


def test_a_picture_reduced_is_the_picture_drawn_small():
    for scene in scenes(20):
        large = render(scene, num_frames=5, size=128, fps=8, seed=3)
        small = render(scene, num_frames=5, size=64, fps=8, seed=3)
        reduced = F.avg_pool2d(large.transpose(0, 1), 2).transpose(0, 1)
        assert (reduced - small).abs().mean() < 0.006
        assert (
            reduced - small
        ).abs().max() < 0.5  # at most half a pixel's coverage at the tip of a star


def test_edges_are_antialiased_and_nothing_leaves_the_palette():
    scene = Scene("circle", "red", "large", "plain", "still", "none", "static", "white")
    frames = render(scene, num_frames=1, size=64, fps=8)
    red, white = torch.tensor(COLOURS["red"]), torch.tensor(BACKGROUNDS["white"])
    share = (frames[:, 0].permute(1, 2, 0) - white) @ (red - white) / (red - white).square().sum()
    between = ((share > 0.05) & (share < 0.95)).float().mean()
    assert 0.01 < between < 0.05  # a rim one pixel wide
    mixed = white + share[..., None] * (red - white)
    assert (mixed - frames[:, 0].permute(1, 2, 0)).abs().max() < 1e-5


def test_the_same_seed_draws_the_same_and_another_seed_moves_the_start():
    scene = scenes(1)[0]
    first, again, other = (
        render(scene, num_frames=3, size=32, fps=8, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_path_is_what_the_caption_says():
    for scene in scenes(60):
        path = trajectory(scene, num_frames=9, fps=8, seed=5)
        way = path[-1, :2] - path[0, :2]
        length = {"none": 0.0, "slow": 0.2, "fast": 0.4}[scene.speed]
        expected = {
            "still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1),
        }[scene.motion]  # fmt: skip
        assert way.tolist() == pytest.approx([length * step for step in expected], abs=1e-6)
        assert (path[-1, 2] > path[0, 2] * 1.2) == (scene.camera == "zoom")


def test_a_long_clip_slows_down_to_keep_the_shape_in_view():
    for scene in scenes(30, variety="plain"):
        for num_frames in (5, 9, 65):
            path = trajectory(scene, num_frames=num_frames, fps=8, seed=1)
            assert path[:, :2].abs().max() < 0.25


def test_splits_never_share_a_scene_in_either_language():
    seen = {
        split: {
            scene_from_caption(text)
            for seed in (0, 1)
            for text in prompt_split(split, 30, seed, zh_fraction=0.3)
        }
        for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not seen[one] & seen[other]
    for split in SPLITS:
        assert {scene_split(scene) for scene in seen[split]} == {split}


def test_there_are_64_different_test_prompts_and_a_longer_list_begins_with_a_shorter_one():
    prompts = prompt_split("test", 64)
    assert len(set(prompts)) == 64
    assert prompt_split("test", 20) == prompts[:20]
    assert prompt_split("test", 64, seed=1) != prompts
    share = sum("。" in text for text in prompt_split("test", 40, zh_fraction=0.25)) / 40
    assert share == 0.25


def test_asking_for_too_many_or_an_unknown_split_is_one_clear_line():
    with pytest.raises(UserError, match=r"5000 different toy scenes asked of split 'validation'"):
        prompt_split("validation", 5000)
    with pytest.raises(UserError, match=r"toy split 'held-out'.*Did you mean 'held_out'"):
        prompt_split("held-out", 1)


def test_a_rendered_folder_is_an_ordinary_clip_folder_of_the_train_split(tmp_path):
    config = ToyDatasetConfig(num_clips=10, num_frames=5, size=32, fps=8, seed=7, zh_fraction=0.3)
    out = render_dataset(config, tmp_path / "clips")
    entries = load_clip_folder(out)
    assert len(entries) == 10
    scenes_read = [scene_from_caption(entry.caption) for entry in entries]
    assert all(scene is not None and scene_split(scene) == "train" for scene in scenes_read)
    assert sum(entry.language == "zh" for entry in entries) == 3
    info = probe_video(entries[0].path)
    assert (info.frames, info.fps, info.width) == (5, 8, 32)
    frames, _ = read_video(entries[0].path)
    ground = torch.tensor(BACKGROUNDS[scenes_read[0].background])
    assert (frames[:, 0, :2, :2].float().mean((1, 2)) / 255 - ground).abs().max() < 0.03


def test_a_complete_folder_is_left_alone_and_the_same_config_gives_the_same_files(tmp_path):
    config = ToyDatasetConfig(num_clips=3, num_frames=5, size=32, seed=1)
    out = render_dataset(config, tmp_path / "a")
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert render_dataset(config, out) == out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    other = render_dataset(config, tmp_path / "b")
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in other.iterdir())
    assert (out / "captions.jsonl").read_text() == (other / "captions.jsonl").read_text()


# Several shots


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(
    ("clip_frames", "num_shots", "ways"), [(5, 2, 1), (9, 2, 1), (13, 2, 2), (17, 3, 3)]
)
def test_a_prompt_of_several_shots_reads_back_exactly(language, clip_frames, num_shots, ways):
    rng = random.Random(0)
    seen_lengths = set()
    for _ in range(40):
        scenes = sample_shots(rng, num_shots, "test", variety="rich")
        lengths = sample_shot_frames(rng, num_shots, clip_frames)
        text = caption_shots(scenes, lengths, language)
        assert scenes_from_caption(text) == scenes
        assert scene_from_caption(text) is None  # not one scene
        latents = shot_latents(parse_shots(text).num_frames, clip_frames)
        assert latents == shot_latents(lengths, clip_frames)
        assert sum(lengths) == clip_frames
        assert all(a.colour != b.colour for a, b in itertools.pairwise(scenes))
        assert {scene_split(scene) for scene in scenes} == {"test"}
        seen_lengths.add(tuple(lengths))
    assert len(seen_lengths) == ways


def test_a_plain_caption_is_one_scene_and_other_shots_are_none():
    scene = scenes(1)[0]
    assert scenes_from_caption(caption(scene)) == [scene]
    assert scenes_from_caption("[SHOT 1] a cat [CUT] [SHOT 2] " + caption(scene)) is None
    assert scenes_from_caption("[SHOT 2] " + caption(scene)) is None


def test_shots_are_drawn_one_after_another():
    first, second = scenes(2)
    frames = render_shots([first, second], [5, 4], size=32, fps=8, seed=3)
    assert frames.shape == (3, 9, 32, 32)
    assert torch.equal(frames[:, :5], render(first, num_frames=5, size=32, fps=8, seed=3))
    assert torch.equal(frames[:, 5:], render(second, num_frames=4, size=32, fps=8, seed=4))
    assert torch.equal(
        render_shots([first], [5], size=32, fps=8, seed=3),
        render(first, num_frames=5, size=32, fps=8, seed=3),
    )


def test_a_dataset_has_clips_of_several_shots_when_asked(tmp_path):
    config = ToyDatasetConfig(num_clips=8, num_frames=13, size=32, seed=2)
    several = config.model_copy(update={"num_shots": 2, "multi_shot_fraction": 0.25})
    plain = load_clip_folder(render_dataset(config, tmp_path / "plain"))
    mixed = load_clip_folder(render_dataset(several, tmp_path / "mixed"))
    counts = [len(parse_shots(entry.caption)) for entry in mixed]
    assert counts == [1, 1, 1, 2, 1, 1, 1, 2]
    # clips before the first of two shots are those of a dataset without any
    assert [e.path.name for e in mixed[:3]] == [e.path.name for e in plain[:3]]
    assert all(len(parse_shots(entry.caption)) == 1 for entry in plain)
    assert {probe_video(entry.path).frames for entry in mixed} == {13}


def test_a_dataset_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"num_frames 8; the causal VAE needs 1 .* use 5 or 9"):
        ToyDatasetConfig(num_frames=8)
    with pytest.raises(ValueError, match="num_shots 4; a clip of 9 frames has room for 3"):
        ToyDatasetConfig(num_frames=9, num_shots=4)
    with pytest.raises(UserError, match="a clip of 0 frames per second"):
        render(scenes(1)[0], num_frames=5, size=32, fps=0)

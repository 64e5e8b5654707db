"""Backbones learn the order of graded clips: whichever version is said to be further must score lower."""

from __future__ import annotations

import pytest
import torch
from tiny_rewards import CAPTIONS, smooth_clip, tiny_pretrain_config

from reelhf.errors import UserError
from reelhf.graded import GradedClips
from rewards.pretrain import PRETRAIN, build_models, load_graded
from rewards.pretraining.pairs import generated_clips, graded_pairs, recoloured

CONFIG = tiny_pretrain_config(steps=40)


def two_versions(seeds: range, *, dark_is_further: bool) -> GradedClips:
    clean = torch.stack([smooth_clip(seed) for seed in seeds])
    dark = 0.3 * clean
    versions = (clean, dark) if dark_is_further else (dark, clean)
    grades = torch.tensor([0.0, 1.0]).expand(len(seeds), 2).contiguous()
    captions = [CAPTIONS[seed % len(CAPTIONS)] for seed in seeds]
    frames = (torch.stack(versions, dim=1) * 255).round().byte()
    return GradedClips(frames, grades, captions, CONFIG.fps)


@pytest.mark.parametrize("name", ["foundational", "motion", "aesthetic"])
def test_the_stated_order_is_what_is_learned(name):
    windows = (torch.stack([smooth_clip(seed) for seed in range(16)]) * 255).byte()
    captions = [CAPTIONS[seed % len(CAPTIONS)] for seed in range(16)]
    unseen = two_versions(range(500, 516), dark_is_further=True)
    lead = []
    for dark_is_further in (True, False):
        torch.manual_seed(0)
        model = build_models(CONFIG, captions)[name]
        graded = two_versions(range(100, 116), dark_is_further=dark_is_further)
        PRETRAIN[name](model, CONFIG, windows, captions, [graded])
        clean, dark = (
            model.score(
                unseen.frames[:, version].float() / 255,
                selection=model.select(5, CONFIG.fps),
                fps=CONFIG.fps,
                prompts=unseen.captions,
            ).values.detach()
            for version in (0, 1)
        )
        lead.append((clean - dark).mean(0))  # [D]
    assert (lead[0] > 0).all()
    assert (lead[1] < 0).all()


def test_sets_take_turns_and_keep_their_own_captions():
    model = build_models(CONFIG, CAPTIONS)["motion"]
    first, second = (
        two_versions(range(s, s + 4), dark_is_further=d) for s, d in ((0, True), (100, False))
    )
    pairs = graded_pairs([first, second], model, 3, torch.Generator().manual_seed(0))
    for clips in (first, second, first):
        pair = next(pairs)
        assert len(pair.prompts) == len(pair.nearer) == 3
        for nearer, further, prompt in zip(pair.nearer, pair.further, pair.prompts, strict=True):
            originals = clips.frames.float() / 255
            row = int((originals[:, 0] - nearer).flatten(1).abs().sum(1).argmin())
            assert torch.equal(originals[row, 0], nearer)
            assert torch.equal(originals[row, 1], further)
            assert prompt == model.encode_prompts([clips.captions[row]])[0]
    assert next(graded_pairs([], model, 3, torch.Generator()), None) is None


def test_the_worse_copy_is_recoloured_further():
    clips = torch.stack([smooth_clip(seed) for seed in range(64)])
    second_is_worse = torch.arange(64) % 2 == 0
    seen, by = recoloured(clips, clips, second_is_worse, torch.Generator().manual_seed(0))
    first, second = ((half - clips).square().flatten(1).mean(1) for half in seen.chunk(2))
    clear = by > 0.5
    assert clear.sum() > 10
    right = torch.where(second_is_worse, second > first, first > second)[clear]
    assert right.float().mean() > 0.9


@pytest.mark.parametrize("change", [{"num_frames": 9}, {"fps": 16.0}])
def test_graded_clips_of_another_length_or_rate_are_one_clear_line(change, tmp_path):
    two_versions(range(4), dark_is_further=True).save(tmp_path)
    with pytest.raises(UserError, match="graded clips of 5 frames at 8 fps"):
        load_graded(tmp_path, CONFIG.model_copy(update=change))


def test_generated_clips_are_no_further_than_all_but_the_last_version_and_keep_their_captions():
    frames = torch.stack(
        [torch.stack([smooth_clip(10 * n + g, 5, 16) for g in range(3)]) for n in range(6)]
    )
    frames = (frames * 255).round().byte()
    grades = torch.tensor([0.0, 0.5, 1.0]).expand(6, 3).contiguous()
    clips = GradedClips(frames, grades, [f"clip {n}" for n in range(6)], 8.0)
    drawn = generated_clips([clips], [clips.captions], 4, torch.Generator().manual_seed(0))
    versions = set()
    for _ in range(20):
        shown, captions = next(drawn)
        assert len(set(captions)) == 4  # without replacement
        for one, caption in zip(shown, captions, strict=True):
            own = clips.frames[int(caption.split()[1])].float() / 255
            (version,) = [g for g in range(3) if torch.equal(own[g], one)]
            versions.add(version)
    assert versions == {0, 1}
    assert next(generated_clips([], [], 4, torch.Generator()), None) is None

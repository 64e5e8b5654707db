"""Clips of several shots: prompts taken apart, cuts at legal frames, positions counted on, each frame reading its own caption."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from generator.base import NO_SHOT, Condition
from generator.checkpoint import load_generator
from generator.rope import grid_positions, shot_positions, shots_of_frames, video_positions
from generator.sampling import noise_like, sample_frames
from generator.shots import cut_frames, encode_shots, parse_shots, shot_latents, shot_prompt
from reelhf.errors import UserError
from tests.generator.test_dit import TINY, randomised, tiny_inputs

TWO = "[SHOT 1] a red circle [CUT] [SHOT 2] a blue square"


def test_shots_are_read_whatever_the_blanks_and_the_case_of_their_marks():
    for text in (
        TWO,
        "  [shot 1]a red circle[cut][Shot2]  a blue square ",
        "[ SHOT 1 ]\na red circle\n[ CUT ]\n[SHOT 2]\na blue square\n",
    ):
        assert parse_shots(text).captions == ("a red circle", "a blue square")
        assert parse_shots(text).num_frames == (None, None)
    assert parse_shots("[SHOT 1: 5 frames] x [CUT] [SHOT 2, 1 frame] y").num_frames == (5, 1)
    assert parse_shots("[SHOT 1] alone").captions == ("alone",)


@pytest.mark.parametrize(
    "text",
    ["", " a red  circle. ", "a screenshot [1], cut short", "a castle [shot on film] [CUTE]"],
)
def test_a_prompt_without_marks_is_one_shot_word_for_word(text):
    assert parse_shots(text).captions == (text,)


@pytest.mark.parametrize("lengths", [None, (5, None, 8)])
def test_a_written_prompt_is_read_back(lengths):
    captions = ("one", "两个", "three [3]")
    parsed = parse_shots(shot_prompt(captions, lengths))
    assert parsed.captions == captions
    assert parsed.num_frames == (lengths or (None, None, None))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[SHOT 2] a [CUT] [SHOT 1] b", r"shot 1 is called \[SHOT 2\]"),
        ("[SHOT 1] a [CUT] [SHOT 3] b", r"shot 2 is called \[SHOT 3\]"),
        ("[SHOT 1] a [CUT] b", r"shot 2 does not begin with \[SHOT 2\]"),
        ("a [CUT] b", r"shot 1 does not begin with \[SHOT 1\]"),
        ("first [SHOT 1] a", r"shot 1 does not begin with \[SHOT 1\]"),
        ("[SHOT 1] a [SHOT 2] b", r"there is no \[CUT\] before '\[SHOT 2\]'"),
        ("[SHOT 1] [CUT] [SHOT 2] b", "shot 1 has no caption"),
        ("[SHOT 1] a [CUT]", r"shot 2 does not begin with"),
        ("[SHOT 1: long] a", r"shot 1 does not begin with"),
        ("[SHOT 1 a", r"shot 1 does not begin with"),
        ("[SHOT] a", r"shot 1 does not begin with"),
    ],
)
def test_malformed_shots_are_refused_in_one_line_with_the_way_to_write_them(text, reason):
    with pytest.raises(UserError, match=reason) as error:
        parse_shots(text)
    assert TWO in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("clip_frames", [1, 5, 9, 13, 121])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shots_share_a_clip_evenly_and_every_cut_is_legal(clip_frames, count):
    total = 1 + (clip_frames - 1) // 4
    if count > total:
        with pytest.raises(UserError, match=f"{count} shots for a clip of {clip_frames} frames"):
            shot_latents([None] * count, clip_frames)
        return
    latents = shot_latents([None] * count, clip_frames)
    assert sum(latents) == total
    assert max(latents) - min(latents) <= 1
    cuts = cut_frames(latents)
    assert all(cut % 4 == 1 for cut in cuts)
    edges = [0, *cuts, clip_frames]
    lengths = [b - a for a, b in itertools.pairwise(edges)]
    assert lengths[0] % 4 == 1
    assert all(length % 4 == 0 and length > 0 for length in lengths[1:])
    # what they turn out to be can be asked for by name
    assert shot_latents(lengths, clip_frames) == latents


def test_stated_lengths_are_kept_and_the_rest_is_shared():
    assert shot_latents([None, 8, None], 21) == (2, 2, 2)
    assert cut_frames(shot_latents([1, None], 9)) == [1]
    assert cut_frames(shot_latents([5, None], 9)) == [5]


@pytest.mark.parametrize(
    ("lengths", "reason"),
    [
        ([6, None], r"shot 1 of 6 frames: .* it has 1 \+ 4a; use 5 or 9"),
        ([5, 5], r"shot 2 of 5 frames: .* it has 4b; use 4 or 8"),
        ([0, None], r"shot 1 of 0 frames: .* use 1 or 5"),
        ([None, 0], r"shot 2 of 0 frames: .* use 4 or 8"),
        ([5, 8], "shots of 5, 8 frames do not make a clip of 9"),
        ([1, 4], "shots of 1, 4 frames do not make a clip of 9"),
        ([9, None], "shots of 9, open frames do not make a clip of 9"),
    ],
)
def test_lengths_that_cannot_be_are_refused(lengths, reason):
    with pytest.raises(UserError, match=reason):
        shot_latents(lengths, 9)


def words(prompts: list[str]) -> Condition:
    """An encoder whose embedding of a word is its length."""
    lengths = [[float(len(word)) for word in prompt.split()] for prompt in prompts]
    longest = max(map(len, lengths))
    embeds = torch.tensor([row + [0.0] * (longest - len(row)) for row in lengths])[..., None]
    return Condition(embeds, embeds[..., 0] > 0)


def test_captions_lie_one_after_another_without_gaps():
    condition = encode_shots(words, ["[SHOT 1] a bb [CUT] [SHOT 2] ccc", "dddd"], 9)
    assert condition.embeds[..., 0].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert condition.mask.tolist() == [[True, True, True], [True, False, False]]
    assert condition.token_shots.tolist() == [[0, 0, 1], [0, 0, 0]]
    assert condition.shot_starts.tolist() == [[0, 2], [0, NO_SHOT]]
    plain = encode_shots(words, ["[SHOT 1] a bb", "ccc"], 9)
    assert plain.token_shots is None
    assert torch.equal(plain.embeds, words(["a bb", "ccc"]).embeds)


def running_offset(tokens: list[int], frames: list[int]) -> tuple[list[int], list[int]]:
    """The index rule as it is told: p advances by a shot's tokens, then by its frames."""
    text, vision, p = [], [], 0
    for num_tokens, num_frames in zip(tokens, frames, strict=True):
        text += [p + i for i in range(num_tokens)]
        vision += [p + num_tokens + f for f in range(num_frames)]
        p += num_tokens + num_frames
    return text, vision


def laid_out(tokens: list[int], frames: list[int]) -> tuple[torch.Tensor, ...]:
    """mask, token_shots, shot_starts of one row."""
    shots = torch.cat([torch.full((count,), shot) for shot, count in enumerate(tokens)])[None]
    starts = torch.tensor([[0, *itertools.accumulate(frames[:-1])]])
    return torch.ones_like(shots, dtype=torch.bool), shots, starts


@pytest.mark.parametrize(
    ("tokens", "frames"), [([4], [3]), ([3, 5], [2, 1]), ([2, 1, 6], [1, 3, 2])]
)
def test_positions_count_through_captions_and_shots(tokens, frames):
    grid = grid_positions(sum(frames), 2, 3)
    mask, shots, starts = laid_out(tokens, frames)
    text, vision = shot_positions(grid, mask, shots, starts)
    expected_text, expected_vision = running_offset(tokens, frames)
    assert text[0].tolist() == [[place] * 3 for place in expected_text]
    assert vision[0, :, 0, 0, 0].tolist() == expected_vision
    assert torch.equal(vision[0, ..., 1:], grid[..., 1:])
    in_shot = [shot for shot, count in enumerate(frames) for _ in range(count)]
    assert shots_of_frames(starts, sum(frames))[0].tolist() == in_shot


def test_one_shot_has_the_positions_of_a_plain_prompt_and_padding_moves_nothing():
    grid = grid_positions(3, 2, 2)
    mask = torch.tensor([[True, True, False, False]])
    zeros = torch.zeros(1, 4, dtype=torch.int64)
    starts = torch.tensor([[0, NO_SHOT]])
    text, vision = shot_positions(grid, mask, zeros, starts)
    assert torch.equal(vision, video_positions(grid, mask.sum(1)))
    assert text[0, :2].tolist() == [[0] * 3, [1] * 3]
    dropped = shot_positions(grid, mask & False, torch.tensor([[0, 1, 0, 0]]), starts)[1]
    assert torch.equal(dropped, grid[None])


def test_rows_of_one_and_of_two_shots_are_cut_and_joined():
    two = encode_shots(words, ["[SHOT 1] a bb [CUT] [SHOT 2] ccc", "x"], 9)
    one = encode_shots(words, ["a b c d"], 9)
    joined = Condition.cat((one, two))
    assert joined.token_shots.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert joined.shot_starts.tolist() == [[0, NO_SHOT], [0, 2], [0, NO_SHOT]]
    assert torch.equal(joined[1].token_shots[:, :3], two[0].token_shots)
    assert torch.equal(joined[[0, 2]].shot_starts, joined.shot_starts[[0, 2]])
    assert Condition.cat((one, one)).token_shots is None
    assert joined.to("cpu").shot_starts.tolist() == joined.shot_starts.tolist()
    assert joined.dropped().mask.sum() == 0


# The transformer


def shot_inputs(frames: int = 4, cut: int = 2) -> dict[str, torch.Tensor]:
    """One clip of two shots whose captions have three and two tokens."""
    inputs = tiny_inputs(batch=1, frames=frames)
    inputs["mask"] = torch.ones(1, 5, dtype=torch.bool)
    return inputs | {
        "token_shots": torch.tensor([[0, 0, 0, 1, 1]]),
        "shot_starts": torch.tensor([[0, cut]]),
    }


def without_temporal_layers(model: torch.nn.Module) -> torch.nn.Module:
    for block in model.temporal:
        for branch in (block.attention.out, block.mlp.down):
            branch.weight.data.zero_()
            branch.bias.data.zero_()
    return model


def test_without_layers_between_frames_a_frame_depends_on_its_own_shot_only():
    """Words and pixels of the other shot change nothing: spatial layers, modulation and the averaged text stay inside a shot."""
    model = without_temporal_layers(randomised(TINY))
    inputs = shot_inputs()
    before = model(**inputs)[0]
    for name, moved_part, unmoved in (
        ("embeds", (slice(None), slice(3, 5)), slice(0, 2)),
        ("embeds", (slice(None), slice(0, 3)), slice(2, 4)),
        ("noisy", (slice(None), slice(None), slice(2, 4)), slice(0, 2)),
    ):
        moved = inputs[name].clone()
        moved[moved_part] += torch.randn_like(moved[moved_part])
        change = (model(**inputs | {name: moved})[0] - before).abs().amax((0, 2, 3))  # [T]
        assert change[unmoved].max() == 0
        assert change.max() > 1e-4


def test_layers_between_frames_run_across_the_cut():
    model, inputs = randomised(TINY), shot_inputs()
    before = model(**inputs)[0]
    moved = inputs["embeds"].clone()
    moved[:, 3:] += 1
    change = (model(**inputs | {"embeds": moved})[0] - before).abs().amax((0, 2, 3))
    assert (change > 1e-6).all()


def test_where_the_cut_falls_matters():
    model, inputs = randomised(TINY), shot_inputs()
    later = model(**inputs | {"shot_starts": torch.tensor([[0, 3]])})
    assert (later - model(**inputs)).abs().max() > 1e-3


def test_a_cut_parts_the_frames_by_the_text_between():
    """To layers between frames alone: the longer the second caption, the farther its shot; the first one's length is nothing."""
    model = randomised(TINY)
    for block in model.spatial:
        for branch in (block.vision_attention.out, block.vision_mlp.down):
            branch.weight.data.zero_()
            branch.bias.data.zero_()
    model.pooled_text_input.weight.data.zero_()
    inputs = shot_inputs()
    before = model(**inputs)
    for shots, moved in (([0, 0, 0, 1, 1, 1], True), ([0, 0, 0, 0, 1, 1], False)):
        longer = inputs | {
            "embeds": torch.randn(1, 6, 8),
            "mask": torch.ones(1, 6, dtype=torch.bool),
            "token_shots": torch.tensor([shots]),
        }
        change = (model(**longer) - before).abs().max()
        assert (change > 1e-4) == moved
        assert moved or change < 1e-5


def test_a_shot_of_its_own_equals_that_shot_in_a_longer_clip_but_for_its_place():
    """The first shot of two, without layers between frames, is the clip of that shot alone."""
    model, inputs = without_temporal_layers(randomised(TINY)), shot_inputs()
    alone = {
        name: inputs[name][:, :, :2] for name in ("noisy", "condition_latents", "condition_mask")
    }
    alone |= {name: inputs[name][:, :3] for name in ("embeds", "mask")}
    alone["sigma"] = inputs["sigma"]
    torch.testing.assert_close(model(**inputs)[:, :, :2], model(**alone), rtol=1e-4, atol=1e-5)


def test_one_shot_told_as_such_equals_a_plain_prompt():
    model, inputs = randomised(TINY), tiny_inputs()
    told = {
        "token_shots": torch.zeros(2, 5, dtype=torch.int64),
        "shot_starts": torch.tensor([[0, NO_SHOT], [0, NO_SHOT]]),
    }
    torch.testing.assert_close(model(**inputs, **told), model(**inputs), rtol=1e-4, atol=1e-5)


def test_a_dropped_prompt_of_two_shots_is_the_dropped_prompt_of_one():
    model, inputs = randomised(TINY), shot_inputs()
    inputs["mask"] = inputs["mask"] & False
    shots = {name: inputs.pop(name) for name in ("token_shots", "shot_starts")}
    torch.testing.assert_close(model(**inputs, **shots), model(**inputs), rtol=1e-4, atol=1e-5)


def test_every_shot_of_the_training_prompts_counts_in_the_fit_of_the_pooled_text():
    torch.manual_seed(0)
    embeds, mask = torch.randn(50, 4, 8), torch.ones(50, 4, dtype=torch.bool)
    shots = torch.tensor([0, 0, 1, 1]).expand(50, 4)
    weights = []
    for arguments in (
        (embeds, mask, shots),
        (embeds.view(100, 2, 8), mask.view(100, 2), None),
        (embeds, mask, None),
    ):
        model = randomised(TINY)
        torch.manual_seed(1)
        model.fit_pooled_text(*arguments)
        weights.append(model.pooled_text_input.weight.clone())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-4)
    assert (weights[0] - weights[2]).abs().max() > 1e-2


# The generator


def test_a_single_shot_takes_the_path_of_a_plain_prompt_bit_for_bit(tiny_generator):
    backbone = tiny_generator()
    plain = sample_frames(backbone, ["a red circle"], [3])
    assert torch.equal(sample_frames(backbone, ["[SHOT 1] a red circle"], [3]), plain)


def test_clips_of_one_and_two_shots_are_sampled_together(tiny_generator, tmp_path):
    tiny_generator().save(tmp_path / "g")
    backbone = load_generator(tmp_path / "g")
    clips = backbone.sample([TWO, "a red circle", TWO], seeds=[0, 1, 0])
    assert clips.shape == (3, 3, *backbone.frame_shape)
    torch.testing.assert_close(clips[0], clips[2], rtol=1e-4, atol=1e-4)
    for row in (0, 1):
        alone = backbone.sample([[TWO, "a red circle"][row]], seeds=[row])
        torch.testing.assert_close(clips[row], alone[0], rtol=1e-3, atol=1e-4)
    other = backbone.sample([TWO.replace("square", "circle")], seeds=[0])
    assert (other[0] - clips[0]).abs().max() > 1e-4


def test_more_shots_than_frames_are_one_clear_error(tiny_generator):
    three = shot_prompt(["a", "b", "c"])
    with pytest.raises(UserError, match="3 shots for a clip of 5 frames, which has room for 2"):
        tiny_generator().sample([three])


def test_guidance_moves_away_from_a_negative_prompt_of_one_shot_in_every_shot(tiny_generator):
    backbone = tiny_generator()
    condition = backbone.encode_prompts([TWO])
    task = backbone.text_to_video_task(1, *backbone.frame_shape)
    noise = noise_like([0], backbone.spec.latent_shape(*backbone.frame_shape))
    sigma = torch.tensor([0.5])
    negative = backbone.encode_prompts(["a green star"])

    def velocity(rows: Condition, **guidance: object) -> torch.Tensor:
        return backbone.velocity(backbone.denoiser, noise, sigma, rows, task, **guidance)

    away = velocity(condition, guidance_scale=3.0, negative=negative)
    conditional, other = velocity(condition), velocity(negative)
    torch.testing.assert_close(away, other + 3 * (conditional - other), rtol=1e-3, atol=1e-4)


def test_a_prompt_for_a_longer_clip_still_conditions_a_single_frame(tiny_generator):
    """Training on images uses the first latent frame of clips and their whole prompts: only the first shot is in it."""
    backbone = tiny_generator()
    one_frame = backbone.text_to_video_task(1, 1, 32, 32)
    noise = noise_like([0], (8, 1, 2, 2))

    def velocity(prompt: str) -> torch.Tensor:
        condition = replace(backbone, frame_shape=(5, 32, 32)).encode_prompts([prompt])
        return backbone.velocity(
            backbone.denoiser, noise, torch.tensor([0.5]), condition, one_frame
        )

    torch.testing.assert_close(velocity(TWO), velocity("a red circle"), rtol=1e-4, atol=1e-5)

"""Stages, buckets and shares as pure functions: rates, caption shares, early stops, what stands where in the stream."""

from __future__ import annotations

import itertools
import math

import pytest

from generator.base import BackboneSpec
from generator.data.buckets import Bucket
from generator.data.store import Window
from generator.flow import shift_for_tokens
from generator.training import bucket_stream
from generator.training.bucket_stream import BucketEpochs, BucketStream, images_before
from generator.training.latents import Draws, SigmaConfig, TaskMixConfig
from generator.training.progressive import split_windows
from generator.training.stages import CaptionMixConfig, EarlyStop, EarlyStopConfig, learning_rate
from reelhf.errors import UserError
from tests.generator.staged_parts import STAGED, staged

SMALL, LARGE = Bucket(5, 32, 32), Bucket(9, 32, 32)
IMAGE = Bucket(1, 32, 32)


def window(number: int, bucket: Bucket, source: str | None = None) -> Window:
    shape = (bucket.num_frames, bucket.height, bucket.width)
    captions = {"caption": f"clip {number}"}
    return Window(
        f"key{number}", *shape, source or f"file{number}", f"{number}.mp4", 0.0, captions, ()
    )


def stream(windows, *, share=0.25, per_step=4, number=0, first=0, sharing=1) -> BucketStream:
    draws = Draws(3, SigmaConfig(), TaskMixConfig(text_to_image=share), 0.1)
    sizes, table = {SMALL: 3, LARGE: 2, IMAGE: 6}, {SMALL: 1.0, LARGE: 1.7, IMAGE: 0.4}
    return BucketStream(
        None, windows, draws, CaptionMixConfig(), sizes=sizes, table=table, micro_batches=per_step,
        number=number, first_position=first, name="test", sharing=sharing,
    )  # fmt: skip


WINDOWS = [window(i, SMALL if i % 3 else LARGE) for i in range(20)]


def test_the_shift_follows_the_square_root_of_the_positions():
    assert shift_for_tokens(3.0, 48, 48) == 3.0
    assert shift_for_tokens(3.0, 4 * 48, 48) == pytest.approx(6.0)
    assert shift_for_tokens(3.0, 999, None) == 3.0
    assert SigmaConfig(shift=2.0, base_tokens=12).shift_for(48) == pytest.approx(4.0)
    config = staged()  # 9 frames of 32x32 are 12 positions, its base is 8
    edges = config.sampler.sigmas
    shift = 2.0 * math.sqrt(12 / 8)
    assert edges[1] == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5))


def test_a_rate_rises_holds_and_falls_along_a_cosine():
    plain = [learning_rate(s, 10, lr=2.0, warmup_steps=4) for s in range(10)]
    assert plain == [0.5, 1.0, 1.5, 2.0, *[2.0] * 6]
    falling = [learning_rate(s, 11, lr=2.0, final_lr=0.5) for s in range(11)]
    assert (falling[0], falling[-1]) == (2.0, pytest.approx(0.5))
    assert falling[5] == pytest.approx(1.25)
    assert falling == sorted(falling, reverse=True)
    assert learning_rate(0, 1, lr=2.0, final_lr=0.5) == 0.5


def test_captions_are_drawn_by_their_shares():
    mix = CaptionMixConfig(caption=2.0, long_caption=1.0, motion_caption=1.0)
    drawn = [mix.pick(u / 400) for u in range(400)]
    assert [drawn.count(k) for k in ("caption", "long_caption", "motion_caption")] == [
        200,
        100,
        100,
    ]
    assert CaptionMixConfig().pick(0.999999) == "caption"
    assert CaptionMixConfig(caption=0, motion_caption=1).pick(0.0) == "motion_caption"
    with pytest.raises(ValueError, match="all 0"):
        CaptionMixConfig(caption=0)


def test_an_early_stop_waits_for_its_patience_and_remembers_the_best():
    stop = EarlyStop(EarlyStopConfig(patience=2))
    losses = [1.0, 0.8, 0.9, 0.7, 0.7, math.nan, 0.1]
    best = []
    for step, loss in enumerate(losses, start=1):
        if stop.stopped:
            break
        best.append(stop.observe(step, loss))
    assert best == [True, True, False, True, False, False]
    assert (stop.best_loss, stop.best_step) == (0.7, 4)
    again = EarlyStop(EarlyStopConfig(patience=2))
    again.load_state_dict(stop.state_dict())
    assert again.stopped
    never = EarlyStop(None)
    assert not never.observe(1, 1.0) and not never.stopped
    picky = EarlyStop(EarlyStopConfig(patience=1, min_improvement=0.1))
    assert [picky.observe(1, 1.0), picky.observe(2, 0.95)] == [True, False]


def test_an_epoch_of_buckets_holds_every_window_once_and_one_bucket_per_batch():
    groups = {SMALL: list(range(7)), LARGE: list(range(7, 12))}
    epochs = BucketEpochs(groups, {SMALL: 3, LARGE: 2}, seed=1, stream=0)
    assert epochs.per_epoch == 3 + 3
    orders = []
    for epoch in range(3):
        parts = [epochs[6 * epoch + i] for i in range(6)]
        rows = [row for _, own in parts for row in own]
        assert sorted(rows) == list(range(12))
        assert all(set(own) <= set(groups[bucket]) for bucket, own in parts)
        orders.append(rows)
    assert orders[0] != orders[1] != orders[2]
    assert BucketEpochs(groups, {SMALL: 3, LARGE: 2}, 1, 0)[13] == epochs[13]  # wherever one begins
    assert [BucketEpochs(groups, {SMALL: 3, LARGE: 2}, 1, 1)[i] for i in range(6)] != [
        epochs[i] for i in range(6)
    ]


@pytest.mark.parametrize("share", [0.0, 0.1, 1 / 3, 0.5, 1.0])
def test_images_come_at_exactly_their_share(share):
    counts = [images_before(n, share) for n in range(201)]
    assert all(b - a in (0, 1) for a, b in itertools.pairwise(counts))
    assert all(abs(count - n * share) < 1 for n, count in enumerate(counts))


def test_the_stream_mixes_images_at_their_share_and_shows_every_clip(monkeypatch):
    own = stream(WINDOWS)
    plans = [plan for step in range(40) for plan in own.planned(step)]
    assert sum(plan.as_images for plan in plans) == 40
    assert all((plan.bucket.num_frames == 1) == plan.as_images for plan in plans)
    shown = {row for plan in plans for row in plan.rows if not plan.as_images}
    assert shown == set(range(20))
    # no two samples share a position, so none shares its noise
    positions = [plan.position + i for plan in plans for i in range(len(plan.rows))]
    assert len(set(positions)) == len(positions)
    later = stream(WINDOWS, number=1, first=10_000)
    assert [p.rows for p in later.planned(0)] != [p.rows for p in own.planned(0)]


def test_pictures_are_the_images_where_there_are_any():
    with_pictures = [*WINDOWS, *(window(20 + i, IMAGE) for i in range(3))]
    plans = [p for step in range(20) for p in stream(with_pictures).planned(step)]
    images = {row for plan in plans if plan.as_images for row in plan.rows}
    assert images == {20, 21, 22}
    assert not {row for p in plans if not p.as_images for row in p.rows} & images
    with pytest.raises(UserError, match=r"has pictures only; set its tasks\.text_to_image to 1"):
        stream([window(i, IMAGE) for i in range(3)])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_step_is_the_same_on_any_number_of_processes(processes, monkeypatch):
    """What is planned does not ask who computes it; the shares cover it once, as many each, and weights average to one."""
    monkeypatch.setattr(bucket_stream, "world_size", lambda: processes)
    own, one = stream(WINDOWS), None
    for step in range(12):
        plans = own.planned(step)
        monkeypatch.setattr(bucket_stream, "world_size", lambda: 1)
        one = stream(WINDOWS)
        monkeypatch.setattr(bucket_stream, "world_size", lambda: processes)
        assert plans == one.planned(step)
        shares = own.shares(plans)
        assert sorted(i for share in shares for i in share) == list(range(4))
        assert {len(share) for share in shares} == {4 // processes}
    monkeypatch.setattr(bucket_stream, "world_size", lambda: 2)
    with pytest.raises(UserError, match="micro_batches 3 cannot be split over 2 processes"):
        stream(WINDOWS, per_step=3)


def test_whole_files_validate_and_one_file_is_too_few():
    windows = [window(i, SMALL, source=f"file{i // 4}") for i in range(40)]
    validation, training = split_windows(windows, 8, "stage x")
    assert (len(validation), len(training)) == (8, 32)
    assert not {w.source for w in validation} & {w.source for w in training}
    more = [*windows, *(window(40 + i, SMALL, source=f"file{10 + i}") for i in range(4))]
    kept_out = {w.source for w in validation} & {w.source for w in split_windows(more, 8, "x")[0]}
    assert kept_out  # the order of hashes is stable when clips are added
    assert len(split_windows(windows, 1, "x")[0]) == 4  # one whole file at least
    long_one = [window(100 + i, SMALL, source="long") for i in range(60)]
    kept_out, training = split_windows([*windows[:8], *long_one], 32, "x")
    assert len(kept_out) == 8  # the two short files; the long one, first in line or not, stays
    with pytest.raises(UserError, match="stage x: its 4 windows are all of one file"):
        split_windows(windows[:4], 8, "stage x")


def test_processes_that_share_clips_compute_the_same_micro_batches(monkeypatch):
    monkeypatch.setattr(bucket_stream, "world_size", lambda: 4)
    groups = []
    for process in range(4):
        monkeypatch.setattr(bucket_stream, "rank", lambda process=process: process)
        own = stream(WINDOWS, sharing=2)
        groups.append(own.own_group)
        assert len(own.shares(own.planned(0))) == 2
    assert groups == [0, 0, 1, 1]
    with pytest.raises(UserError, match="sequence_parallel 3 does not divide the 4 processes"):
        stream(WINDOWS, sharing=3)
    with pytest.raises(
        UserError, match=r"4 processes of which 2 share each clip; use a multiple of 2"
    ):
        stream(WINDOWS, per_step=3, sharing=2)


def test_configs_that_make_no_sense_are_refused():
    stages = STAGED["stages"]
    with pytest.raises(ValueError, match="two stages are called pictures"):
        staged(stages=[stages[0], stages[0]])
    with pytest.raises(ValueError, match="only the last may stop early"):
        staged(stages=[{**stages[0], "early_stop": {}}, stages[1]])
    with pytest.raises(ValueError, match="low_res of a stage is a refiner's"):
        staged(stages=[{**stages[0], "low_res": {}}])
    with pytest.raises(ValueError, match="text_tuning goes without early_stop"):
        staged(stages=[{**stages[0], "early_stop": {}}], text_tuning={"lr": 1e-5})
    with pytest.raises(ValueError, match="lora needs stages"):
        staged(stages=[], lora={"rank": 2})
    with pytest.raises(ValueError, match="sequence_parallel needs stages"):
        staged(stages=[], sequence_parallel=2)
    assert staged().total_steps == 8
    assert BackboneSpec(8).latent_shape(*staged().frame_shape) == (8, 3, 2, 2)

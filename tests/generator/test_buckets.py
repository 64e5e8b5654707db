"""Buckets: legal sizes, exact rates, and a reason for every clip that is left out."""

from __future__ import annotations

import csv
import math
import re

import pytest
import torch

from generator.data.buckets import (
    Bucket,
    BucketConfig,
    cropped_share,
    frames_at_rate,
    place,
    size_of,
)
from generator.data.doctor import examine, format_report
from reelhf.cli import main
from reelhf.errors import UserError
from reelhf.tables import format_table
from reelhf.video import write_video

CONFIG = BucketConfig()


@pytest.mark.parametrize("aspect", CONFIG.aspects)
@pytest.mark.parametrize("area", [480 * 832, 720 * 1280, 64 * 64])
def test_sizes_are_legal_and_near_the_area_and_aspect_asked_for(aspect, area):
    height, width = size_of(aspect, BucketConfig(area=area))
    assert height % 16 == width % 16 == 0
    step = 16 / math.sqrt(area * min(aspect, 1 / aspect))  # one latent pixel of the shorter side
    assert abs(math.log(width * height / area)) < step
    assert abs(math.log(width / height / aspect)) < step


def test_the_known_presets_come_out():
    assert size_of(832 / 480, CONFIG) == (480, 832)
    assert size_of(1.0, BucketConfig(area=512 * 512)) == (512, 512)
    assert size_of(16 / 9, BucketConfig(area=720 * 1280)) == (720, 1280)


def test_frames_at_a_rate_never_reach_past_the_last_frame():
    assert frames_at_rate(49, 24, 24) == 49
    assert frames_at_rate(1, 24, 24) == 1
    assert frames_at_rate(61, 30, 24) == 49
    assert frames_at_rate(60, 30, 24) == 48  # frame 48 would lie at 2 s, the last one is at 59 / 30
    for frames in (7, 50, 121):
        for fps in (23.976, 25.0, 29.97, 60.0):
            held = frames_at_rate(frames, fps, 24.0)
            assert (held - 1) / 24 <= (frames - 1) / fps + 1e-6
            assert held / 24 > (frames - 1) / fps


def test_the_cropped_share_is_an_area():
    assert cropped_share(1920, 1080, 1280, 720) == pytest.approx(0)
    assert cropped_share(1000, 500, 500, 500) == pytest.approx(0.5)  # two squares, one is kept
    assert cropped_share(500, 1000, 500, 500) == pytest.approx(0.5)


def test_a_clip_goes_into_the_longest_bucket_that_it_fills():
    where = place(200, 24, 1920, 1080, CONFIG)
    assert where.bucket == Bucket(121, *size_of(1.7778, CONFIG))
    assert (where.windows, where.usable_frames, where.reason) == (1, 200, None)
    assert place(120, 24, 1920, 1080, CONFIG).bucket.num_frames == 65
    assert place(66, 24, 1920, 1080, CONFIG).windows == 1
    assert place(300, 24, 1080, 1920, CONFIG).windows == 2
    assert place(300, 24, 1080, 1920, CONFIG).bucket.height > 800
    latent = (31, 30, 52)
    assert Bucket(121, 480, 832).tokens(CONFIG.spec) == math.prod(latent)


@pytest.mark.parametrize(
    ("clip", "reason"),
    [
        ((300, 16, 1920, 1080), "16 fps: at 24 some frames would be shown twice"),
        ((20, 24, 1920, 1080), "too short: 20 frames at 24 fps, the shortest bucket has 33"),
        ((60, 60, 1920, 1080), "too short: 24 frames at 24 fps"),
        ((300, 24, 4000, 800), r"aspect 5.00: the nearest bucket, 2.3\d, would crop 5\d%"),
        ((300, 24, 320, 180), r"320x180: would be enlarged 2.6\d times"),
    ],
)
def test_what_fits_no_bucket_says_why(clip, reason):
    where = place(*clip, CONFIG)
    assert where.bucket is None
    assert where.windows == 0
    assert re.search(reason, where.reason)


def test_nearly_the_rate_is_enough():
    assert place(300, 23.976, 1920, 1080, CONFIG).bucket is not None
    assert place(300, 23.976, 1920, 1080, BucketConfig(min_rate=1.0)).bucket is None


def test_a_config_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="use 33 or 37"):
        BucketConfig(num_frames=(35,))
    with pytest.raises(ValueError, match="at least one entry"):
        BucketConfig(aspects=())
    with pytest.raises(UserError, match="expected a positive number of each"):
        place(0, 24, 64, 64, CONFIG)


def test_the_doctor_prints_every_clip_and_a_damaged_one_is_a_row(tmp_path, capsys):
    folder = tmp_path / "footage"
    write_video(folder / "good.mp4", torch.rand(3, 9, 64, 64), 8.0)
    write_video(folder / "short.mp4", torch.rand(3, 3, 64, 64), 8.0)
    write_video(folder / "夜.mp4", torch.rand(3, 9, 64, 64), 4.0)
    (folder / "broken.mp4").write_bytes(b"not a video")
    words = ["fps=8", "num_frames=[5, 9]", "area=4096", "aspects=[1]"]
    command = ["generator", "data", "doctor", *words, "--clips", str(folder)]
    main([*command, "--csv", str(tmp_path / "table.csv")])
    said = capsys.readouterr().out
    assert "1 of 4 clips have a bucket; 3 would be skipped" in said
    rows = {row["clip"]: row for row in csv.DictReader((tmp_path / "table.csv").open())}
    assert rows["good.mp4"]["bucket"] == "9x64x64"
    assert rows["good.mp4"]["skipped"] == ""
    assert (rows["good.mp4"]["frames"], rows["good.mp4"]["fps"]) == ("9", "8")
    assert "too short" in rows["short.mp4"]["skipped"]
    assert "shown twice" in rows["夜.mp4"]["skipped"]
    assert "unreadable" in rows["broken.mp4"]["skipped"]
    assert rows["broken.mp4"]["frames"] == ""
    with pytest.raises(SystemExit) as strict:
        main([*command, "--strict"])
    assert strict.value.code == 1
    for wrong, line in (
        (["--clips", str(tmp_path / "nowhere")], "there is no such folder"),
        ([], "missing --clips"),
        (["fpz=8", "--clips", str(folder)], "fpz"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as refused:
            main(["generator", "data", "doctor", *wrong])
        assert refused.value.code == 2
        assert line in capsys.readouterr().err


def test_report_of_an_empty_folder(tmp_path):
    tmp_path.joinpath("note.txt").write_text("x")
    with pytest.raises(UserError, match="holds no videos"):
        examine(tmp_path, CONFIG)
    assert format_report([], CONFIG).endswith("0 of 0 clips have a bucket")


def test_columns_are_aligned_and_wide_characters_count_twice():
    lines = format_table(["clip", "n"], [["夜", "9"], ["night", "120"]]).splitlines()
    assert lines == ["clip     n", "夜       9", "night  120"]

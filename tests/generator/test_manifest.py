"""Manifests: every row counts or is named, and times mean frames."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from generator.data.manifest import ManifestClip, read_clips
from reelhf.cli import main
from reelhf.errors import UserError
from reelhf.video import write_video


@pytest.fixture
def footage(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, torch.rand(3, 9, 32, 32), 8.0)
    return tmp_path


def manifest(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "m.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "m.jsonl"


FULL = {
    "path": "a.mp4",
    "caption": "a dog",
    "long_caption": "a dog on grass",
    "motion_caption": "runs",
    "tags": ["animals", "best"],
    "start": 0.25,
    "end": 1.0,
}


def test_jsonl_and_parquet_hold_the_same(footage):
    rows = [FULL, {"path": "b.mp4", "caption": "猫"}]
    from_jsonl = read_clips(manifest(footage, *rows))
    pq.write_table(pa.Table.from_pylist(rows), footage / "m.parquet")
    assert read_clips(footage / "m.parquet") == from_jsonl
    first, second = from_jsonl
    assert first.captions == {
        "caption": "a dog",
        "long_caption": "a dog on grass",
        "motion_caption": "runs",
    }
    assert (first.tags, first.start, first.end) == (("animals", "best"), 0.25, 1.0)
    assert (second.captions, second.start, second.end) == ({"caption": "猫"}, 0.0, None)


def test_a_folder_of_captioned_clips_is_read_too(footage):
    (footage / "captions.jsonl").write_text(
        '{"path": "a.mp4", "shots": [{"end_frame": 4, "caption": "one"}, {"end_frame": null, "caption": "two"}]}\n'
        '{"path": "b.mp4", "caption": "three"}'
    )
    one, two, three = read_clips(footage)
    assert one.frame_range(9, 8.0) == (0, 4)
    assert two.frame_range(9, 8.0) == (4, 9)
    assert three.frame_range(9, 8.0) == (0, 9)


@pytest.mark.parametrize(
    ("start", "end", "frames"),
    [
        (0.0, None, (0, 9)),
        (0.25, 0.5, (2, 5)),  # both ends are frames of the clip
        (0.26, 0.49, (3, 4)),
        (1.0, 9.0, (8, 9)),
        (2.0, None, (16, 16)),
    ],
)
def test_times_are_the_frames_that_lie_between_them(start, end, frames):
    clip = ManifestClip(None, "a", {"caption": "x"}, (), start, end)
    assert clip.frame_range(9, 8.0) == frames


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{broken", "row 1: not JSON"),
        ([1], "expected an object"),
        ({"caption": "x"}, "no 'path'"),
        ({"path": "a.mp4"}, "a.mp4: no 'caption'"),
        ({"path": "a.mp4", "caption": "  "}, "a.mp4: no 'caption'"),
        ({"path": "gone.mp4", "caption": "x"}, "gone.mp4: there is no such file"),
        ({"path": "a.mp4", "caption": 3}, "caption is 3; expected text"),
        ({"path": "a.mp4", "caption": "x", "captoin_long": "y"}, "unknown column"),
        ({"path": "a.mp4", "caption": "x", "tag": "y"}, "Did you mean 'tags'?"),
        ({"path": "a.mp4", "caption": "x", "tags": "y"}, "expected a list of words"),
        ({"path": "a.mp4", "caption": "x", "start": "0:03"}, "start is '0:03'; expected seconds"),
        ({"path": "a.mp4", "caption": "x", "start": -1}, "expected seconds"),
        ({"path": "a.mp4", "caption": "x", "start": float("nan")}, "expected seconds"),
        ({"path": "a.mp4", "caption": "x", "start": 2, "end": 1}, "ends at 1 s, before it starts"),
    ],
)
def test_a_bad_row_is_named_with_what_is_wrong(footage, row, said):
    with pytest.raises(UserError) as error:
        read_clips(manifest(footage, row, FULL))
    assert said in str(error.value)
    assert "1 of 2 rows are wrong: row 1: " in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_manifest_is_refused(footage):
    with pytest.raises(UserError, match=r"expected a folder .* or a manifest ending in .jsonl"):
        read_clips(footage / "m.csv")
    with pytest.raises(UserError, match="there is no manifest"):
        read_clips(footage / "no.jsonl")
    with pytest.raises(UserError, match="holds no rows"):
        read_clips(manifest(footage, ""))
    (footage / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_clips(footage / "bad.parquet")


def test_the_doctor_places_the_parts_that_a_manifest_names(footage, capsys):
    rows = [FULL, {**FULL, "path": "b.mp4", "end": 0.3}, {**FULL, "start": 5.0, "end": 6.0}]
    path = manifest(footage, *rows)
    words = ["fps=8", "num_frames=[5]", "area=1024", "aspects=[1]"]
    main(["generator", "data", "doctor", *words, "--clips", str(path)])
    said = capsys.readouterr().out
    assert "1 of 3 clips have a bucket" in said
    assert "too short: 1 frames at 8 fps" in said
    assert "no frame from 5 s to 6 s: the file lasts 1.12 s" in said

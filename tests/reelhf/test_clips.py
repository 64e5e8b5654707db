"""Clip folders and windows: captions meet their frames, at the exact rate."""

from __future__ import annotations

import json

import pytest
import torch

from reelhf.clips import ClipEntry, load_clip_folder, load_windows, resize_frames
from reelhf.errors import UserError
from reelhf.video import write_video


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("REELHF_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_ramp(path, num_frames=24, fps=24.0, size=(32, 48)):
    """A clip whose brightness tells the frame number: frame k has level k / (num_frames - 1)."""
    levels = torch.linspace(0, 1, num_frames)
    write_video(path, levels[None, :, None, None].expand(3, num_frames, *size), fps, crf=4)


def write_captions(folder, *rows):
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_captions_from_a_table(tmp_path):
    write_ramp(tmp_path / "a.mp4")
    write_ramp(tmp_path / "b.webm")
    write_captions(
        tmp_path,
        {"path": "a.mp4", "caption": "a grey ramp", "caption_zh": "灰色渐变"},
        {
            "path": "b.webm",
            "shots": [{"end_frame": 10, "caption": "dark"}, {"end_frame": None, "caption": "明亮"}],
        },
    )
    entries = load_clip_folder(tmp_path)
    assert [(e.path.name, e.caption, e.start_frame, e.end_frame, e.language) for e in entries] == [
        ("a.mp4", "a grey ramp", 0, 24, "en"),
        ("a.mp4", "灰色渐变", 0, 24, "zh"),
        ("b.webm", "dark", 0, 10, "en"),
        ("b.webm", "明亮", 10, 24, "zh"),
    ]


def test_captions_from_text_files(tmp_path):
    (tmp_path / "sub").mkdir()
    write_ramp(tmp_path / "a.mp4")
    write_ramp(tmp_path / "sub" / "b.mp4")
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "sub" / "b.txt").write_text("two")
    assert [entry.caption for entry in load_clip_folder(tmp_path)] == ["one", "two"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ["2 of 2 videos", "a.mp4, b.mp4", "captions.jsonl"]),
        ([{"path": "a.mp4", "caption": "x"}], ["1 of 2 videos", "b.mp4"]),
        (
            [{"path": "a.mp4", "caption": "x"}, {"path": "c.mp4", "caption": "x"}],
            ["not there", "c.mp4"],
        ),
        ([{"path": "a.mp4"}], ["line 1", "neither 'caption' nor 'shots'"]),
        ([{"caption": "x"}], ["line 1", "no 'path'"]),
        (
            [
                {"path": "a.mp4", "shots": [{"end_frame": 99, "caption": "x"}]},
                {"path": "b.mp4", "caption": "x"},
            ],
            ["a.mp4", "from frame 0 to 99", "up to 24"],
        ),
    ],
)
def test_a_bad_folder_is_named_file_by_file(tmp_path, rows, words):
    write_ramp(tmp_path / "a.mp4")
    write_ramp(tmp_path / "b.mp4")
    write_captions(tmp_path, *rows)
    with pytest.raises(UserError) as error:
        load_clip_folder(tmp_path)
    for word in words:
        assert word in str(error.value)


def test_broken_lines_and_empty_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="no folder of clips"):
        load_clip_folder(tmp_path / "gone")
    with pytest.raises(UserError, match="holds no videos"):
        load_clip_folder(tmp_path)
    (tmp_path / "captions.jsonl").write_text("\n{oops\n")
    with pytest.raises(UserError, match="line 2 is not JSON"):
        load_clip_folder(tmp_path)


def windows(entries, **changes):
    arguments = {"num_frames": 5, "fps": 8.0, "size": (16, 16), "max_windows": 50, "seed": 0}
    return load_windows(entries, **{**arguments, **changes})


def test_windows_are_sampled_at_the_exact_rate(tmp_path):
    write_ramp(tmp_path / "a.mp4", num_frames=48, fps=24.0)
    entry = ClipEntry(tmp_path / "a.mp4", "ramp", 0, 48, 24.0, "en")
    cut = windows([entry])
    assert cut.frames.shape[1:] == (3, 5, 16, 16)
    assert cut.frames.dtype == torch.uint8
    numbers = cut.frames.float().mean((1, 3, 4)) / 255 * 47  # the frame number of each picture
    assert torch.allclose(
        numbers.diff(dim=1), torch.tensor(3.0), atol=0.6
    )  # 24 / 8 source frames per step
    assert len(set(numbers[:, 0].round().tolist())) == len(cut.captions) > 1


def test_windows_stay_inside_their_shot(tmp_path):
    write_ramp(tmp_path / "a.mp4", num_frames=48)
    entries = [
        ClipEntry(tmp_path / "a.mp4", "first", 0, 20, 24.0, "en"),
        ClipEntry(tmp_path / "a.mp4", "second", 20, 48, 24.0, "en"),
    ]
    cut = windows(entries)
    for frames, caption, index in zip(cut.frames, cut.captions, cut.entry_index, strict=True):
        numbers = frames.float().mean((0, 2, 3)) / 255 * 47
        low, high = (entries[index].start_frame, entries[index].end_frame - 1)
        assert caption == entries[index].caption
        assert numbers.min() > low - 0.6
        assert numbers.max() < high + 0.6


def test_a_long_clip_does_not_crowd_out_short_ones(tmp_path):
    write_ramp(tmp_path / "long.mp4", num_frames=240)
    write_ramp(tmp_path / "short.mp4", num_frames=20)
    entries = [
        ClipEntry(tmp_path / "long.mp4", "long", 0, 240, 24.0, "en"),
        ClipEntry(tmp_path / "short.mp4", "short", 0, 20, 24.0, "en"),
    ]
    assert sorted(windows(entries, max_windows=2).captions) == ["long", "short"]


def test_short_shots_are_left_out_and_named_when_nothing_remains(tmp_path, capsys):
    write_ramp(tmp_path / "a.mp4", num_frames=24)
    short = ClipEntry(tmp_path / "a.mp4", "short", 0, 6, 24.0, "en")
    long = ClipEntry(tmp_path / "a.mp4", "long", 6, 24, 24.0, "en")
    assert set(windows([short, long]).captions) == {"long"}
    assert "1 of 2 shots are shorter" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"the longest lasts 0\.25 s"):
        windows([short])


def test_the_second_time_comes_from_the_cache_and_a_changed_file_does_not(tmp_path, monkeypatch):
    write_ramp(tmp_path / "a.mp4")
    entry = ClipEntry(tmp_path / "a.mp4", "ramp", 0, 24, 24.0, "en")
    first = windows([entry])
    with monkeypatch.context() as patch:
        patch.setattr("reelhf.clips._decode_windows", lambda *_: pytest.fail("decoded again"))
        again = windows([entry])
        recaptioned = windows([ClipEntry(tmp_path / "a.mp4", "other words", 0, 24, 24.0, "en")])
    assert torch.equal(first.frames, again.frames)
    assert set(recaptioned.captions) == {"other words"}
    write_video(tmp_path / "a.mp4", torch.zeros(3, 24, 32, 48), 24)
    assert not torch.equal(windows([entry]).frames, first.frames)


def test_resize_keeps_the_aspect_and_crops_the_centre():
    frames = torch.zeros(3, 1, 20, 60)
    frames[..., 20:40] = 1.0  # the middle third of a wide picture
    assert resize_frames(frames, (10, 10)).min() > 0.9
    wide = resize_frames(frames, (10, 30))
    assert wide[..., 12:18].min() > 0.95
    assert wide[..., :8].max() < 0.05
    same = torch.rand(3, 2, 16, 16)
    assert torch.equal(resize_frames(same, (16, 16)), same)


def test_resize_averages_fine_detail_instead_of_aliasing():
    stripes = (torch.arange(64) % 2).float().expand(3, 1, 64, 64)
    assert resize_frames(stripes, (16, 16))[..., 2:-2, 2:-2].sub(0.5).abs().max() < 0.05


@pytest.mark.realdata
def test_real_footage_gives_windows(real_data):
    entries = load_clip_folder(real_data / "clips")
    assert [e.end_frame for e in entries if e.path.name == "nasa_13013.mp4"] == [240, 390]
    short = [e for e in entries if e.path.name == "car_detection.mp4"]
    cut = windows(short, num_frames=9, size=(64, 64), max_windows=6)
    assert cut.frames.shape == (6, 3, 9, 64, 64)
    assert cut.frames.float().std() > 5

"""Video files: what goes in comes out, at its true rate, or one clear line says why not."""

from __future__ import annotations

import av
import pytest
import torch

from reelhf import video
from reelhf.errors import UserError
from reelhf.video import iterate_frames, probe_video, read_video, write_video


def moving_bar(num_frames=9, height=48, width=64):
    """Float [3, F, H, W]: smooth background, a grey bar that moves 4 pixels per frame."""
    rows = torch.linspace(0.1, 0.9, height)[:, None].expand(height, width)
    frames = torch.stack([rows, rows.flip(0), torch.full_like(rows, 0.5)])[:, None].repeat(
        1, num_frames, 1, 1
    )
    for index in range(num_frames):
        frames[:, index, :, 4 * index : 4 * index + 8] = 0.8
    return frames


def psnr(a, b):
    return -10 * torch.log10(((a - b) ** 2).mean()).item()


@pytest.mark.parametrize(("suffix", "floor"), [("mp4", 35), ("webm", 35), ("gif", 28)])
@pytest.mark.parametrize("fps", [8.0, 12.5, 25.0, 24000 / 1001])
def test_round_trip_keeps_pixels_count_and_rate(tmp_path, suffix, floor, fps):
    frames = moving_bar()
    write_video(tmp_path / f"a.{suffix}", frames, fps)
    back, back_fps = read_video(tmp_path / f"a.{suffix}")
    assert back.shape == (3, 9, 48, 64)
    assert back.dtype == torch.uint8
    assert psnr(back.float() / 255, frames) > floor
    # a GIF counts hundredths of a second, so its rate is exact only on average
    assert back_fps == pytest.approx(fps, rel=0.02 if suffix == "gif" else 1e-6)


@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif"])
def test_the_frame_asked_for_is_the_frame_returned(tmp_path, suffix):
    levels = torch.linspace(0, 1, 12)
    write_video(tmp_path / f"a.{suffix}", levels[None, :, None, None].expand(3, 12, 32, 32), 8)
    part, _ = read_video(tmp_path / f"a.{suffix}", start=4, num_frames=3)
    assert part.float().mean((0, 2, 3)).div(255).tolist() == pytest.approx(
        levels[4:7].tolist(), abs=0.02
    )
    picked = [
        picture.mean() / 255
        for picture in iterate_frames(tmp_path / f"a.{suffix}", indices=[1, 1, 7, 11])
    ]
    assert picked == pytest.approx(levels[[1, 7, 11]].tolist(), abs=0.02)


@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif"])
def test_chunks_of_a_clip_write_the_bytes_of_the_whole(tmp_path, suffix):
    frames = moving_bar(num_frames=37, height=47)
    write_video(tmp_path / f"whole.{suffix}", frames, 8)
    write_video(tmp_path / f"chunks.{suffix}", iter(frames.split([1, 4, 20, 12], dim=1)), 8)
    whole, chunks = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("whole", "chunks"))
    assert whole == chunks


def test_a_chunk_is_asked_for_only_when_the_one_before_is_written(tmp_path, monkeypatch):
    events, to_pictures = [], video._to_pictures
    monkeypatch.setattr(
        video, "_to_pictures", lambda *a, **k: events.append("converted") or to_pictures(*a, **k)
    )

    def chunks():
        for chunk in moving_bar(num_frames=9).split(3, dim=1):
            events.append("asked")
            yield chunk

    write_video(tmp_path / "a.mp4", chunks(), 8)
    assert events == ["asked", "converted"] * 3


def test_no_chunk_at_all_is_an_error_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="got none"):
        write_video(tmp_path / "a.mp4", iter(()), 8)
    assert list(tmp_path.iterdir()) == []


def test_uint8_and_float_write_the_same_bytes_every_time(tmp_path):
    frames = moving_bar()
    write_video(tmp_path / "a.mp4", frames, 8)
    write_video(tmp_path / "b.mp4", frames.mul(255).round().to(torch.uint8), 8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_files_carry_no_trace_of_the_encoder_or_the_machine(tmp_path):
    write_video(tmp_path / "a.mp4", moving_bar(), 8)
    content = (tmp_path / "a.mp4").read_bytes()
    assert not any(trace in content for trace in (b"x264", b"Lavf", b"Lavc"))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert "title" not in container.metadata
        assert "creation_time" not in container.metadata
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"


def test_one_frame_and_odd_sizes_are_fine(tmp_path):
    write_video(tmp_path / "a.mp4", torch.rand(3, 1, 33, 47), 8)
    info = probe_video(tmp_path / "a.mp4")
    assert (info.frames, info.height, info.width, info.fps) == (1, 34, 48, 8.0)
    assert info.seconds == pytest.approx(1 / 8)
    write_video(tmp_path / "a.gif", torch.rand(3, 1, 33, 47), 8)
    assert (probe_video(tmp_path / "a.gif").height, probe_video(tmp_path / "a.gif").width) == (
        33,
        47,
    )


def test_the_best_of_several_video_streams_is_read(tmp_path):
    with av.open(str(tmp_path / "two.mp4"), "w") as container:
        streams = [container.add_stream("libx264", rate=8) for _ in range(2)]
        for stream, size in zip(streams, (32, 64), strict=True):
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
        for stream, size, level in zip(streams, (32, 64), (0, 255), strict=True):
            picture = torch.full((size, size, 3), level, dtype=torch.uint8).numpy()
            for _ in range(3):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
            container.mux(stream.encode())
    frames, _ = read_video(tmp_path / "two.mp4")
    assert frames.shape == (3, 3, 64, 64)
    assert frames.float().mean() > 250


def make_garbage(path):
    path.write_bytes(b"not a video" * 50)


def make_empty(path):
    path.write_bytes(b"")


def make_cut_short(path):
    write_video(path, torch.rand(3, 30, 64, 64), 8)
    path.write_bytes(path.read_bytes()[:-2000])


def make_sound_only(path):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        container.mux(stream.encode(None))


def make_no_frames(path):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode())


@pytest.mark.parametrize(
    "make", [make_garbage, make_empty, make_cut_short, make_no_frames, make_sound_only]
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, make):
    path = tmp_path / "bad.mp4"
    make(path)
    with pytest.raises(UserError, match=r"bad\.mp4") as error:
        read_video(path)
    assert "\n" not in str(error.value)


def test_missing_and_too_short_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no video file at .*gone\.mp4"):
        probe_video(tmp_path / "gone.mp4")
    write_video(tmp_path / "a.mp4", moving_bar(5), 8)
    with pytest.raises(UserError, match=r"has 5 frames; asked for 4 from frame 2"):
        read_video(tmp_path / "a.mp4", start=2, num_frames=4)


def test_writing_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(UserError, match=r"\.mp4, \.webm, \.gif"):
        write_video(tmp_path / "a.txt", moving_bar(), 8)
    with pytest.raises(ValueError, match=r"\[3, F, H, W\]"):
        write_video(tmp_path / "a.mp4", moving_bar()[0], 8)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_video(tmp_path / "file" / "a.mp4", moving_bar(), 8)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.realdata
def test_real_files_are_probed_right(real_data):
    nasa = probe_video(real_data / "clips" / "nasa_13013.mp4")
    assert (nasa.width, nasa.height, nasa.frames) == (
        480,
        270,
        390,
    )  # the better of its two streams
    film = probe_video(real_data / "clips" / "tears_of_steel_battle.webm")
    assert (film.width, film.height, film.frames, film.fps) == (800, 332, 1691, 24.0)

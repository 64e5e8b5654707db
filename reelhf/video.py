"""Video files in and out, with PyAV: true frame rates, exact frame counts, clear errors.

Frames are `[3, F, H, W]`, RGB. Colours are written as BT.709, limited range, and tagged so.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import torch
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from torch import Tensor

from reelhf.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".webm", ".gif", ".mov", ".mkv", ".avi", ".m4v")
MAX_FPS = 1000  # above this a container's rate is a time base, not a frame rate
GIF_CENTISECONDS = Fraction(1, 100)  # the resolution of a GIF's frame delays
CHUNK_FRAMES = 16
"""Frames converted to pictures at a time."""
MAX_READERS = 8
"""Files decoded at once."""
CODECS: dict[str, tuple[str, str, dict[str, str]]] = {  # suffix -> codec, pixel format, options
    # x264's lookahead gave other bytes in 1 of 250 writes of the same small clip, even on one thread; without it 0 of 1200
    ".mp4": ("libx264", "yuv420p", {"x264-params": "rc-lookahead=0:sync-lookahead=0"}),
    ".webm": ("libvpx-vp9", "yuv420p", {"b": "0", "deadline": "good", "cpu-used": "4"}),
    ".gif": ("gif", "pal8", {}),
}


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds: its best video stream, counted frame by frame."""

    path: Path
    frames: int
    fps: float
    width: int
    height: int
    seconds: float


def probe_video(path: str | Path) -> VideoInfo:
    """Frame count, rate and size of a video file, without decoding it.

    Raises: UserError naming the file if it is missing, is not a video, or holds no frame.
    """
    path = Path(path)
    with _open(path) as container:
        stream = _best_stream(container, path)
        try:
            times = [
                packet.pts
                for packet in container.demux(stream)
                if packet.size and packet.pts is not None
            ]
        except av.error.FFmpegError as error:
            raise _damaged(path, error) from None
        if not times:
            raise UserError(f"{path} holds no video frames; is it cut short?")
        fps = _frame_rate(stream, times)
        width, height = stream.codec_context.width, stream.codec_context.height
    return VideoInfo(path, len(times), fps, width, height, len(times) / fps)


def read_video(
    path: str | Path, *, start: int = 0, num_frames: int | None = None
) -> tuple[Tensor, float]:
    """Decode a clip.

    Args:
        start: first frame to return.
        num_frames: how many; None reads to the end, and a number demands that many.
    Returns: frames uint8 `[3, F, H, W]` and the frames per second.
    Raises: UserError naming the file if it is missing, damaged, empty or too short.
    """
    path = Path(path)
    info = probe_video(path)
    wanted = info.frames - start if num_frames is None else num_frames
    if wanted < 1 or start < 0 or start + wanted > info.frames:
        raise UserError(f"{path} has {info.frames} frames; asked for {wanted} from frame {start}.")
    pictures = list(iterate_frames(path, indices=range(start, start + wanted)))
    if len(pictures) < wanted:
        raise UserError(
            f"{path} is damaged: {len(pictures)} of {wanted} frames from frame {start} can be decoded."
        )
    frames = torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2).contiguous()
    return frames, info.fps


def iterate_frames(path: str | Path, *, indices: Any) -> Any:
    """Decode only the frames whose number is in `indices` (ascending), one array `[H, W, 3]` at a time.

    Every picture has the size of the first; frames before and between are decoded, not converted.
    """
    path = Path(path)
    wanted = iter(indices)
    target = next(wanted, None)
    if target is None:
        return
    size: tuple[int, int] | None = None
    with _open(path) as container:
        stream = _best_stream(container, path)
        stream.thread_type = "AUTO"
        try:
            for index, frame in enumerate(container.decode(stream)):
                if index < target:
                    continue
                size = size or (frame.width, frame.height)
                yield frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
                while target is not None and target <= index:
                    target = next(wanted, None)
                if target is None:
                    return
        except av.error.FFmpegError as error:
            raise _damaged(path, error) from None


def read_videos(paths: Iterable[str | Path]) -> Iterator[tuple[Tensor, float]]:
    """`read_video` of each file, in order, several at a time: decoding happens outside Python's lock."""
    for read in read_videos_or_errors(paths):
        if isinstance(read, UserError):
            raise read
        yield read


def read_videos_or_errors(
    paths: Iterable[str | Path],
) -> Iterator[tuple[Tensor, float] | UserError]:
    """`read_videos`, with the error in the place of a file that cannot be read."""
    count = min(MAX_READERS, os.cpu_count() or 1)
    waiting: deque[Future[tuple[Tensor, float] | UserError]] = deque()
    with ThreadPoolExecutor(count) as readers:
        for path in paths:
            waiting.append(readers.submit(_read_or_error, path))
            if len(waiting) > 2 * count:  # not the whole folder in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read_or_error(path: str | Path) -> tuple[Tensor, float] | UserError:
    try:
        return read_video(path)
    except UserError as error:
        return error


def write_video(
    path: str | Path,
    frames: Tensor | Iterable[Tensor],
    fps: float,
    *,
    crf: int = 14,
    preset: str = "medium",
) -> None:
    """Encode a clip as .mp4 (H.264), .webm (VP9) or .gif; it appears whole or not at all.

    The file carries no metadata and its bytes depend only on the frames, the rate and the codec's
    version. H.264 and VP9 need even sizes: an odd edge is repeated once.

    Args:
        frames: `[3, F, H, W]`, float in [0, 1] (clamped) or uint8; or such chunks of one clip in order, each converted and
            encoded before the next is asked for (a GIF, whose palette is the clip's, waits for all of them).
        fps: frames per second, above 0.
        crf: quality, 0 is lossless, 14 looks lossless, 51 is worst; a GIF ignores it.
        preset: x264's trade of time for size, "ultrafast" to "veryslow"; other codecs ignore it.
    """
    path = Path(path)
    if fps <= 0:
        raise ValueError(f"expected fps > 0, got {fps}")
    if path.suffix.lower() not in CODECS:
        raise UserError(f"cannot write {path}: expected a name ending in {', '.join(CODECS)}.")
    chunks = frames.split(CHUNK_FRAMES, dim=1) if isinstance(frames, Tensor) else frames
    is_gif = path.suffix.lower() == ".gif"
    pictures = (picture for chunk in chunks for picture in _to_pictures(chunk, even=not is_gif))
    first = next(pictures, None)
    if first is None:
        raise ValueError("expected frames [3, F, H, W] with F > 0, got none")
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix.lower()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_gif:
            _encode_gif(aside, [first, *pictures], fps)
        else:
            _encode(aside, chain([first], pictures), first.shape[:2], fps, crf, preset)
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def _to_pictures(frames: Tensor, *, even: bool) -> np.ndarray:
    """uint8 `[F, H, W, 3]`, padded to even sides if asked."""
    if frames.ndim != 4 or frames.shape[0] != 3 or frames.shape[1] == 0:
        raise ValueError(f"expected frames [3, F, H, W] with F > 0, got {tuple(frames.shape)}")
    frames = frames.detach().cpu()
    if frames.is_floating_point():
        frames = frames.float().clamp(0, 1).mul(255).round().to(torch.uint8)
    pictures = frames.permute(1, 2, 3, 0).contiguous().numpy()
    height, width = pictures.shape[1:3]
    if even and (height % 2 or width % 2):
        pictures = np.pad(pictures, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return pictures


def _encode(
    path: Path,
    pictures: Iterable[np.ndarray],
    size: tuple[int, ...],
    fps: float,
    crf: int,
    preset: str,
) -> None:
    """Pictures [H, W, 3] of `size` (H, W), read one at a time."""
    codec, pixel_format, options = CODECS[path.suffix]
    if codec == "libx264":
        options = {**options, "preset": preset}
    rate = Fraction(fps).limit_denominator(1001)
    container_options = {"movflags": "+faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options={"fflags": "+bitexact", **container_options}) as container:
        stream: Any = container.add_stream(codec, rate=rate, options={**options, "crf": str(crf)})
        stream.height, stream.width = size
        stream.pix_fmt = pixel_format
        context = stream.codec_context
        context.thread_count = 1  # the bitstream depends on the number of threads
        context.colorspace = Colorspace.ITU709.value
        context.color_primaries = ColorPrimaries.BT709.value
        context.color_trc = ColorTrc.BT709.value
        context.color_range = ColorRange.MPEG.value
        # x264 writes its version and settings into the stream as SEI, NAL unit 6
        plain = (
            BitStreamFilterContext("filter_units=remove_types=6", stream)
            if codec == "libx264"
            else None
        )
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format=pixel_format, dst_colorspace=Colorspace.ITU709
            )
            frame.pts, frame.time_base = index, 1 / rate
            _mux(container, plain, stream.encode(frame))
        _mux(container, plain, [*stream.encode(), None])


def _mux(container: Any, plain: Any, packets: Any) -> None:
    for packet in packets:
        if plain is not None:
            container.mux(plain.filter(packet))
        elif packet is not None:
            container.mux(packet)


def _encode_gif(path: Path, pictures: list[np.ndarray], fps: float) -> None:
    """One palette for the whole clip; delays alternate so that the mean rate is exact."""
    height, width = pictures[0].shape[:2]
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=width, height=height, format=av.VideoFormat("rgb24"), time_base=GIF_CENTISECONDS
    )
    split = graph.add("split")
    palette = graph.add("palettegen")
    mapped = graph.add("paletteuse", "dither=bayer")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(mapped, 1, 0)
    palette.link_to(mapped, 0, 1)
    mapped.link_to(sink)
    graph.configure()
    for index, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = round(index * 100 / fps), GIF_CENTISECONDS
        source.push(frame)
    source.push(None)
    last_delay = round(len(pictures) * 100 / fps) - round((len(pictures) - 1) * 100 / fps)
    options = {"fflags": "+bitexact", "final_delay": str(last_delay)}
    with av.open(str(path), "w", options=options) as container:
        stream: Any = container.add_stream("gif", rate=100)
        stream.height, stream.width, stream.pix_fmt = height, width, "pal8"
        stream.codec_context.time_base = GIF_CENTISECONDS
        for _ in pictures:
            mapped_frame = sink.pull()
            mapped_frame.time_base = GIF_CENTISECONDS
            container.mux(stream.encode(mapped_frame))
        container.mux(stream.encode())


def _open(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"no video file at {path}.")
    try:
        return av.open(str(path))
    except av.error.FFmpegError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f"{path} cannot be read as a video ({reason}); is it damaged or cut short?")


def _best_stream(container: Any, path: Path) -> Any:
    """The stream with the largest picture; some files carry a thumbnail or a smaller copy first."""
    streams = [stream for stream in container.streams.video if stream.codec_context is not None]
    if not streams:
        raise UserError(f"{path} holds no video stream.")
    return max(streams, key=lambda stream: stream.codec_context.width * stream.codec_context.height)


def _frame_rate(stream: Any, times: list[int]) -> float:
    """Mean rate by the frames' own times; a container's nominal rate can be wrong."""
    span = (max(times) - min(times)) * float(stream.time_base or 0)
    measured = (len(times) - 1) / span if span > 0 else 0.0
    nominal = float(stream.average_rate or stream.guessed_rate or 0)
    if 0 < nominal <= MAX_FPS and (not measured or abs(nominal - measured) < 0.01 * measured):
        return nominal
    return measured or 1.0

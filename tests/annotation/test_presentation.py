"""What annotators see must not tell them which model made it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from annotation.presentation import (
    Measured,
    PresentationConfig,
    copy_tasks,
    plan_task,
    store_picture,
)
from reelhf.errors import UserError
from reelhf.hashing import sha256_file
from reelhf.video import probe_video, read_video, write_video


def measured(path: Path) -> Measured:
    info = probe_video(path)
    return Measured(path, sha256_file(path), info.frames, info.fps, info.width, info.height)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[Measured]:
    """A wide short clip of 10 fps and a square long one of 5 fps."""
    folder = tmp_path_factory.mktemp("mixed")
    wide = torch.full((3, 5, 32, 64), 0.8)
    square = torch.zeros(3, 6, 48, 48)
    square[:, :, :, :] = torch.linspace(0.2, 0.9, 6)[None, :, None, None]
    for name, frames, fps in (("modelA", wide, 10.0), ("modelB", square, 5.0)):
        write_video(folder / f"{name}.mp4", frames, fps)
    return [measured(folder / "modelA.mp4"), measured(folder / "modelB.mp4")]


def test_all_copies_of_a_task_have_one_size_rate_and_length(mixed, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        plan, copies = copy_tasks([mixed], tmp_path, PresentationConfig(min_side=16), pool)[0]
    infos = [probe_video(path) for path in copies]
    assert {(i.width, i.height, i.fps, i.frames) for i in infos} == {(64, 48, 10.0, 12)}
    assert (plan.width, plan.height, plan.num_frames) == (64, 48, 12)

    wide, _ = read_video(copies[0])
    assert wide[:, :, :6].max() < 30, "letterboxed in black above"
    assert wide[:, :, 12:36].float().mean() == pytest.approx(204, abs=6)
    assert (wide[:, 5:].float() - wide[:, 4:5].float()).abs().max() < 12, "holds its last frame"

    square, _ = read_video(copies[1])
    brightness = square[:, :, 20:28, 28:36].float().mean(dim=(0, 2, 3)) / 255
    steps = brightness[::2]
    assert torch.allclose(steps, torch.linspace(0.2, 0.9, 6), atol=0.03), "5 fps shown at 10 fps"


def test_copies_carry_no_name_and_no_metadata(mixed, tmp_path):
    import av

    with ThreadPoolExecutor(1) as pool:
        _, copies = copy_tasks([mixed], tmp_path, PresentationConfig(min_side=16), pool)[0]
    for path in copies:
        assert "model" not in path.name.lower()
        assert b"modelA" not in path.read_bytes()
        with av.open(str(path)) as container:
            texts = {**container.metadata, **container.streams.video[0].metadata}
        allowed = {
            "major_brand",
            "minor_version",
            "compatible_brands",
            "language",
            "handler_name",
            "vendor_id",
        }
        assert set(texts) <= allowed, texts


def test_a_copy_is_made_once(mixed, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        _, first = copy_tasks([mixed], tmp_path, PresentationConfig(min_side=16), pool)[0]
        written = [path.stat().st_mtime_ns for path in first]
        _, second = copy_tasks([mixed], tmp_path, PresentationConfig(min_side=16), pool)[0]
    assert first == second
    assert [path.stat().st_mtime_ns for path in second] == written


def clip(width: int, height: int, fps: float = 8.0, frames: int = 8) -> Measured:
    return Measured(Path("x.mp4"), "0" * 64, frames, fps, width, height)


def test_the_plan_keeps_within_its_bounds():
    config = PresentationConfig()
    small = plan_task([clip(64, 64), clip(64, 64)], config)
    assert (small.width, small.height) == (256, 256)
    large = plan_task([clip(1920, 1080, fps=60.0, frames=6000), clip(1080, 1080)], config)
    assert max(large.width, large.height) == config.max_side
    assert large.fps == config.max_fps
    assert large.num_frames == config.max_seconds * config.max_fps
    odd = plan_task([clip(355, 201)], config)
    assert odd.width % 2 == odd.height % 2 == 0


def test_a_first_frame_is_stored_as_a_plain_png_and_a_wrong_file_is_named(tmp_path):
    source = tmp_path / "secretmodel.jpg"
    Image.new("RGB", (8, 8), (200, 10, 10)).save(source, comment=b"made by secretmodel")
    path, sha256 = store_picture(source, tmp_path / "pictures")
    assert path.name == f"{sha256}.png"
    assert b"secretmodel" not in path.read_bytes()
    source.write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"secretmodel\.jpg is not a readable picture"):
        store_picture(source, tmp_path / "pictures")

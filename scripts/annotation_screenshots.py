"""Takes the pictures of the annotation page in docs/images, in the system's Chromium: python scripts/annotation_screenshots.py"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from playwright.sync_api import Page, sync_playwright
from torch import Tensor

from annotation import claims
from annotation.api.app import create_app
from annotation.api.server import running_server
from annotation.config import AnnotateConfig
from annotation.records import ClipRecord
from annotation.store import Store
from generator.toyworld import caption, render, sample_scene
from reelhf.video import write_video

OUT = Path(__file__).resolve().parent.parent / "docs" / "images"
FPS, FRAMES, SIZE = 12.0, 24, 256
WINDOW = {"width": 1280, "height": 800}
NAME, PASSWORD = "ann", "a long password"


def flawed(frames: Tensor, how: int, rng: random.Random) -> Tensor:
    """The clip as a weaker model might have made it: noisy, frozen, blurred, too dark, or jumping."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    if how % 8 == 1:
        return (frames + 0.12 * torch.randn(frames.shape, generator=generator)).clamp(0, 1)
    if how % 8 == 2:
        return torch.cat(
            [frames[:, : FRAMES // 3], frames[:, FRAMES // 3 :][:, :1].expand(-1, 16, -1, -1)], 1
        )
    if how % 8 == 3:
        small = torch.nn.functional.avg_pool2d(frames.transpose(0, 1), 8)
        return torch.nn.functional.interpolate(small, size=SIZE, mode="bilinear").transpose(0, 1)
    if how % 8 == 4:
        return frames * 0.5
    if how % 8 == 5:
        return frames.roll(SIZE // 6, dims=-1)
    if how % 8 == 6:
        return frames[:, torch.arange(FRAMES) // 4 * 4]
    return frames if how % 8 == 0 else frames.flip(0)


def make_clips(folder: Path, number: int, seed: int) -> list[ClipRecord]:
    """`number` clips of one prompt of the toy world."""
    rng = random.Random(seed)
    scene = sample_scene(rng)
    good = render(scene, num_frames=FRAMES, size=SIZE, fps=FPS, seed=seed)
    found = []
    for index in range(number):
        path = folder / f"{seed}-{index}.mp4"
        write_video(path, flawed(good, index, rng), FPS)
        found.append(ClipRecord(path, caption(scene), f"model-{index}", "demo"))
    return found


@contextmanager
def page_of(
    store: Store, path: str = "/", *, language: str = "en-US", dark: bool = False
) -> Iterator[Page]:
    """A page of the site, in a fresh browser in which someone is signed in."""
    config = AnnotateConfig(must_watch=0)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium on this machine: apt-get install chromium")
    with running_server(create_app(store, config)) as url, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        scheme = "dark" if dark else "light"
        page = browser.new_context(viewport=WINDOW, locale=language, color_scheme=scheme).new_page()
        page.set_default_timeout(120_000)
        page.request.post(f"{url}/api/login", data={"name": NAME, "password": PASSWORD})
        page.goto(url + path)
        page.wait_for_selector("#player video")
        page.wait_for_function("document.querySelector('#prompt textarea').value !== ''")
        page.wait_for_timeout(1500)
        yield page
        browser.close()


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)
        page.wait_for_timeout(120)


def picture(page: Page, name: str) -> None:
    page.wait_for_timeout(600)
    path = OUT / f"annotate-{name}.jpg"
    page.screenshot(path=path, type="jpeg", quality=80)
    print(path)


def judging(folder: Path, clips: list[list[ClipRecord]]) -> None:
    """Best and worst, a pair, scores, eight clips."""
    with Store.open(folder) as store:
        store.add_user(NAME, PASSWORD)
        ids = [store.add_clips(group) for group in clips]
        store.create_tasks([ids[0][:4]], priority=9)
        store.create_tasks([ids[1][:2]], kind="gsb", priority=8)
        store.create_tasks([ids[2][:3]], kind="score", priority=7)
        store.create_tasks([ids[3]], priority=6)
        with page_of(store) as page:
            press(page, "1", "r", "4", "q")
            picture(page, "clash")
            press(page, "c", "1", "e", "2", "r", "t", "Enter")
            picture(page, "confirm")
            press(page, "y")
            page.wait_for_timeout(1500)
            press(page, "1", "t")
            picture(page, "pair")
            press(page, "2", "u", "Enter")
            page.wait_for_timeout(1500)
            press(page, "5", "3", "1", "4")
            picture(page, "score")
            press(page, "2", "1", "u", "u", "Enter")
            page.wait_for_timeout(2000)
            press(page, "1", "Shift+Digit4")
            picture(page, "eight-clips")
        with page_of(store, language="zh-CN", dark=True) as page:
            press(page, "f")
            picture(page, "chinese-dark")


def practice(folder: Path, clips: list[list[ClipRecord]]) -> None:
    """What a newcomer reads after a first task."""
    known = {
        "motion_quality": {"best": 0, "worst": 2, "why": "One clip stands still half way."},
        "aesthetic_quality": {"best": 0, "worst": 1, "why": "Noise counts against a clip."},
    }
    with Store.open(folder) as store:
        store.add_user(NAME, PASSWORD)
        ids = store.add_clips(clips[0])
        store.create_tasks([ids[:4]], purpose="practice", answers=[known])
        with page_of(store) as page:
            press(page, *["1", "r"] * 4, "Enter")
            page.wait_for_selector("#feedback", state="visible")
            picture(page, "practice")


def flagged(folder: Path, clips: list[list[ClipRecord]]) -> None:
    """What a reviewer sees of the tasks that annotators reported."""
    said = (
        (0, "ambiguous_prompt", "left or right?"),
        (1, "broken", "B stands still half way | look at <b>all</b> of it"),
        (2, "unsafe", ""),
        (0, "broken", "D is nothing but noise"),
    )
    with Store.open(folder) as store:
        store.add_user(NAME, PASSWORD, role="reviewer")
        store.create_tasks([store.add_clips(group[:4]) for group in clips[:3]], need=2)
        people = [store.add_user(f"annotator {person}", PASSWORD) for person in range(3)]
        for person, kind, note in said:
            task = claims.claim(store, people[person], lease_seconds=60)
            assert task is not None
            claims.flag(store, people[person], task.presentation, kind, note)
        for theme, options in (("", {}), ("-chinese-dark", {"language": "zh-CN", "dark": True})):
            with page_of(store, "/flags/", **options) as page:
                picture(page, f"flags{theme}")


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clips = [make_clips(folder, 8, seed) for seed in (3, 5, 11, 16)]
        for number, scene in enumerate((judging, practice, flagged)):
            scene(folder / str(number), clips)


if __name__ == "__main__":
    main()

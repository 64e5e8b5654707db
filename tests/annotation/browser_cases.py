"""What the tests in a browser share: clips that move, someone who signs in, keys, and waiting for words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import torch

from reelhf.video import write_video
from tests.annotation.annotation_cases import PASSWORD

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PATIENCE_MS = 90_000  # the other tests may keep every core busy
SECONDS, FPS = 2.0, 8.0
XSS = '<img src=x onerror="window.hacked=1"> A red ball & <b>nothing</b> else'


def moving_clips(folder: Path, number: int, *, shift: int = 24) -> list[Path]:
    """Clips of a bright square that moves to the right, `shift` pixels from the top."""
    paths = []
    for index in range(number):
        frames = torch.full((3, int(SECONDS * FPS), 64, 64), 0.1 + 0.08 * index)
        for frame in range(frames.shape[1]):
            frames[0, frame, shift : shift + 16, 2 * frame : 2 * frame + 16] = 0.9
        paths.append(folder / f"secretmodel{shift}-{index}.mp4")
        write_video(paths[-1], frames, FPS)
    return paths


def sign_in(browser: Browser, url: str, name: str = "ann") -> tuple[Page, list[str], list[str]]:
    """A fresh browser context on the annotation page, with the errors and the addresses it asked for."""
    page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    page.set_default_timeout(PATIENCE_MS)
    errors: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    assert urlsplit(page.url).path == "/login"
    page.wait_for_function("document.activeElement.name === 'name'")  # ready to type
    page.keyboard.type(name)
    page.keyboard.press("Tab")
    page.keyboard.type(PASSWORD)
    page.keyboard.press("Enter")
    page.wait_for_selector("#player video")
    page.wait_for_function("document.querySelector('#prompt textarea').value !== ''")
    return page, errors, asked


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)
        page.wait_for_timeout(30)


def addresses(page: Page) -> list[str]:
    """Of the clips, without the signature, which is new for every claim."""
    script = "[...document.querySelectorAll('#player video')].map((v) => v.src.split('?')[0])"
    return list(page.evaluate(script))


def wait_for_text(page: Page, selector: str, text: str) -> None:
    page.wait_for_function(
        "([where, text]) => document.querySelector(where)?.innerText.includes(text)",
        arg=[selector, text],
    )


PALE = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const over = ([r, g, b, a = 1], under) => [r, g, b].map((v, i) => a * v + (1 - a) * under[i]);
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((under, layer) => (layer.length ? over(layer, under) : under), [255, 255, 255]);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const worded = [...document.querySelectorAll("body *")].filter((e) =>
    e.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && !e.closest("[aria-disabled=true], [data-blocked='1'], .sr-only, script, style") &&
    [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()));
  return worded.map((e) => {
    const ground = behind(e), [a, b] = [light(over(parse(getComputedStyle(e).color), ground)), light(ground)];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.innerText.slice(0, 40)];
  }).filter(([ratio]) => ratio < 4.5);
}"""
"""Texts whose contrast is below 4.5, with it. Source: WCAG 2.2, success criterion 1.4.3 (AA)."""
NAMELESS = """() => [...document.querySelectorAll('button, input, textarea, [role=radiogroup], video')]
  .filter((e) => e.offsetParent !== null)
  .filter((e) => !(e.getAttribute('aria-label') || e.innerText || e.placeholder || e.labels?.[0]?.innerText))
  .map((e) => e.outerHTML.slice(0, 120))"""
"""Controls that a screen reader cannot name."""
UNSEEN_FOCUS = """() => {
  const e = document.activeElement, marked = (x) => x && getComputedStyle(x).outlineStyle !== 'none' && parseFloat(getComputedStyle(x).outlineWidth) >= 1;
  return e === document.body || marked(e) || marked(e.closest('label')) || getComputedStyle(e).boxShadow !== 'none' ? null : e.outerHTML.slice(0, 120);
}"""
"""The control that has the keyboard, unless one sees that it has."""


def label(page: Page, row: int) -> str:
    return page.inner_text(f"#row-{row} .question strong").strip()

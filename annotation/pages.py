"""What the pages of the site share: how they look, how they are mounted, and the words they say."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

    from annotation.config import AnnotateConfig

STATIC = Path(__file__).parent / "static"
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO_FONTS = ("ui-monospace", "Consolas", "monospace")


@lru_cache(maxsize=1)
def strings() -> dict[str, dict[str, str]]:
    """Language -> name -> what the pages say."""
    return dict(json.loads((STATIC / "strings.json").read_text(encoding="utf-8")))


def blocks(title: str) -> gr.Blocks:
    """An empty page."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr

    return gr.Blocks(title=title, analytics_enabled=False, fill_width=True)


def theme() -> gr.themes.Base:
    import gradio as gr

    base = gr.themes.Base(
        primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=MONO_FONTS
    )
    return base.set(  # its own grey and indigo are too pale to read on and under white
        body_text_color_subdued="*neutral_500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )


def in_browser(trigger: Any, js: str, inputs: Sequence[Any] | None, outputs: Sequence[Any]) -> None:
    """Has an event answered by a script in the browser; nothing of it reaches Python."""
    trigger(fn=None, js=js, inputs=inputs, outputs=outputs, queue=False, show_progress="hidden")


def start(view: Sequence[Any], words: Sequence[Any]) -> str:
    """The call that starts a page's script, which Gradio may have fetched by the time it asks for it, or not yet."""
    waiting = "while (!window.reelhf) await new Promise((go) => setTimeout(go, 20));"
    return f"async () => {{ {waiting} return window.reelhf.start({len(view)}, {len(words)}); }}"


def button(text: str, elem_id: str, **look: Any) -> gr.Button:
    import gradio as gr

    return gr.Button(text, elem_id=elem_id, **look)


BAR_BUTTONS = {
    "flagged": ("to_flagged", "to-flagged", 70),
    "to_work": ("to_work", "to-work", 70),
    "to_quality": ("to_quality", "to-quality", 70),
    "language": ("language", "language", 60),
    "theme": ("dark", "theme", 60),
    "guide": ("guide_button", "guide-button", 90),
    "help": ("help_button", "help-button", 90),
    "sign_out": ("sign_out", "sign-out", 80),
}
"""Name -> its word, its id and its least width."""


def top_bar(say: dict[str, str], line: str, names: Sequence[str]) -> dict[str, Any]:
    """The bar above a page: the brand, a line that its script fills, called `line`, and some of `BAR_BUTTONS`."""
    import gradio as gr

    with gr.Row(elem_id="topbar"):
        gr.Markdown("**ReelHF**", elem_id="brand")
        parts: dict[str, Any] = {line: gr.Markdown("", elem_id="progress")}
        for name in names:
            word, elem_id, width = BAR_BUTTONS[name]
            parts[name] = button(say[word], elem_id, size="sm", min_width=width)
    return parts


def mount(
    app: FastAPI,
    page: gr.Blocks,
    path: str,
    config: AnnotateConfig,
    *,
    scripts: Sequence[str] = (),
    styles: Sequence[str] = (),
) -> None:
    """Mounts a page. The app's `Gate` asks for a session, and `api.policy` for a role, before anything of it is served.

    Args:
        path: where; "/" takes every path that is left, so it comes last.
        scripts, styles: files of `static/`, in the order loaded.
    """
    import gradio as gr

    folder = f"{config.root_path}/annotate"
    # not `css_paths`: Gradio rewrites those selectors, and rules that start at `body` are lost
    links = [f'<link rel="stylesheet" href="{folder}/{name}">' for name in styles]
    links += [f'<script src="{folder}/{name}"></script>' for name in scripts]
    gr.mount_gradio_app(
        app,
        page,
        path=path,
        theme=theme(),
        head="".join(links) or None,
        root_path=config.root_path + path.rstrip("/") if config.root_path else None,
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        show_error=False,
        blocked_paths=["/"],
    )

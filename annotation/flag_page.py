"""The page at `/flags`: the tasks that annotators reported, their clips and what was said, for a reviewer to decide about.

Native Gradio components that `static/flags.js` fills from `/api/flagged`, as on the annotation page; no event reaches Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from annotation import pages
from annotation.app import PLAYER, note_box, prompt_box
from annotation.pages import button

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

    from annotation.config import AnnotateConfig

SCRIPTS = ("player.js", "storage.js", "site.js", "flags.js")
VIEW = ("summary", "queue", "prompt", "reports", "removal", "note", "status", "done")
"""What changes with the task, in the order in which the script returns it."""
WORDS = (
    "theme",
    "language",
    "help",
    "to_work",
    "to_quality",
    "reopen",
    "remove",
    "confirm",
    "cancel",
    "keys",
    "note",
    "prompt",
)
"""What changes with the language alone."""


def build(*, title: str = "ReelHF annotation") -> gr.Blocks:
    """The page, without data."""
    import gradio as gr

    say = pages.strings()["en"]
    with pages.blocks(f"{title}: flags") as blocks:
        bar = ("to_work", "to_quality", "language", "theme", "help")
        parts = pages.top_bar(say, "summary", bar)
        with gr.Row(elem_id="desk"):
            parts["queue"] = gr.Radio([], label=say["flagged_tasks"], elem_id="queue")
            with gr.Column(elem_id="work"):
                parts["prompt"] = prompt_box(say)
                gr.HTML(PLAYER, elem_id="player-box", apply_default_css=False)
                # latex and line breaks off: what people wrote is text and nothing else
                parts["reports"] = gr.Markdown("", elem_id="reports", latex_delimiters=[])
                parts |= _removal_panel(say) | _actions(say)
        parts["done"] = gr.Markdown("", elem_id="done")
        parts["keys"] = gr.Markdown(say["flags_keys"], elem_id="shortcuts")
        parts["refresh"] = button("refresh", "refresh")  # clicked by the script after a key press
        _listen(blocks, parts)
    return blocks


def _listen(blocks: gr.Blocks, parts: dict[str, Any]) -> None:
    view, words = [parts[name] for name in VIEW], [parts[name] for name in WORDS]
    for trigger, call in (
        (blocks.load, pages.start(view, words)),
        (parts["language"].click, "() => window.reelhf.switchLanguage()"),
        (parts["theme"].click, "() => window.reelhf.switchTheme()"),
    ):
        pages.in_browser(trigger, call, None, view + words)
    for name, call in (
        ("refresh", "render()"),
        ("help", "toggleHelp()"),
        ("to_work", "leave('/')"),
        ("to_quality", "leave('/quality/')"),
        ("reopen", "reopen()"),
        ("remove", "askRemoval()"),
        ("confirm", "remove()"),
        ("cancel", "cancel()"),
    ):
        pages.in_browser(parts[name].click, f"() => window.reelhf.{call}", None, view)
    queue = parts["queue"]
    pages.in_browser(queue.input, "(v) => window.reelhf.choose(v)", [queue], view)


def _removal_panel(say: dict[str, str]) -> dict[str, Any]:
    import gradio as gr

    with gr.Row(elem_id="removal", elem_classes="strip"):
        return {
            "removal": gr.Markdown("", elem_id="removal-text"),
            "confirm": button(say["removal_yes"], "removal-yes", size="sm", variant="stop"),
            "cancel": button(say["cancel"], "removal-cancel", size="sm"),
        }


def _actions(say: dict[str, str]) -> dict[str, Any]:
    import gradio as gr

    with gr.Row(elem_id="actions"):
        return {
            "note": note_box(say),
            "status": gr.Markdown("", elem_id="status"),
            "remove": button(say["remove"], "remove", min_width=90),
            "reopen": button(say["reopen"], "reopen", variant="primary", min_width=120),
        }


def mount(app: FastAPI, config: AnnotateConfig) -> None:
    """Mounts the page; `api.policy` says who may see it."""
    styles = ("annotate.css", "flags.css")
    pages.mount(app, build(title=config.title), "/flags", config, scripts=SCRIPTS, styles=styles)

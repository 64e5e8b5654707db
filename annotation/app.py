"""The annotation page: native Gradio components whose events run in the browser and call the HTTP API.

No event reaches Python: each is `fn=None, js=...`, answered by the scripts in `static/`, which hold the state of one task and
return the new value of every component. Only the synchronised player is custom HTML. The page keeps no gr.State, serves no
file through Gradio and stores nothing there. Every word on it comes from `static/strings.json`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from annotation.claims import FLAG_KINDS, SKIP_REASONS
from annotation.records import DIMENSIONS, LETTERS, SCORES

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

    from annotation.config import AnnotateConfig

PLAYER = '<div id="player" role="group"></div>'
SCRIPTS = ("player.js", "answers.js", "outbox.js", "annotate.js")
ROWS = range(len(DIMENSIONS))


@lru_cache(maxsize=1)
def strings() -> dict[str, dict[str, str]]:
    """Language -> name -> what the page says."""
    path = Path(__file__).parent / "static" / "strings.json"
    return dict(json.loads(path.read_text(encoding="utf-8")))


@dataclass
class Page:
    """The components that the script fills, in the order in which it returns their values."""

    view: list[Any] = field(default_factory=list)
    """What changes with the task."""
    words: list[Any] = field(default_factory=list)
    """What changes with the language alone."""


def build(*, title: str = "ReelHF annotation") -> gr.Blocks:
    """The page, without data: the browser fills it from `/api/claim`."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr

    say = strings()["en"]
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        parts = Page()
        with gr.Row(elem_id="topbar"):
            gr.Markdown("**ReelHF**", elem_id="brand")
            progress = gr.Markdown("", elem_id="progress")
            language = _button(say["language"], "language", size="sm", min_width=60)
            theme = _button(say["dark"], "theme", size="sm", min_width=60)
            guide = _button(say["guide_button"], "guide-button", size="sm", min_width=90)
            helper = _button(say["help_button"], "help-button", size="sm", min_width=90)
            leave = _button(say["sign_out"], "sign-out", size="sm", min_width=80)
        with gr.Column(elem_id="work"):
            prompt = gr.Textbox(
                label=say["prompt"], interactive=False, lines=1, max_lines=6, elem_id="prompt"
            )
            gr.HTML(PLAYER, elem_id="player-box", apply_default_css=False)
            heads, rows = _questions(say)
            veto_text, another, no_pair = _veto_panel(say)
            confirm_text, worse, confirm, unconfirm = _confirm_panel(say)
            reason, cancel_skip = _reason_panel("skip", SKIP_REASONS, say)
            flag, cancel_flag = _reason_panel("flag", FLAG_KINDS, say)
            with gr.Row(elem_id="feedback"):
                feedback = gr.Markdown("", elem_id="feedback-text")
                go_on = _button(say["go_on"], "go-on", variant="primary", size="sm")
            with gr.Row(elem_id="actions"):
                note = gr.Textbox(
                    placeholder=say["note"],
                    interactive=True,  # Gradio would freeze what is only ever an output
                    show_label=False,
                    container=False,
                    lines=1,
                    max_lines=1,
                    max_length=2000,
                    elem_id="note",
                )
                status = gr.Markdown("", elem_id="status")
                back = _button(say["back"], "back", min_width=90)
                flag_button = _button(say["flag"], "flag-button", min_width=80)
                skip_button = _button(say["skip"], "skip", min_width=80)
                submit = _button(say["submit"], "submit", variant="primary", min_width=120)
        done = gr.Markdown("", elem_id="done")
        keys = gr.Markdown(say["keys"], elem_id="shortcuts")
        guidelines = gr.Markdown("", elem_id="guidelines")
        refresh = gr.Button("refresh", elem_id="refresh")  # clicked by the script after a key press

        parts.view = [prompt, progress, *heads]
        parts.view += [component for column in zip(*rows, strict=True) for component in column]
        parts.view += [veto_text, confirm_text, worse, feedback, note, status, done]
        parts.words = [theme, language, guide, helper, leave, another, no_pair, confirm, unconfirm]
        parts.words += [cancel_skip, cancel_flag, go_on, back, flag_button, skip_button, submit]
        parts.words += [keys, guidelines, *(row[3] for row in rows), reason, flag, note, prompt]

        def on(
            trigger: Any, call: str, inputs: list[Any] | None = None, *, all_words: bool = False
        ) -> None:
            outputs = parts.view + parts.words if all_words else parts.view
            trigger(
                fn=None,
                js=call,
                inputs=inputs,
                outputs=outputs,
                queue=False,
                show_progress="hidden",
            )

        sizes = f"{len(parts.view)}, {len(parts.words)}"
        on(page.load, f"() => window.reelhf.start({sizes})", all_words=True)
        on(refresh.click, "() => window.reelhf.render()")
        on(language.click, "() => window.reelhf.switchLanguage()", all_words=True)
        on(theme.click, "() => window.reelhf.switchTheme()", all_words=True)
        for index, (_, best, worst, other, score) in enumerate(rows):
            for kind, radio in (
                ("best", best),
                ("worst", worst),
                ("status", other),
                ("score", score),
            ):
                on(radio.input, f"(v) => window.reelhf.picked({index}, '{kind}', v)", [radio])
        on(another.click, "() => window.reelhf.chooseAnother()")
        on(no_pair.click, "() => window.reelhf.noValidPair()")
        on(worse.input, "(v) => window.reelhf.markWorse(v)", [worse])
        on(confirm.click, "() => window.reelhf.confirm()")
        on(skip_button.click, "() => window.reelhf.openPanel('skip')")
        on(flag_button.click, "() => window.reelhf.openPanel('flag')")
        for cancel in (cancel_skip, cancel_flag, unconfirm):
            on(cancel.click, "() => window.reelhf.closePanels()")
        on(reason.input, "(v) => window.reelhf.skip(v)", [reason])
        on(flag.input, "(v) => window.reelhf.flag(v)", [flag])
        on(back.click, "() => window.reelhf.back()")
        on(go_on.click, "() => window.reelhf.goOn()")
        on(submit.click, "() => window.reelhf.submit()")
        on(guide.click, "() => window.reelhf.toggle('guide')")
        on(helper.click, "() => window.reelhf.toggle('help')")
        on(leave.click, "() => window.reelhf.signOut()")
    return page


def _questions(say: dict[str, str]) -> tuple[list[Any], list[tuple[Any, ...]]]:
    """The heads of the columns, and one row per dimension: question, best, worst, other, score."""
    import gradio as gr

    rows = []
    with gr.Column(elem_id="dimensions"):
        with gr.Row(elem_classes="dimension heads"):
            gr.Markdown("")
            heads = [gr.Markdown("", elem_classes=f"head {name}") for name in ("best", "worst")]
            heads.append(gr.Markdown("", elem_classes="head other"))
        for index in ROWS:
            with gr.Row(elem_id=f"row-{index}", elem_classes="dimension"):
                question = gr.Markdown("", elem_classes="question")
                best = _letters(list(LETTERS), say["best"], "letters best")
                worst = _letters(list(LETTERS), say["worst"], "letters worst")
                score = _letters([str(score) for score in SCORES], say["or"], "letters score")
                other = _letters(
                    [(say["tie"], "tie"), (say["cannot_judge"], "cannot_judge")],
                    say["or"],
                    "letters other",
                )
                rows.append((question, best, worst, other, score))
    return heads, rows


def _veto_panel(say: dict[str, str]) -> tuple[Any, ...]:
    import gradio as gr

    with gr.Row(elem_id="veto", elem_classes="strip"):
        return (
            gr.Markdown("", elem_id="veto-text"),
            _button(say["another"], "veto-another", size="sm"),
            _button(say["no_pair"], "veto-none", size="sm"),
        )


def _confirm_panel(say: dict[str, str]) -> tuple[Any, ...]:
    import gradio as gr

    with gr.Row(elem_id="confirm", elem_classes="strip"):
        return (
            gr.Markdown("", elem_id="confirm-text"),
            gr.CheckboxGroup(
                [str(index + 1) for index in ROWS],
                label=say["confirm_worse"],
                show_label=False,
                container=False,
                elem_id="worse",
            ),
            _button(say["confirm_yes"], "confirm-yes", size="sm", variant="primary"),
            _button(say["cancel"], "confirm-cancel", size="sm"),
        )


def _reason_panel(name: str, reasons: tuple[str, ...], say: dict[str, str]) -> tuple[Any, Any]:
    import gradio as gr

    with gr.Row(elem_id=f"{name}-panel", elem_classes="strip reasons"):
        radio = gr.Radio(
            [(say[f"{name}_{reason}"], reason) for reason in reasons],
            label=say[f"{name}_why"],
            elem_id=f"{name}-reason",
            container=False,
        )
        return radio, _button(say["cancel"], f"{name}-cancel", size="sm")


def _button(text: str, elem_id: str, **look: Any) -> gr.Button:
    import gradio as gr

    return gr.Button(text, elem_id=elem_id, **look)


def _letters(choices: list[Any], label: str, classes: str) -> gr.Radio:
    import gradio as gr

    return gr.Radio(
        choices, label=label, show_label=False, container=False, elem_classes=classes, min_width=80
    )


def mount(app: FastAPI, config: AnnotateConfig) -> None:
    """Mounts the page at `/`. The app's `Gate` asks for a session before anything of it is served."""
    import gradio as gr

    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
    theme = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        font=fonts,
        font_mono=("ui-monospace", "Consolas", "monospace"),
    )
    gr.mount_gradio_app(
        app,
        build(title=config.title),
        path="/",
        theme=theme,
        # not `css_paths`: Gradio rewrites those selectors, and rules that start at `body` are lost
        head=f'<link rel="stylesheet" href="{config.root_path}/annotate/annotate.css">'
        + "".join(
            f'<script src="{config.root_path}/annotate/{name}"></script>' for name in SCRIPTS
        ),
        root_path=config.root_path or None,
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        show_error=False,
        blocked_paths=["/"],
    )

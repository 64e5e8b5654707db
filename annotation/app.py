"""The annotation page: native Gradio components whose events run in the browser and call the HTTP API.

No event reaches Python: each is `fn=None, js=...`, answered by `static/annotate.js`, which holds the state of one task and
returns the new value of every component. Only the synchronised player is custom HTML. The page keeps no gr.State, serves no
file through Gradio and stores nothing there.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from annotation.records import DIMENSIONS, LETTERS, MAX_CLIPS

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

    from annotation.config import AnnotateConfig
    from annotation.store import Store

SKIP_LABELS = (
    ("1  A clip is broken", "broken_clip"),
    ("2  The prompt is unclear", "unclear_prompt"),
    ("3  It is offensive", "offensive"),
    ("4  I cannot tell", "cannot_tell"),
    ("5  Another reason", "other"),
)

SHORTCUTS = """
| Key | Does |
|---|---|
| `1` `2` `3` `4` | best clip in the marked row |
| `Shift`+`1`…`4`, or `q` `w` `e` `r` | worst clip in the marked row |
| `t` / `u` | all the same (tie) / cannot judge |
| `n` / `p`, or `↓` / `↑` | next / previous row |
| `c` / `x` | after a veto: choose another pair / no valid pair |
| `Space` | play or pause all clips |
| `,` / `.` | one frame back / forward |
| `0` | back to the first frame |
| `s` | skip this task, with a reason |
| `m` | write a note (`Esc` leaves it) |
| `Enter` | submit |
"""

PLAYER = '<div id="player" aria-label="The clips"></div>'


def build(*, num_clips: int = 4, title: str = "ReelHF annotation") -> gr.Blocks:
    """The page, without data: the browser fills it from `/api/claim`.

    Args:
        num_clips: the largest K of the project's tasks; a smaller task hides the letters it does not need.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr

    letters = list(LETTERS[: min(max(num_clips, 2), MAX_CLIPS)])
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        with gr.Row(elem_id="topbar"):
            gr.Markdown("**ReelHF**", elem_id="brand")
            progress = gr.Markdown("", elem_id="progress")
            help_button = gr.Button("Shortcuts  ?", elem_id="help-button", size="sm", min_width=90)
            out_button = gr.Button("Sign out", elem_id="sign-out", size="sm", min_width=80)
        with gr.Column(elem_id="work"):
            prompt = gr.Textbox(
                label="Prompt", interactive=False, lines=1, max_lines=6, elem_id="prompt"
            )
            gr.HTML(PLAYER, elem_id="player-box", apply_default_css=False)
            questions, bests, worsts, others = [], [], [], []
            with gr.Column(elem_id="dimensions"):
                with gr.Row(elem_classes="dimension heads"):
                    gr.Markdown("")
                    gr.Markdown("Best  `1`–`4`", elem_classes="head")
                    gr.Markdown("Worst  `⇧1`–`⇧4`", elem_classes="head")
                    gr.Markdown("Or", elem_classes="head")
                for row in range(len(DIMENSIONS)):
                    with gr.Row(elem_id=f"row-{row}", elem_classes="dimension"):
                        questions.append(gr.Markdown("", elem_classes="question"))
                        bests.append(_letters(letters, "Best", "letters best"))
                        worsts.append(_letters(letters, "Worst", "letters worst"))
                        others.append(
                            gr.Radio(
                                [("Tie  t", "tie"), ("Can’t judge  u", "cannot_judge")],
                                label="Or",
                                show_label=False,
                                container=False,
                                elem_classes="letters other",
                            )
                        )
            with gr.Row(elem_id="veto"):
                veto_text = gr.Markdown("", elem_id="veto-text")
                another = gr.Button("Choose another pair  c", elem_id="veto-another", size="sm")
                no_pair = gr.Button("No valid pair  x", elem_id="veto-none", size="sm")
            with gr.Row(elem_id="skip-panel"):
                reason = gr.Radio(
                    list(SKIP_LABELS), label="Why skip it?", elem_id="skip-reason", container=False
                )
                cancel = gr.Button("Back  Esc", elem_id="skip-cancel", size="sm")
            with gr.Row(elem_id="actions"):
                note = gr.Textbox(
                    placeholder="Note (optional)  m",
                    interactive=True,  # Gradio would freeze what is only ever an output
                    show_label=False,
                    container=False,
                    lines=1,
                    max_lines=1,
                    max_length=2000,
                    elem_id="note",
                )
                status = gr.Markdown("", elem_id="status")
                skip_button = gr.Button("Skip  s", elem_id="skip", min_width=90)
                submit = gr.Button("Submit  ⏎", elem_id="submit", variant="primary", min_width=130)
        gr.Markdown("", elem_id="done")
        gr.Markdown(SHORTCUTS, elem_id="shortcuts")
        refresh = gr.Button("refresh", elem_id="refresh")  # clicked by the script after a key press

        view = [prompt, progress, *questions, *bests, *worsts, *others, veto_text, note, status]

        def on(trigger: object, call: str, inputs: list[object] | None = None) -> None:
            trigger(  # type: ignore[operator]
                fn=None, js=call, inputs=inputs, outputs=view, queue=False, show_progress="hidden"
            )

        on(page.load, f"() => window.reelhf.start({len(view)})")
        on(refresh.click, "() => window.reelhf.render()")
        for row in range(len(DIMENSIONS)):
            for kind, radio in (("best", bests[row]), ("worst", worsts[row])):
                on(radio.input, f"(v) => window.reelhf.picked({row}, '{kind}', v)", [radio])
            on(
                others[row].input,
                f"(v) => window.reelhf.picked({row}, 'status', v)",
                [others[row]],
            )
        on(another.click, "() => window.reelhf.chooseAnother()")
        on(no_pair.click, "() => window.reelhf.noValidPair()")
        on(skip_button.click, "() => window.reelhf.openSkip()")
        on(cancel.click, "() => window.reelhf.closePanels()")
        on(reason.input, "(v) => window.reelhf.skip(v)", [reason])
        on(submit.click, "() => window.reelhf.submit()")
        on(help_button.click, "() => window.reelhf.toggleHelp()")
        on(out_button.click, "() => window.reelhf.signOut()")
    return page


def _letters(letters: list[str], label: str, classes: str) -> gr.Radio:
    import gradio as gr

    return gr.Radio(
        letters, label=label, show_label=False, container=False, elem_classes=classes, min_width=80
    )


def mount(app: FastAPI, store: Store, config: AnnotateConfig) -> None:
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
        build(num_clips=store.clips_per_task(), title=config.title),
        path="/",
        theme=theme,
        # not `css_paths`: Gradio rewrites those selectors, and rules that start at `body` are lost
        head=f'<link rel="stylesheet" href="{config.root_path}/annotate/annotate.css">'
        f'<script src="{config.root_path}/annotate/annotate.js"></script>',
        root_path=config.root_path or None,
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        show_error=False,
        blocked_paths=["/"],
    )

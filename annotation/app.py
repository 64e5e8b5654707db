"""The annotation page: native Gradio components whose events run in the browser and call the HTTP API.

No event reaches Python: each is `fn=None, js=...`, answered by the scripts in `static/`, which hold the state of one task and
return the new value of every component. Only the synchronised player is custom HTML. The page keeps no gr.State, serves no
file through Gradio and stores nothing there. Every word on it comes from `static/strings.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from annotation import pages
from annotation.claims import FLAG_KINDS, SKIP_REASONS
from annotation.pages import button
from annotation.records import DIMENSIONS, LETTERS, SCORES
from annotation.verdicts import MAX_NOTE

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

    from annotation.config import AnnotateConfig

PLAYER = '<div id="player" role="group"></div>'
SCRIPTS = (
    "player.js",
    "answers.js",
    "storage.js",
    "drafts.js",
    "outbox.js",
    "site.js",
    "annotate.js",
)
ROWS = range(len(DIMENSIONS))
LISTENING = ("best", "worst", "status", "score")
"""What the script calls the four radios of a row."""


@dataclass
class Page:
    """The components of the page, by where they stand."""

    top: dict[str, Any]
    rows: list[tuple[Any, ...]]
    heads: list[Any]
    parts: dict[str, Any]

    def view(self) -> list[Any]:
        """What changes with the task, in the order in which the script returns it."""
        part = self.parts
        of_rows = [component for column in zip(*self.rows, strict=True) for component in column]
        names = (
            "veto_text",
            "confirm_text",
            "worse",
            "feedback",
            "note",
            "status",
            "done",
            "guidelines",
        )
        last = [part[name] for name in names]
        return [part["prompt"], self.top["progress"], *self.heads, *of_rows, *last]

    def words(self) -> list[Any]:
        """What changes with the language alone."""
        part, top = self.parts, self.top
        bar = [top[name] for name in ("theme", "language", "guide", "help", "flagged", "sign_out")]
        names = (
            "another",
            "no_pair",
            "confirm",
            "unconfirm",
            "cancel_skip",
            "cancel_flag",
            "go_on",
        )
        names += ("back", "flag_button", "skip_button", "submit", "keys")
        others = [row[3] for row in self.rows]
        last = [part[name] for name in ("skip", "flag", "note", "prompt")]
        return [*bar, *(part[name] for name in names), *others, *last]


def build(*, title: str = "ReelHF annotation") -> gr.Blocks:
    """The page, without data: the browser fills it from `/api/claim`."""
    import gradio as gr

    say = pages.strings()["en"]
    with pages.blocks(title) as blocks:
        bar = ("flagged", "language", "theme", "guide", "help", "sign_out")
        top = pages.top_bar(say, "progress", bar)
        with gr.Column(elem_id="work"):
            parts: dict[str, Any] = {"prompt": prompt_box(say)}
            gr.HTML(PLAYER, elem_id="player-box", apply_default_css=False)
            heads, rows = _questions(say)
            parts |= _veto_panel(say) | _confirm_panel(say)
            parts |= _reason_panel("skip", SKIP_REASONS, say)
            parts |= _reason_panel("flag", FLAG_KINDS, say)
            parts |= _feedback_panel(say) | _actions(say)
        parts["done"] = gr.Markdown("", elem_id="done")
        parts["keys"] = gr.Markdown(say["keys"], elem_id="shortcuts")
        parts["guidelines"] = gr.Markdown("", elem_id="guidelines")
        parts["refresh"] = button("refresh", "refresh")  # clicked by the script after a key press
        _listen(blocks, Page(top, rows, heads, parts))
    return blocks


def _listen(blocks: gr.Blocks, page: Page) -> None:
    """Wires every event to the function of the script that answers it."""
    view, words, part, top = page.view(), page.words(), page.parts, page.top
    everything = {
        blocks.load: pages.start(view, words),
        top["language"].click: "() => window.reelhf.switchLanguage()",
        top["theme"].click: "() => window.reelhf.switchTheme()",
    }
    for trigger, call in everything.items():
        pages.in_browser(trigger, call, None, view + words)
    clicks = {
        "refresh": "render()",
        "another": "chooseAnother()",
        "no_pair": "noValidPair()",
        "confirm": "confirm()",
        "skip_button": "openPanel('skip')",
        "flag_button": "openPanel('flag')",
        "cancel_skip": "closePanels()",
        "cancel_flag": "closePanels()",
        "unconfirm": "closePanels()",
        "back": "back()",
        "go_on": "goOn()",
        "submit": "submit()",
    }
    for name, call in clicks.items():
        pages.in_browser(part[name].click, f"() => window.reelhf.{call}", None, view)
    for name, call in {
        "guide": "toggle('guide')",
        "help": "toggle('help')",
        "flagged": "toFlagged()",
        "sign_out": "signOut()",
    }.items():
        pages.in_browser(top[name].click, f"() => window.reelhf.{call}", None, view)
    inputs = {part["worse"]: "markWorse(v)", part["skip"]: "skip(v)", part["flag"]: "flag(v)"}
    for index, row in enumerate(page.rows):
        for kind, radio in zip(LISTENING, row[1:], strict=True):
            inputs[radio] = f"picked({index}, '{kind}', v)"
    for component, call in inputs.items():
        pages.in_browser(component.input, f"(v) => window.reelhf.{call}", [component], view)


def prompt_box(say: dict[str, str]) -> gr.Textbox:
    """The prompt of a task, to be read."""
    import gradio as gr

    return gr.Textbox(
        label=say["prompt"], interactive=False, lines=1, max_lines=6, elem_id="prompt"
    )


def note_box(say: dict[str, str]) -> gr.Textbox:
    """A line for whoever wants to say why."""
    import gradio as gr

    return gr.Textbox(
        placeholder=say["note"],
        label=say["note"],
        interactive=True,  # Gradio would freeze what is only ever an output
        show_label=False,
        container=False,
        lines=1,
        max_lines=1,
        max_length=MAX_NOTE,
        elem_id="note",
    )


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


def _veto_panel(say: dict[str, str]) -> dict[str, Any]:
    import gradio as gr

    with gr.Row(elem_id="veto", elem_classes="strip"):
        return {
            "veto_text": gr.Markdown("", elem_id="veto-text"),
            "another": button(say["another"], "veto-another", size="sm"),
            "no_pair": button(say["no_pair"], "veto-none", size="sm"),
        }


def _confirm_panel(say: dict[str, str]) -> dict[str, Any]:
    import gradio as gr

    with gr.Row(elem_id="confirm", elem_classes="strip"):
        return {
            "confirm_text": gr.Markdown("", elem_id="confirm-text"),
            "worse": gr.CheckboxGroup(
                [str(index + 1) for index in ROWS],
                label=say["confirm_worse"],
                show_label=False,
                container=False,
                elem_id="worse",
            ),
            "confirm": button(say["confirm_yes"], "confirm-yes", size="sm", variant="primary"),
            "unconfirm": button(say["cancel"], "confirm-cancel", size="sm"),
        }


def _reason_panel(name: str, reasons: tuple[str, ...], say: dict[str, str]) -> dict[str, Any]:
    import gradio as gr

    with gr.Row(elem_id=f"{name}-panel", elem_classes="strip reasons"):
        return {
            name: gr.Radio(
                [(say[f"{name}_{reason}"], reason) for reason in reasons],
                label=say[f"{name}_why"],
                elem_id=f"{name}-reason",
                container=False,
            ),
            f"cancel_{name}": button(say["cancel"], f"{name}-cancel", size="sm"),
        }


def _feedback_panel(say: dict[str, str]) -> dict[str, Any]:
    import gradio as gr

    with gr.Row(elem_id="feedback"):
        return {
            "feedback": gr.Markdown("", elem_id="feedback-text"),
            "go_on": button(say["go_on"], "go-on", variant="primary", size="sm"),
        }


def _actions(say: dict[str, str]) -> dict[str, Any]:
    import gradio as gr

    with gr.Row(elem_id="actions"):
        return {
            "note": note_box(say),
            "status": gr.Markdown("", elem_id="status"),
            "back": button(say["back"], "back", min_width=90),
            "flag_button": button(say["flag"], "flag-button", min_width=80),
            "skip_button": button(say["skip"], "skip", min_width=80),
            "submit": button(say["submit"], "submit", variant="primary", min_width=120),
        }


def _letters(choices: list[Any], label: str, classes: str) -> gr.Radio:
    import gradio as gr

    return gr.Radio(
        choices, label=label, show_label=False, container=False, elem_classes=classes, min_width=80
    )


def mount(app: FastAPI, config: AnnotateConfig) -> None:
    """Mounts the page at `/`, where it takes every path that is left."""
    page = build(title=config.title)
    pages.mount(app, page, "/", config, scripts=SCRIPTS, styles=("annotate.css",))

"""Reviewing a run: reward and gold curves, verdicts, and clips before and after, as a page on this machine or as one file.

The page lists every finished loop (`loop.json`) and every training run (`metrics.jsonl`) under one folder. It only reads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from reelhf.errors import UserError

if TYPE_CHECKING:
    import gradio as gr
    import pandas as pd
    from fastapi import FastAPI

app = typer.Typer(
    add_completion=False, help="Reward curves and clips side by side.", no_args_is_help=True
)

TITLE = "ReelHF review"
METRICS = "metrics.jsonl"
MAX_DEPTH = 4
"""How many folders below the root are searched for runs."""
PLOTS_PER_ROW = 3
CLIP_SUFFIXES = (".mp4", ".webm", ".gif")
DEFAULT_PORT = 7861


@app.command()
def serve(
    runs: Annotated[Path, typer.Argument(help="Folder with runs or finished loops")] = Path("runs"),
    port: Annotated[int, typer.Option(help="Port on this machine")] = DEFAULT_PORT,
    host: Annotated[str, typer.Option(help="Address; only this machine by default")] = "127.0.0.1",
) -> None:
    """Serve the review page."""
    import time

    from annotation.api.server import running_server

    check_runs(runs)
    with running_server(create_review_app(runs), host=host, port=port) as url:
        print(f"review: {url}\nCtrl-C ends it.")
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            pass


@app.command()
def report(
    loop: Annotated[Path, typer.Argument(help="Folder of a finished loop, such as runs/demo")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write it [default: LOOP/report.html]")
    ] = None,
) -> None:
    """Write the self-contained report of a finished loop."""
    from rlhf.report import write_report

    print(f"report: {write_report(loop, out)}\nnext: open it in a browser, or send it to somebody")


@dataclass(frozen=True)
class Reviewable:
    """One thing to look at: a training run, with the loop it belongs to if there is one."""

    name: str
    run: Path
    """Folder with metrics.jsonl."""
    loop: Path | None
    role: str | None
    """base or refiner, within a loop."""


def check_runs(root: Path) -> None:
    """Raises UserError if there is nothing to review."""
    if not root.is_dir():
        raise UserError(f"no folder at {root}; expected one with runs, such as runs/")
    if not find_runs(root):
        raise UserError(f"{root} holds no run ({METRICS}) and no finished loop (loop.json)")


def find_runs(root: Path) -> list[Reviewable]:
    """Loops first, newest first, each as its two RLHF runs; then bare training runs. Links are not followed twice."""
    from rlhf.report import RECORD, LoopRecord

    found: list[Reviewable] = []
    loops = sorted(_below(root, RECORD), key=lambda path: -path.stat().st_mtime)
    for path in loops:
        try:
            record = LoopRecord.read(path.parent)
        except UserError:
            continue  # made by another version
        for role in ("refiner", "base"):
            run = record.path(f"rlhf_{role}")
            if run is not None and (run / METRICS).is_file():
                name = f"{os.path.relpath(path.parent, root)}: RLHF of the {role}"
                found.append(Reviewable(name.removeprefix(".: "), run, path.parent, role))
    known = {one.run.resolve() for one in found}
    for path in sorted(_below(root, METRICS), key=lambda path: -path.stat().st_mtime):
        if path.parent.resolve() not in known:
            found.append(Reviewable(os.path.relpath(path.parent, root), path.parent, None, None))
    return found


def _below(root: Path, name: str) -> list[Path]:
    """Files of this name at most MAX_DEPTH folders down, without following links to folders."""
    found = []
    for folder, subfolders, files in os.walk(root):
        if len(Path(folder).relative_to(root).parts) >= MAX_DEPTH:
            subfolders.clear()
        if name in files:
            found.append(Path(folder) / name)
    return found


# --- the page --------------------------------------------------------------------------------------------------------


def create_review_app(root: Path) -> FastAPI:
    """The site: the page at /, clips of known runs below /clip/, reports below /report/."""
    import gradio as gr
    from fastapi import FastAPI, HTTPException
    from fastapi.responses import FileResponse, Response

    site = FastAPI(title=TITLE, docs_url=None, redoc_url=None, openapi_url=None)

    @site.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @site.get("/clip/{name:path}")
    def clip(name: str, file: str) -> Response:
        chosen = next((one for one in find_runs(root) if one.name == name), None)
        if chosen is None or Path(file).suffix not in CLIP_SUFFIXES:
            raise HTTPException(404, "no such clip")
        for folder in clip_folders(chosen):
            path = (folder / file).resolve()
            if path.is_relative_to(folder.resolve()) and path.is_file():
                return FileResponse(path)
        raise HTTPException(404, "no such clip")

    @site.get("/report/{name:path}")
    def report_page(name: str) -> Response:
        from fastapi.responses import HTMLResponse

        from rlhf.report import LoopRecord, render_page

        chosen = next((one for one in find_runs(root) if one.name == name and one.loop), None)
        if chosen is None or chosen.loop is None:
            raise HTTPException(404, "no such loop")
        return HTMLResponse(render_page(LoopRecord.read(chosen.loop)))

    blocks = build_page(root)
    return gr.mount_gradio_app(
        site,
        blocks,
        path="/",
        footer_links=[],
        css=_CSS,
        theme=gr.themes.Default(primary_hue="blue"),
    )


def build_page(root: Path) -> gr.Blocks:
    """The Gradio page: choose a run, see its verdicts, curves and clips."""
    import gradio as gr

    names = [one.name for one in find_runs(root)]
    with gr.Blocks(title=TITLE, fill_width=False, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}")
        with gr.Row():
            choice = gr.Dropdown(
                names, value=names[0] if names else None, label="Run", container=False, scale=5
            )
            refresh = gr.Button("Read again", scale=1)
        refresh.click(lambda now: _choices(root, now), choice, choice)

        @gr.render(inputs=choice, triggers=[page.load, choice.change, refresh.click])
        def show(name: str | None) -> None:
            chosen = next((one for one in find_runs(root) if one.name == name), None)
            if chosen is None:
                gr.Markdown(
                    "Nothing here yet. A run appears as soon as it has written its first metrics."
                )
                return
            _show_run(chosen)

    return page


def _choices(root: Path, now: str | None) -> Any:
    import gradio as gr

    names = [one.name for one in find_runs(root)]
    return gr.Dropdown(names, value=now if now in names else (names[0] if names else None))


def _show_run(chosen: Reviewable) -> None:
    import gradio as gr

    from rlhf.report import LoopRecord, curve_names, kept_step, label_of

    rows = _metrics(chosen.run)
    if chosen.loop is not None and chosen.role is not None:
        record = LoopRecord.read(chosen.loop)
        comparison = record.json(f"compare_{chosen.role}", "comparison.json")
        if comparison is not None:
            gr.Markdown(f"## Verdicts\n[The whole report](report/{quote(chosen.name)})")
            gr.Dataframe(verdict_table(comparison), interactive=False, wrap=True)
            gr.Markdown(
                "## Before and after\nSame prompt, same noise, in step to the frame. Pause and drag to compare."
            )
            gr.HTML(pairs_html(chosen, comparison), js_on_load=_PLAYER)
        gold = record.json(f"gold_{chosen.role}", "gold_curve.json") or []
    else:
        gold = []
    kept = kept_step(rows)
    gr.Markdown(
        "## Curves" + (f"\nThe weights of step {kept} were kept." if kept is not None else "")
    )
    names = curve_names(rows, "reward")
    plotted = [(label_of(name), reward_frame(rows, name)) for name in names]
    plotted += [
        (f"{label_of(name)} (gold)", gold_frame(gold, name)) for name in curve_names(gold, "gold")
    ]
    if not names:
        plotted = [(name, metric_frame(rows, name)) for name in plain_metrics(rows)]
    for start in range(0, len(plotted), PLOTS_PER_ROW):
        with gr.Row():
            for title, frame in plotted[start : start + PLOTS_PER_ROW]:
                gr.LinePlot(
                    frame,
                    x="step",
                    y="value",
                    color="curve",
                    title=title,
                    x_title="step",
                    y_title=" ",
                    color_title=" ",
                    height=230,
                    color_map=COLOURS,
                )


def _metrics(run: Path) -> list[dict[str, Any]]:
    from reelhf.run import read_metrics

    return read_metrics(run)


COLOURS = {
    "training batch": "#9ec7e6",
    "validation": "#0b6fb8",
    "held-out judge": "#c2570c",
    "gold": "#1a7f4f",
    "value": "#0b6fb8",
}


def reward_frame(rows: Sequence[Mapping[str, Any]], name: str) -> pd.DataFrame:
    """Long table (step, value, curve) of one reward dimension."""
    from rlhf.report import reward_series

    shown = {"batch": "training batch", "held-out": "held-out judge", "validation": "validation"}
    points = [
        (step, value, next(label for word, label in shown.items() if word in series.label))
        for series in reward_series(rows, name)
        for step, value in series.points
    ]
    return _frame(points)


def gold_frame(rows: Sequence[Mapping[str, Any]], name: str) -> pd.DataFrame:
    """Long table of one gold dimension."""
    from rlhf.report import gold_series

    return _frame([(step, value, "gold") for step, value in gold_series(rows, name).points])


def metric_frame(rows: Sequence[Mapping[str, Any]], name: str) -> pd.DataFrame:
    """Long table of one metric of a run that has no rewards."""
    return _frame([(row["step"], row[name], "value") for row in rows if row.get(name) is not None])


def plain_metrics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of everything a run logged, without its book-keeping."""
    names = {key: None for row in rows for key in row}
    return [
        name
        for name in names
        if name not in ("step", "attempt", "time") and not name.startswith("seconds/")
    ]


def _frame(points: Sequence[tuple[float, float, str]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(points, columns=["step", "value", "curve"])


def verdict_table(comparison: Mapping[str, Any]) -> pd.DataFrame:
    """One row per stated check."""
    import pandas as pd

    from rlhf.report import measure_label

    rows = []
    for check in comparison["checks"]:
        measured = check.get("low") is not None
        rows.append(
            {
                "measure": measure_label(check["measure"]),
                "before": f"{check['before']:.3f}" if measured else "",
                "after": f"{check['after']:.3f}" if measured else "",
                "difference": f"{check['difference']:+.3f}" if measured else "",
                "interval": f"{check['low']:+.3f} to {check['high']:+.3f}"
                if measured
                else check.get("reason", "too few valid clips"),
                "must": "rise"
                if check["rule"] == "rises"
                else f"stay above {check.get('threshold', 0):+.3f}",
                "verdict": check["status"].replace("_", " "),
            }
        )
    return pd.DataFrame(rows)


def clip_folders(chosen: Reviewable) -> list[Path]:
    """Where clips of this run may be read from: its comparison, and its own samples."""
    from rlhf.report import LoopRecord

    folders = [chosen.run]
    if chosen.loop is not None:
        compared = LoopRecord.read(chosen.loop).path(f"compare_{chosen.role}")
        folders += [compared] if compared is not None else []
    return folders


def pairs_html(chosen: Reviewable, comparison: Mapping[str, Any]) -> str:
    """Before/after players; the script that keeps them in step is `_PLAYER`."""
    from html import escape

    cards = []
    for pair in comparison["pairs"]:
        videos = "".join(
            f"<figure><video muted playsinline preload='auto' src='clip/{quote(chosen.name)}?file={quote(pair['clips'][side][0])}'>"
            f"</video><figcaption>{side}</figcaption></figure>"
            for side in ("before", "after")
        )
        cards.append(
            f"<div class='pair'><div class='two'>{videos}</div><p>{escape(pair['prompt'])}</p></div>"
        )
    return (
        f"<div class='clips' data-fps='{comparison['fps']:g}' data-frames='{comparison['num_frames']}'>"
        "<div class='player'><button type='button' class='play'>Pause</button>"
        "<input type='range' min='0' max='1000' value='0' aria-label='position'><span class='frame'></span></div>"
        f"<div class='pairs'>{''.join(cards)}</div></div>"
    )


_PLAYER = """
const root = element.querySelector('.clips'), videos = [...root.querySelectorAll('video')];
const button = root.querySelector('.play'), slider = root.querySelector('input'), label = root.querySelector('.frame');
const fps = +root.dataset.fps, frames = +root.dataset.frames;
let playing = true, frame = 0, last = 0;
const show = () => {
  for (const v of videos) v.currentTime = (frame + 0.5) / fps;
  slider.value = frames > 1 ? 1000 * frame / (frames - 1) : 0;
  label.textContent = `frame ${frame + 1} of ${frames}`;
};
const set = on => { playing = on; button.textContent = on ? 'Pause' : 'Play'; };
button.onclick = () => set(!playing);
slider.oninput = () => { set(false); frame = Math.round(slider.value / 1000 * (frames - 1)); show(); };
const tick = now => {
  if (!root.isConnected) return;
  const pause = frame === frames - 1 ? 600 : 1000 / fps;
  if (playing && now - last >= pause) { last = now; frame = (frame + 1) % frames; show(); }
  requestAnimationFrame(tick);
};
show(); requestAnimationFrame(tick);
"""

_CSS = """
.clips .pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:16px}
.clips .pair{border:1px solid var(--border-color-primary);border-radius:10px;padding:10px;background:var(--background-fill-primary)}
.clips .two{display:grid;grid-template-columns:1fr 1fr;gap:8px}.clips figure{margin:0}
.clips figcaption{font-size:12px;text-align:center;color:var(--body-text-color-subdued)}
.clips video{width:100%;image-rendering:pixelated;border-radius:5px;background:#000;display:block}
.clips p{font-size:13px;margin:6px 0 0;color:var(--body-text-color)}
.clips .player{display:flex;gap:12px;align-items:center;margin-bottom:12px}.clips .player input{flex:1;max-width:420px}
.clips button{padding:4px 16px;border:1px solid var(--border-color-primary);border-radius:7px;background:var(--button-secondary-background-fill);color:var(--body-text-color)}
.clips .frame{font-size:13px;color:var(--body-text-color-subdued)}
"""

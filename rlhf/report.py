"""One self-contained page about one round of the loop: what got better, by how much, and what did not.

`write_report` reads the record a loop leaves (`loop.json`) and the artefacts it names, and writes one HTML file: charts as
inline SVG, clips as base64 mp4, nothing fetched from anywhere. It computes no result of its own.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from reelhf.charts import Series, interval_bar, legend, line_chart
from reelhf.errors import UserError
from reelhf.page import html_page

RECORD = "loop.json"
RECORD_VERSION = 1
PAGE = "report.html"
_STRIP_HEIGHT = 72  # pixels of the filmstrips that stand in for clips on paper
LABELS = {
    "prompt_following": "Prompt following",
    "motion_quality": "Motion quality",
    "aesthetic_quality": "Aesthetic quality",
    "structural_stability": "Structural stability",
    "preservation": "Preservation",
    "total": "Composite",
    "composite": "Composite",
    "motion_amplitude": "Motion amplitude",
    "amplitude": "Motion amplitude (pixels)",
}
SOURCES = {"reward": "reward", "held_out": "held-out reward", "gold": "gold", "motion": "measured"}


@dataclass(frozen=True)
class LoopRecord:
    """`loop.json`: where a loop's artefacts lie and what it took to make them."""

    folder: Path
    data: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> LoopRecord:
        """Raises UserError if the folder holds no finished loop."""
        path = folder / RECORD
        if not path.is_file():
            raise UserError(
                f"{folder} holds no {RECORD}: not the folder of a finished loop (such as runs/demo)"
            )
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema_version") != RECORD_VERSION:
            raise UserError(
                f"{path} has version {data.get('schema_version')}; this program reads {RECORD_VERSION}. Run the loop again"
            )
        return cls(folder, data)

    def path(self, name: str) -> Path | None:
        """Absolute path of an artefact, or None when this loop has none of that name."""
        value = self.data["artefacts"].get(name)
        return None if value is None else (self.folder / value)

    def json(self, name: str, file: str) -> Any | None:
        """A JSON file of an artefact, or None."""
        folder = self.path(name)
        path = None if folder is None else folder / file
        return (
            json.loads(path.read_text(encoding="utf-8"))
            if path is not None and path.is_file()
            else None
        )


def write_report(loop: Path, out: Path | None = None) -> Path:
    """Write the page of the loop in folder `loop`; returns its path (`loop/report.html` by default)."""
    record = LoopRecord.read(loop)
    page = render_page(record)
    out = out or loop / PAGE
    aside = out.with_name(out.name + ".part")
    aside.write_text(page, encoding="utf-8")
    aside.replace(out)
    return out


def render_page(record: LoopRecord) -> str:
    """The whole page as HTML text."""
    runs = [run for run in ("base", "refiner") if record.path(f"rlhf_{run}") is not None]
    sections = [
        _header(record, runs),
        *[part(record, run) for run in runs for part in (_verdict, _clips, _curves)],
        _rewards(record),
        _annotation(record),
        _generator(record),
        _stages(record),
        _method(record),
    ]
    title = f"ReelHF: {record.data['title']}"
    return html_page(title, [s for s in sections if s], script=_SCRIPT)


# --- the sections ----------------------------------------------------------------------------------------------------


def _header(record: LoopRecord, runs: Sequence[str]) -> str:
    data = record.data
    checks = [c for run in runs for c in _comparison(record, run)["checks"]]
    counts = {
        status: sum(c["status"] == status for c in checks)
        for status in ("pass", "fail", "not_measured")
    }
    stages = data["stages"]
    seconds = _total_seconds(stages)
    tiles = [
        (
            f"{counts['pass']} of {counts['pass'] + counts['fail']}",
            "checks passed" if counts["fail"] else "checks, all passed",
        ),
        (
            f"{data['annotation']['judgments']:,}",
            f"judgments by {data['annotation']['annotators']} annotators",
        ),
        (_clock(seconds), f"to make it all (budget {_clock(data['total_budget_seconds'])})"),
        (f"{max(stage['peak_bytes'] for stage in stages) / 1e9:.1f} GB", "peak memory"),
    ]
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in data["notes"])
    failed = [
        f"{LABELS_RUN[run]}: {measure_label(c['measure'])}"
        for run in runs
        for c in _comparison(record, run)["checks"]
        if c["status"] == "fail"
    ]
    verdict = (
        f'<p class="note bad">Not shown by this run: {escape("; ".join(failed))}.</p>'
        if failed
        else ""
    )
    tile_html = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in tiles
    )
    return (
        f"<header><h1>{escape(data['title'])}</h1><p class='muted'>{escape(data['created'])}, {escape(data['machine'])}, "
        f"commit {escape(data['commit'] or 'unknown')}</p>{_LOOP_PICTURE}{_NAVIGATION}<div class='tiles'>{tile_html}</div>{verdict}{notes}</header>"
    )


LABELS_RUN = {"base": "base", "refiner": "accelerated refiner"}


def _comparison(record: LoopRecord, run: str) -> dict[str, Any]:
    comparison = record.json(f"compare_{run}", "comparison.json")
    if comparison is None:
        raise UserError(f"{record.folder}: no comparison of the {run}; run the loop again")
    return comparison


def _verdict(record: LoopRecord, run: str) -> str:
    comparison = _comparison(record, run)
    rows = []
    limits: dict[str, float] = {}
    for check in comparison["checks"]:
        if check["status"] != "not_measured" and check["low"] is not None:
            source = check["measure"].split("/")[0]
            widest = max(abs(check["low"]), abs(check["high"]), abs(check["threshold"]), 1e-9)
            limits[source] = max(limits.get(source, 0.0), widest)
    for check in comparison["checks"]:
        label = escape(measure_label(check["measure"]))
        if check["status"] == "not_measured":
            rows.append(
                f"<tr><td>{label}</td><td colspan='5' class='muted'>{escape(check['reason'])}</td>"
                "<td class='status muted'>not measured</td></tr>"
            )
            continue
        if check["low"] is None:
            rows.append(
                f"<tr><td>{label}</td><td colspan='5' class='muted'>fewer than two clips could be scored on both sides</td>"
                "<td class='status fail'>fail</td></tr>"
            )
            continue
        rule = "rises" if check["rule"] == "rises" else f"not below {check['threshold']:+.3f}"
        bar = interval_bar(
            check["low"],
            check["difference"],
            check["high"],
            limit=limits[check["measure"].split("/")[0]] * 1.08,
            threshold=check["threshold"],
            status=check["status"],
        )
        rows.append(
            f"<tr><td>{label}</td><td class='n'>{check['before']:.3f}</td><td class='n'>{check['after']:.3f}</td>"
            f"<td class='n'>{check['difference']:+.3f}<br><small class='muted'>{check['low']:+.3f} to {check['high']:+.3f}</small></td>"
            f"<td>{bar}</td><td>{rule}</td><td class='status {check['status']}'>{check['status']}</td></tr>"
        )
    checked = {check["measure"] for check in comparison["checks"]}
    others = [
        f"<tr><td>{escape(measure_label(name))}</td><td class='n'>{_fixed(m['before'])}</td><td class='n'>{_fixed(m['after'])}</td>"
        f"<td class='n'>{_signed(m['difference'])}</td><td class='n muted'>{_signed(m['low'])} to {_signed(m['high'])}</td></tr>"
        for name, m in comparison["measures"].items()
        if name not in checked
    ]
    return (
        f"<section id='{run}'><h2>Did the {LABELS_RUN[run]} get better?</h2><p>Before and after RLHF on {_count(comparison['num_prompts'], 'prompt')} "
        f"that nothing was trained or selected on, {comparison['seeds_per_prompt']} clips each from the same noise. The interval is "
        f"a paired bootstrap over {comparison['unit']}s ({comparison['resamples']} resamples, {comparison['confidence']:.0%}). Rewards are in units of "
        "their frozen spread over judged clips; gold lies between 0 and 1. Checks and margins were fixed beforehand.</p>"
        "<table><thead><tr><th>Measure</th><th class='n'>before</th><th class='n'>after</th><th class='n'>difference</th><th></th>"
        f"<th>must</th><th>verdict</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
        f"<details><summary>All other measures</summary><table><tbody>{''.join(others)}</tbody></table></details></section>"
    )


def _curves(record: LoopRecord, run: str) -> str:
    from reelhf.run import read_metrics

    folder = record.path(f"rlhf_{run}")
    assert folder is not None
    rows = read_metrics(folder)
    gold_rows = record.json(f"gold_{run}", "gold_curve.json") or []
    kept = kept_step(rows)
    charts, key = [], []
    for name in curve_names(rows, "reward"):
        series = reward_series(rows, name)
        key = max(key, series, key=len)
        charts.append(line_chart(series, title=label_of(name), mark_x=kept))
    gold = [
        line_chart([gold_series(gold_rows, name)], title=label_of(name), mark_x=kept)
        for name in curve_names(gold_rows, "gold")
    ]
    gold_html = (
        f"<h3>Gold, measured after training</h3><p>What the renderer's ground truth says of the validation clips that the run "
        f"saved. Training and the choice of the kept step never see it.</p><div class='charts'>{''.join(gold)}</div>"
        if gold
        else "<p class='note'>No gold curve: real clips have no ground truth.</p>"
    )
    return (
        f"<section class='sub'><h2>Curves of the {LABELS_RUN[run]}</h2><p>Training follows the gradient of the reward; the held-out reward comes from "
        "other annotators, other prompts and another seed and is never differentiated. The vertical line is the step that was kept, "
        f"chosen on validation prompts by the rewards alone.</p>{legend(key)}<div class='charts'>{''.join(charts)}</div>{gold_html}</section>"
    )


def curve_names(rows: Sequence[Mapping[str, Any]], source: str) -> list[str]:
    """Dimension names with a curve `source`/<name>, in first-seen order, the composite last."""
    names = {
        key.partition("/")[2]: None
        for row in rows
        for key in row
        if key.partition("/")[0] == source
    }
    return sorted(names, key=lambda name: name in ("total", "composite"))


def reward_series(rows: Sequence[Mapping[str, Any]], name: str) -> list[Series]:
    """Curves of one dimension in bounded z units: training batch (faint), validation, and the held-out judge there."""

    def column(prefix: str) -> list[tuple[float, float]]:
        key = (
            f"{prefix}/{name}" if name == "total" else f"{prefix}_z/{name}".removeprefix("reward_")
        )
        return [(row["step"], row[key]) for row in rows if row.get(key) is not None]

    series = [
        Series("reward, training batch", column("reward"), 0, faint=True),
        Series("reward, validation prompts", column("validation"), 0),
        Series("held-out reward, validation prompts", column("held_out"), 1, dashed=True),
    ]
    return [one for one in series if one.points]


def gold_series(rows: Sequence[Mapping[str, Any]], name: str) -> Series:
    return Series(
        "gold",
        [(row["step"], row[f"gold/{name}"]) for row in rows if row.get(f"gold/{name}") is not None],
        2,
    )


def kept_step(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The step whose weights the run kept: the last `best/step` in its metrics, or None."""
    kept = [int(row["best/step"]) for row in rows if row.get("best/step") is not None]
    return kept[-1] if kept else None


def _clips(record: LoopRecord, run: str) -> str:
    comparison = _comparison(record, run)
    folder = record.path(f"compare_{run}")
    assert folder is not None
    cards = []
    for pair in comparison["pairs"]:
        sides = []
        for side in ("before", "after"):
            path = folder / pair["clips"][side][0]
            sides.append(f"<figure>{embed_clip(path)}<figcaption>{side}</figcaption></figure>")
        main = "gold/composite" if comparison["has_gold"] else "held_out/total"
        before, after = pair["measures"][main]
        score = f"{measure_label(main)} {_fixed(before, 2)} → {_fixed(after, 2)}"
        cards.append(
            f"<div class='pair'><div class='two'>{''.join(sides)}</div><p class='prompt'>{escape(pair['prompt'])}</p>"
            f"<p class='muted'>{escape(score)}, noise seed {pair['seed']}</p></div>"
        )
    return (
        f"<section class='clips sub'><h2>Before and after: the {LABELS_RUN[run]}</h2><p>Same prompt, same noise. The prompts are evenly spread over the "
        "test set, not chosen. All clips play in step; pause and drag to look at single frames.</p>"
        "<div class='player'><button type='button' class='play'>Pause</button>"
        "<input type='range' min='0' max='1000' value='0' aria-label='position'><span class='muted frame'></span></div>"
        f"<div class='pairs'>{''.join(cards)}</div></section>"
    )


def embed_clip(path: Path) -> str:
    """A clip inside the page: the video itself, and its frames side by side for paper and for readers without video."""
    from reelhf.video import probe_video

    info = probe_video(path)
    video = base64.b64encode(path.read_bytes()).decode()
    return (
        f"<video muted playsinline preload='auto' data-fps='{info.fps:g}' data-frames='{info.frames}' "
        f"width='{info.width}' height='{info.height}' src='data:video/mp4;base64,{video}'></video>"
        f"<img class='strip' alt='all frames from left to right' src='data:image/jpeg;base64,{_filmstrip(path)}'>"
    )


def _filmstrip(path: Path, max_frames: int = 9) -> str:
    """Base64 JPEG of up to `max_frames` frames side by side."""
    from PIL import Image

    from reelhf.video import read_video

    frames, _ = read_video(path)  # uint8 [3, F, H, W]
    step = max(1, math.ceil(frames.shape[1] / max_frames))
    row = frames[:, ::step].permute(2, 1, 3, 0).flatten(1, 2)  # [H, F * W, 3]
    image = Image.fromarray(row.numpy())
    image.thumbnail((10_000, _STRIP_HEIGHT))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def _reward_row(dimension: str, found: Mapping[str, Any]) -> str:
    cells = [
        _fixed(found.get(name), 3) for name in ("chance", "stage_identity", "sharpness", "ceiling")
    ]
    said = _accuracy(found.get("explicit_accuracy"), f"{found.get('explicit_n', 0)} pairs")
    every = _accuracy(found["accuracy"], f"{found['n']} pairs, {_range(found['interval'])}")
    plain = "".join(f"<td class='n'>{cell}</td>" for cell in cells)
    return f"<tr><td>{escape(label_of(dimension))}</td>{said}{every}{plain}</tr>"


def _accuracy(value: float | None, of_what: str) -> str:
    """A cell: the accuracy, whether it reaches the target, and of which pairs."""
    if value is None:
        return "<td class='n'>–</td>"
    verdict = "pass" if value >= REWARD_TARGET else "fail"
    return (
        f"<td class='n'><b>{_fixed(value, 3)}</b> <span class='status {verdict}'>{verdict}</span>"
        f"<br><small class='muted'>{of_what}</small></td>"
    )


def _rewards(record: LoopRecord) -> str:
    parts = []
    for name, title in (
        ("rewards_evaluation", "Rewards that RLHF maximises"),
        ("held_out_evaluation", "Held-out rewards that only watch"),
    ):
        evaluation = record.json(name, "evaluation.json")
        if evaluation is None:
            continue
        rows = "".join(_reward_row(*item) for item in evaluation["dimensions"].items())
        slots = "; ".join(
            f"best clip by slot {', '.join(map(str, s['counts']))}: chi-square p = {s['p']:.3f}"
            for s in evaluation.get("slots", {}).values()
        )
        parts.append(
            f"<h3>{title}</h3><table><thead><tr><th>Dimension</th><th class='n'>best against worst, at least {REWARD_TARGET:.2f}</th>"
            f"<th class='n'>all pairs, at least {REWARD_TARGET:.2f}</th><th class='n'>chance</th><th class='n'>stage alone</th>"
            f"<th class='n'>sharpness alone</th><th class='n'>ceiling</th></tr></thead><tbody>{rows}</tbody></table>"
            f"<p class='muted'>{escape(slots)}</p>"
        )
    if not parts:
        return ""
    return (
        "<section id='rewards'><h2>Can the rewards be believed?</h2><p>How often a reward agrees with an annotator about two clips of the "
        "same stage, on prompts and by annotators that it never learned from. The ceiling is how often the ground truth itself "
        "agrees with those annotators, who are noisy on purpose. A reward near its baselines has learned nothing that they do "
        "not know. Best against worst is what an annotator said and what is exported by default; all pairs add what follows "
        f"for the clips between, and so do the baselines and the ceiling.</p>{''.join(parts)}</section>"
    )


REWARD_TARGET = 0.70
"""Accuracy on same-stage pairs of unseen prompts that a reward should reach."""


def _annotation(record: LoopRecord) -> str:
    a = record.data["annotation"]
    facts = "".join(
        f"<tr><td>{escape(label)}</td><td class='n'>{escape(str(value))}</td></tr>"
        for label, value in a["facts"]
    )
    return f"<section id='annotators'><h2>What the annotators said</h2><p>{escape(a['summary'])}</p><table class='narrow'><tbody>{facts}</tbody></table></section>"


def _generator(record: LoopRecord) -> str:
    rows = "".join(
        f"<tr><td>{escape(label)}</td><td class='n'>{escape(value)}</td><td class='muted'>{escape(meaning)}</td></tr>"
        for label, value, meaning in record.data["generator_facts"]
    )
    return (
        f"<section id='generator'><h2>The generator underneath</h2><table><tbody>{rows}</tbody></table></section>"
        if rows
        else ""
    )


def _stages(record: LoopRecord) -> str:
    stages = record.data["stages"]
    longest = max(
        [stage["seconds"] for stage in stages] + [stage["budget"] or 0 for stage in stages] + [1]
    )
    rows = []
    for stage in stages:
        budget = stage["budget"]
        over = budget is not None and stage["seconds"] > budget
        width = stage["seconds"] / longest * 100
        mark = "" if budget is None else f"<i style='left:{budget / longest * 100:.1f}%'></i>"
        remark = "from cache" if stage["cached"] else ""
        beside = stage.get("beside_seconds", 0.0)
        remark += f", {beside:.0f} s of it beside other stages" if beside else ""
        remark += f", resumed ({stage['attempts']} attempts)" if stage["attempts"] > 1 else ""
        rows.append(
            f"<tr><td>{escape(stage['name'])}</td><td class='n {'fail' if over else ''}'>{stage['seconds']:.1f}</td>"
            f"<td class='n muted'>{'' if budget is None else f'{budget:.0f}'}</td>"
            f"<td class='gauge'><span><b style='width:{width:.1f}%'></b>{mark}</span></td>"
            f"<td class='n'>{stage['peak_bytes'] / 1e9:.1f}</td><td class='muted'>{escape(remark.strip(', '))}</td></tr>"
        )
    total, budget_total = _total_seconds(stages), record.data["total_budget_seconds"]
    return (
        "<section id='time'><h2>Where the time went</h2><table><thead><tr><th>Stage</th><th class='n'>seconds</th><th class='n'>budget</th><th></th>"
        f"<th class='n'>peak GB</th><th></th></tr></thead><tbody>{''.join(rows)}</tbody><tfoot><tr><td>All stages</td>"
        f"<td class='n {'fail' if total > budget_total else ''}'>{total:.0f}</td><td class='n'>{budget_total:.0f}</td><td></td><td></td><td></td></tr></tfoot></table></section>"
    )


def _total_seconds(stages: Sequence[Mapping[str, Any]]) -> float:
    """Of all stages; seconds that two of them worked side by side count once."""
    return sum(stage["seconds"] - stage.get("beside_seconds", 0.0) for stage in stages)


def _method(record: LoopRecord) -> str:
    data = record.data
    return (
        f"<section><h2>Make it again</h2><pre>{escape(data['command'])}</pre>"
        f"<details><summary>The resolved config</summary><pre>{escape(data['config'])}</pre></details></section>"
    )


# --- words and numbers -----------------------------------------------------------------------------------------------


def label_of(name: str) -> str:
    """A dimension in words."""
    return LABELS.get(name, name.replace("_", " ").capitalize())


def measure_label(name: str) -> str:
    """A measure such as "gold/composite" in words."""
    source, _, dimension = name.partition("/")
    return f"{label_of(dimension)} ({SOURCES.get(source, source)})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _fixed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _range(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _signed(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:+.3f}"


def _clock(seconds: float) -> str:
    return (
        f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
        if seconds >= 60
        else f"{seconds:.0f} s"
    )


# --- the page's own pictures and script ------------------------------------------------------------------------------

_NAVIGATION = (
    "<nav><a href='#base'>Base</a><a href='#refiner'>Accelerated refiner</a><a href='#rewards'>Rewards</a>"
    "<a href='#annotators'>Annotators</a><a href='#generator'>Generator</a><a href='#time'>Time</a></nav>"
)

_LOOP_PICTURE = """
<svg class="loop" viewBox="0 0 640 92" role="img" aria-label="generate, judge, learn rewards, maximise them, compare, and round again">
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>
<g class="box"><rect x="4" y="14" width="104" height="40" rx="7"/><text x="56" y="39">generate</text>
<rect x="136" y="14" width="104" height="40" rx="7"/><text x="188" y="39">judge</text>
<rect x="268" y="14" width="104" height="40" rx="7"/><text x="320" y="39">learn rewards</text>
<rect x="400" y="14" width="104" height="40" rx="7"/><text x="452" y="39">maximise</text>
<rect x="532" y="14" width="104" height="40" rx="7"/><text x="584" y="39">compare</text></g>
<g class="arrow"><path d="M110 34H133"/><path d="M242 34H265"/><path d="M374 34H397"/><path d="M506 34H529"/>
<path d="M584 56V76H56V58"/></g></svg>"""

# Every clip of a section is paused and sought to the same frame index: in step to the frame, whatever the browser's decoder does.
_SCRIPT = """
for (const section of document.querySelectorAll('.clips')) {
  const videos = [...section.querySelectorAll('video')], button = section.querySelector('.play');
  const slider = section.querySelector('input'), label = section.querySelector('.frame');
  if (!videos.length) continue;
  const fps = +videos[0].dataset.fps, frames = Math.max(...videos.map(v => +v.dataset.frames));
  let playing = !matchMedia('(prefers-reduced-motion: reduce)').matches, visible = false, frame = 0, last = 0;
  const show = () => {
    for (const v of videos) v.currentTime = (Math.min(frame, +v.dataset.frames - 1) + 0.5) / +v.dataset.fps;
    slider.value = frames > 1 ? 1000 * frame / (frames - 1) : 0;
    label.textContent = `frame ${frame + 1} of ${frames}`;
  };
  const set = on => { playing = on; button.textContent = on ? 'Pause' : 'Play'; };
  button.onclick = () => set(!playing);
  slider.oninput = () => { set(false); frame = Math.round(slider.value / 1000 * (frames - 1)); show(); };
  new IntersectionObserver(e => { visible = e.at(-1).isIntersecting; }).observe(section);
  const tick = now => {
    const pause = frame === frames - 1 ? 600 : 1000 / fps;
    if (playing && visible && now - last >= pause) { last = now; frame = (frame + 1) % frames; show(); }
    requestAnimationFrame(tick);
  };
  set(playing); show(); requestAnimationFrame(tick);
}
"""

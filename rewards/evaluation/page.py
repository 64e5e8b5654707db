"""One self-contained page about an evaluation; it computes nothing of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from reelhf.charts import Series, interval_bar, legend, line_chart
from reelhf.errors import UserError
from reelhf.page import html_page
from rewards.evaluation.held_out import EVALUATION
from rewards.evaluation.probes import SEVERITIES

PAGE = "report.html"
PROBE_TARGET = 0.9
"""Share of clips whose score each corruption of a dimension should lower."""
ROUNDING = 1e-6  # intervals are float32


def write_page(folder: Path) -> Path:
    """Write folder/report.html from folder/evaluation.json; returns its path."""
    from reelhf.run import write_text_atomic

    path = Path(folder) / EVALUATION
    if not path.is_file():
        raise UserError(f"{folder} holds no {EVALUATION}; `reelhf rewards eval` writes it")
    result = json.loads(path.read_text(encoding="utf-8"))
    out = Path(folder) / PAGE
    write_text_atomic(out, render(result))
    return out


def render(result: Mapping[str, Any]) -> str:
    """The whole page as HTML text."""
    rows: Mapping[str, Any] = result["dimensions"]
    details = {name: row["details"] for name, row in rows.items() if "details" in row}
    sections = [_header(result), _headline(rows)]
    if details:
        sections += [
            _ties(details),
            _calibration(details),
            _disagreement(details),
            _people(details),
            _sources(details),
            _probes(details),
        ]
    sections.append(_slots(result["slots"]))
    return html_page("ReelHF: rewards evaluated", [section for section in sections if section])


def words(dimension: str) -> str:
    """A dimension as a reader says it."""
    return dimension.replace("_", " ").capitalize()


def strongest_baseline(row: Mapping[str, Any]) -> tuple[str, float]:
    """Name and accuracy of the best score on same-stage pairs that knows nothing of quality."""
    found = {name: row[name] for name in ("chance", "sharpness", "stage_identity")}
    name = max(found, key=lambda key: -1.0 if found[key] is None else found[key])
    return name.replace("_", " "), found[name]


def not_better(row: Mapping[str, Any]) -> str | None:
    """Why the accuracy does not show that the reward beats every baseline, or None where it does."""
    if row["accuracy"] is None:
        return "no same-stage pairs to measure on"
    name, best = strongest_baseline(row)
    if row["accuracy"] <= best + ROUNDING:
        return f"{row['accuracy']:.2f} against {best:.2f} of {name}"
    if row["interval"][0] <= best + ROUNDING:
        return f"its interval reaches down to {row['interval'][0]:.2f}, {name} has {best:.2f}"
    return None


def _header(result: Mapping[str, Any]) -> str:
    rows = result["dimensions"]
    tiles = "".join(
        f"<div><b>{_share(row['accuracy'])}</b><span>{escape(words(name))}, {row['n']} pairs</span></div>"
        for name, row in rows.items()
    )
    reasons = {n: why for n, row in rows.items() if row["n"] and (why := not_better(row))}
    note = "".join(
        f"<p class='note bad'>{escape(words(name))}: not shown to be better than every baseline ({escape(why)}).</p>"
        for name, why in reasons.items()
    )
    which = "all rows" if result["split"] is None else f"split {result['split']}"
    return (
        f"<header><h1>Can these rewards be believed?</h1><p class='muted'>{result['tasks']} tasks, {escape(which)}</p>"
        f"<div class='tiles'>{tiles}</div>{note}</header>"
    )


def _headline(rows: Mapping[str, Any]) -> str:
    body = []
    for name, row in rows.items():
        best = strongest_baseline(row)[1]
        bar = ""
        if row["interval"]:
            status = "fail" if not_better(row) else "pass"
            low, high = (x - 0.5 for x in row["interval"])
            bar = interval_bar(
                low, row["accuracy"] - 0.5, high, limit=0.5, threshold=best - 0.5, status=status
            )
        cells = [row[k] for k in ("chance", "stage_identity", "sharpness", "ceiling")]
        body.append(
            f"<tr><td>{escape(words(name))}</td><td class='n'><b>{_share(row['accuracy'])}</b><br><small class='muted'>{_range(row['interval'])}</small></td>"
            f"<td>{bar}</td><td class='n'>{row['n']}</td>"
            + "".join(f"<td class='n'>{_share(cell)}</td>" for cell in cells)
            + f"<td class='n'>{_share(row['all_stages_accuracy'])}<br><small class='muted'>stage alone {_share(row['stage_identity_all_stages'])}</small></td>"
            f"<td class='n'>{row['invalid_clips']}</td></tr>"
        )
    return (
        "<section id='accuracy'><h2>Accuracy on unseen prompts</h2><p>How often a reward prefers the clip that a person preferred, of two "
        "clips of the same stage; ties left out. The interval resamples whole prompts. The bar runs from 0 to 1 around one half; the dashed mark is "
        "the strongest score that knows nothing of quality.</p><table><thead><tr><th>Dimension</th><th class='n'>accuracy</th><th></th><th class='n'>pairs</th>"
        "<th class='n'>chance</th><th class='n'>stage alone</th><th class='n'>sharpness alone</th><th class='n'>ceiling</th>"
        f"<th class='n'>all stages</th><th class='n'>invalid clips</th></tr></thead><tbody>{''.join(body)}</tbody></table></section>"
    )


def _ties(details: Mapping[str, Any]) -> str:
    body = []
    for name, found in details.items():
        t = found["ties"]
        if t is None:
            continue
        chosen = t["threshold_chosen_on"]
        body.append(
            f"<tr><td>{escape(words(name))}</td><td class='n'><b>{_share(t['accuracy'])}</b><br><small class='muted'>{_range(t['interval'])}</small></td>"
            f"<td class='n'>{_share(t['balanced_accuracy'])}</td><td class='n'>{_share(t['majority'])}</td><td class='n'>{_share(t['tie_share'])}</td>"
            f"<td class='n'>{t['threshold']:.3g}</td><td>{escape(chosen or 'nothing: no other pairs')}</td>"
            f"<td class='n muted'>{_share(t['published_convention'])}</td></tr>"
        )
    if not body:
        return ""
    return (
        "<section id='ties'><h2>With ties: three answers</h2><p>A gap smaller than the threshold is a tie. The threshold is chosen on other "
        "pairs; the last column shows what choosing it on these very pairs would print, as published tables do. Balanced: the mean over the three answers, "
        "one third for guessing. Majority: the commonest answer, always.</p><table><thead><tr><th>Dimension</th><th class='n'>accuracy</th><th class='n'>balanced</th>"
        "<th class='n'>majority</th><th class='n'>share of ties</th><th class='n'>threshold</th><th>chosen on</th><th class='n'>published convention</th></tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></section>"
    )


def _calibration(details: Mapping[str, Any]) -> str:
    charts = []
    key: list[Series] = []
    for name, found in details.items():
        bins = found["calibration"]["bins"]
        if not bins:
            continue
        points = [(b["confidence"], b["accuracy"]) for b in bins]
        key = [
            Series("share right", points, 0),
            Series("as sure as right", [(0.5, 0.5), (1.0, 1.0)], 1, faint=True, dashed=True),
        ]
        error = found["calibration"]["expected_calibration_error"]
        charts.append(
            line_chart(key, title=f"{words(name)}: error {error:.3f}", x_label="confidence")
        )
    if not charts:
        return ""
    return (
        "<section id='calibration'><h2>Is it as sure as it is right?</h2><p>Pairs sorted by the probability the calibrated reward gives its favourite, "
        "against how often people agreed. The error is the mean distance from the diagonal (expected calibration error).</p>"
        f"{legend(key)}<div class='charts'>{''.join(charts)}</div></section>"
    )


def _disagreement(details: Mapping[str, Any]) -> str:
    body = []
    for name, found in details.items():
        doubt = found.get("disagreement")  # pages of evaluations from before there was one
        if doubt is None:
            continue
        cells = "".join(
            f"<td class='n'>{_share(half['accuracy'])}<br><small class='muted'>{_range(half['interval'])}</small></td><td class='n'>{half['n']}</td>"
            for half in (doubt["agreed"], doubt["disputed"])
        )
        body.append(
            f"<tr><td>{escape(words(name))}</td><td class='n'>{doubt['mean']:.3f}</td>{cells}</tr>"
        )
    if not body:
        return ""
    return (
        "<section id='disagreement'><h2>Is it right where its parts agree?</h2><p>Rewards of several models or heads, or with a spread of their own: accuracy on the half of "
        "the pairs on which they disagree least, and on the other half. A reward whose doubt means something is righter in the first.</p><table><thead><tr><th>Dimension</th>"
        "<th class='n'>mean doubt of a pair</th><th class='n'>half that agrees</th><th class='n'>pairs</th><th class='n'>half in dispute</th><th class='n'>pairs</th></tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></section>"
    )


def _people(details: Mapping[str, Any]) -> str:
    body = []
    for name, found in details.items():
        people, rank = found["people"], found["rank_correlation"]
        cells = (
            f"<td class='n'>{_share(people['reward'])}<br><small class='muted'>{_range(people['reward_interval'])}</small></td>"
            f"<td class='n'>{_share(people['people'])}<br><small class='muted'>{_range(people['people_interval'])}</small></td><td class='n'>{people['pairs']}</td>"
            if people
            else "<td colspan='3' class='muted'>no pair was judged by two annotators</td>"
        )
        flips = found["position_flips"]
        body.append(
            f"<tr><td>{escape(words(name))}</td>{cells}<td class='n'>{_signed(rank['within_tasks'])}<br><small class='muted'>{_range(rank['within_interval'])}</small></td>"
            f"<td class='n'>{_signed(rank['all_clips'])}</td><td class='n'>{_share(flips)}</td></tr>"
        )
    return (
        "<section id='people'><h2>Beside people</h2><p>On pairs that several annotators judged: how often the reward says what one of them said, and how often two of them "
        "said the same. Rank correlation is Spearman's, of scores with how often a clip was preferred, within tasks and over all clips. Flips: the share of "
        "pairs whose winner depends on which clip is shown first.</p><table><thead><tr><th>Dimension</th><th class='n'>reward with a person</th><th class='n'>person with a person</th>"
        f"<th class='n'>pairs</th><th class='n'>rank, within tasks</th><th class='n'>rank, all clips</th><th class='n'>flips</th></tr></thead><tbody>{''.join(body)}</tbody></table></section>"
    )


def _sources(details: Mapping[str, Any]) -> str:
    body = []
    for name, found in details.items():
        for column in ("by_stage", "by_model"):
            for source, row in found[column].items():
                body.append(
                    f"<tr><td>{escape(words(name))}</td><td>{column.removeprefix('by_')}</td><td>{escape(source)}</td><td class='n'>{_share(row['accuracy'])}</td>"
                    f"<td class='n muted'>{_range(row['interval'])}</td><td class='n'>{row['n']}</td></tr>"
                )
    if not body:
        return ""
    return (
        "<section id='sources'><h2>By who made the clips</h2><p>Accuracy on the pairs in which a stage's or a model's clips take part.</p><table><thead><tr><th>Dimension</th><th></th><th>source</th>"
        f"<th class='n'>accuracy</th><th class='n'>95 % interval</th><th class='n'>pairs</th></tr></thead><tbody>{''.join(body)}</tbody></table></section>"
    )


def _probes(details: Mapping[str, Any]) -> str:
    charts, body = [], []
    for name, found in details.items():
        series = []
        for number, (corruption, row) in enumerate(found["probes"].items()):
            badge = "" if row["lowered"] is None else _badge(row["lowered"] >= PROBE_TARGET)
            body.append(
                f"<tr><td>{escape(words(name))}</td><td>{escape(corruption)}</td><td class='n'>{_share(row['lowered'])} {badge}</td>"
                f"<td class='n'>{_share(row['monotone'])}</td><td class='n'>{_signed(row['rank'])}</td><td class='n'>{row['clips']}</td></tr>"
            )
            if row["drop"]:
                fall = [(s, -d) for s, d in zip(SEVERITIES, row["drop"], strict=True)]
                series.append(Series(corruption, fall, number % 4, dashed=number >= 4))
        if series:
            chart = line_chart(series, title=words(name), x_label="severity")
            charts.append(f"<div>{chart}{legend(series)}</div>")
    if not body:
        return ""
    return (
        "<section id='probes'><h2>Does spoiling a clip cost it?</h2><p>The same clips, spoiled in named ways and more and more: change of the score in units of its "
        f"spread. Lowered: the share of the clips it changes that score less at the highest severity than clean; at least {PROBE_TARGET:.0%} should. Monotone: no step up in severity raises "
        f"the score.</p><div class='charts'>{''.join(charts)}</div><table><thead><tr><th>Dimension</th><th>corruption</th><th class='n'>lowered</th><th class='n'>monotone</th>"
        f"<th class='n'>rank with severity</th><th class='n'>clips</th></tr></thead><tbody>{''.join(body)}</tbody></table></section>"
    )


def _badge(passed: bool) -> str:
    status = "pass" if passed else "fail"
    return f"<span class='status {status}'>{status}</span>"


def _slots(slots: Mapping[str, Any]) -> str:
    if not slots:
        return ""
    body = "".join(
        f"<tr><td>{k} clips</td><td>{', '.join(map(str, row['counts']))}</td><td class='n'>{row['p']:.3f}</td></tr>"
        for k, row in slots.items()
    )
    return (
        "<section id='slots'><h2>Position bias of the annotators</h2><p>How often the best clip was found in each place of the page; a small p says that the place "
        f"mattered.</p><table class='narrow'><thead><tr><th>Task</th><th>best, by place</th><th class='n'>chi-square p</th></tr></thead><tbody>{body}</tbody></table></section>"
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _range(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"

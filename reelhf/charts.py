"""Line charts and interval plots as plain SVG text: no library in the page, colours from the page's CSS variables.

They follow the reader's light or dark theme, scale without blur and print.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

SERIES_COLOURS = 4
"""How many colour classes the page's style sheet defines: .s0 to .s3."""


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]
    """(x, y) in x order; points that are not finite are left out."""
    colour: int = 0
    """Index of the style sheet's colour class."""
    faint: bool = False
    """Drawn thin, without markers, behind the others: noisy per-step values."""
    dashed: bool = False


def ticks(low: float, high: float, target: int = 4) -> list[float]:
    """About `target` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "step",
    mark_x: float | None = None,
    mark_label: str = "kept",
    width: int = 300,
    height: int = 190,
) -> str:
    """One chart as an `<svg>` string, or a short note where there is nothing to draw."""
    drawn = [
        Series(
            s.label, [(x, y) for x, y in s.points if math.isfinite(y)], s.colour, s.faint, s.dashed
        )
        for s in series
    ]
    points = [p for s in drawn for p in s.points]
    if not points:
        return f'<p class="muted">{escape(title)}: no values</p>'
    left, right, top, bottom = 44, 10, 26, 30
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    pad = max((max(ys) - min(ys)) * 0.08, 1e-3 * max(1.0, abs(max(ys))))
    y_low, y_high = min(ys) - pad, max(ys) + pad

    def at_x(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def at_y(y: float) -> float:
        return height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom)

    parts = [f'<text class="title" x="{left}" y="15">{escape(title)}</text>']
    for y in ticks(y_low, y_high):
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{left - 5}" y="{at_y(y) + 3:.1f}" text-anchor="end">{_number(y)}</text>'
        )
    for x in ticks(x_low, x_high):
        parts.append(
            f'<text class="tick" x="{at_x(x):.1f}" y="{height - bottom + 13}" text-anchor="middle">{_number(x)}</text>'
        )
    parts.append(
        f'<text class="tick" x="{width - right}" y="{height - 3}" text-anchor="end">{escape(x_label)}</text>'
    )
    if mark_x is not None and x_low <= mark_x <= x_high:
        x = at_x(mark_x)
        anchor = "end" if x > width * 0.75 else "start"
        parts.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>'
        )
        shift = -4 if anchor == "end" else 4
        parts.append(
            f'<text class="tick" x="{x + shift:.1f}" y="{height - bottom - 4}" text-anchor="{anchor}">'
            f"{escape(mark_label)}</text>"
        )
    for s in sorted(drawn, key=lambda s: not s.faint):
        if not s.points:
            continue
        line = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in s.points)
        style = f"line s{s.colour % SERIES_COLOURS}{' faint' if s.faint else ''}{' dashed' if s.dashed else ''}"
        parts.append(
            f'<polyline class="{style}" points="{line}"><title>{escape(s.label)}</title></polyline>'
        )
        if not s.faint:
            parts += [
                f'<circle class="dot s{s.colour % SERIES_COLOURS}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="2.4">'
                f"<title>{escape(s.label)}, {escape(x_label)} {_number(x)}: {y:.4g}</title></circle>"
                for x, y in s.points
            ]
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def legend(series: Sequence[Series]) -> str:
    """The labels of the series with a sample of each line."""
    items = []
    for s in series:
        style = f"line s{s.colour % SERIES_COLOURS}{' faint' if s.faint else ''}{' dashed' if s.dashed else ''}"
        items.append(
            f'<span><svg class="key" viewBox="0 0 26 8"><line class="{style}" x1="1" x2="25" y1="4" y2="4"/></svg>'
            f"{escape(s.label)}</span>"
        )
    return f'<div class="legend">{"".join(items)}</div>'


def interval_bar(
    low: float, mean: float, high: float, *, limit: float, threshold: float = 0.0, status: str = ""
) -> str:
    """A small horizontal interval around zero, with the threshold it has to clear, on a scale of [-limit, limit]."""
    width, height = 150, 18

    def at(value: float) -> float:
        return (
            width / 2 + max(-1.0, min(1.0, value / limit)) * (width / 2 - 4)
            if limit > 0
            else width / 2
        )

    return (
        f'<svg class="interval" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{mean:+.3f}, interval {low:+.3f} to {high:+.3f}">'
        f'<line class="grid" x1="{width / 2}" x2="{width / 2}" y1="1" y2="{height - 1}"/>'
        f'<line class="mark" x1="{at(threshold):.1f}" x2="{at(threshold):.1f}" y1="2" y2="{height - 2}"/>'
        f'<line class="bar {status}" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="{height / 2}" y2="{height / 2}"/>'
        f'<circle class="barDot {status}" cx="{at(mean):.1f}" cy="{height / 2}" r="3.4"/></svg>'
    )


def _number(value: float) -> str:
    return f"{value:.6g}" if abs(value) < 1e5 else f"{value:.2g}"

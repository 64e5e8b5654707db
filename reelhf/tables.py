"""Plain text tables: columns as wide as they need, numbers to the right."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of aligned columns two spaces apart; a column of numbers, sizes or percents is set to the right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(_width(row[column]) for row in cells) for column in range(len(header))]
    right = [
        all(_is_number(row[column]) for row in rows) and any(row[column] for row in rows)
        for column in range(len(header))
    ]

    def line(row: Sequence[str]) -> str:
        padded = []
        for text, width, to_right in zip(row, widths, right, strict=True):
            space = " " * (width - _width(text))
            padded.append(space + text if to_right else text + space)
        return "  ".join(padded).rstrip()

    return "\n".join([line(cells[0]), *(line(row) for row in cells[1:])])


def _is_number(text: str) -> bool:
    return not text or text.rstrip("%").replace(".", "", 1).replace("-", "", 1).isdigit()


def _width(text: str) -> int:
    """Columns on a terminal: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)

"""Progress: every item passes through, and the words are right."""

from __future__ import annotations

import io

import pytest

from reelhf.progress import format_seconds, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_items_pass_through_and_the_end_is_said(capsys):
    assert list(track([3, 1, 2], label="work")) == [3, 1, 2]
    assert capsys.readouterr().err == "work: 3/3, done in 0 s\n"


def test_a_generator_without_length_is_counted(capsys):
    assert sum(track((n for n in range(4)), label="work")) == 6
    assert "work: 4, done" in capsys.readouterr().err


def test_plain_lines_come_now_and_then_with_the_time_left(capsys, monkeypatch):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr("reelhf.progress.time.monotonic", lambda: float(next(clock)))
    list(track(range(4), label="work"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "work: 2/4, 12 s left"
    assert len(lines) == 3


def test_a_terminal_gets_a_bar_redrawn_in_place(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    clock = iter(range(1000))
    monkeypatch.setattr("reelhf.progress.time.monotonic", lambda: float(next(clock)))
    list(track(range(2), label="work"))
    assert screen.getvalue().count("\r") == 3
    assert "[############............] 1/2, 1 s left" in screen.getvalue()
    assert screen.getvalue().endswith("\n")


def test_other_ranks_are_silent(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert list(track(range(3), label="work")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.6, "8 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_seconds_read_like_a_person_says_them(seconds, text):
    assert format_seconds(seconds) == text

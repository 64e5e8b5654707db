"""Why a request changes nothing."""

from __future__ import annotations


class NotFound(Exception):
    """No such thing, or not yours: the two are not told apart."""


class Conflict(Exception):
    """It was already answered otherwise."""


class Refused(Exception):
    """The answer cannot be stored; `problems` says why, one sentence each."""

    def __init__(self, problems: list[str]):
        super().__init__("; ".join(problems))
        self.problems = problems

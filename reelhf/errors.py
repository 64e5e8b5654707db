"""What a user did wrong, said in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The command line prints it as one line, `error: ...`, and exits with code 2.

    The message says what came, what was expected, and what to do.
    """


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the choice closest to `name`, or the empty string when none is close."""
    close = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1)
    return f" Did you mean '{close[0]}'?" if close else ""

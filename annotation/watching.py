"""Whether the clips of a task were watched: what the browser counted, held against the clock of the server."""

from __future__ import annotations

from collections.abc import Sequence

from annotation.records import LETTERS

FASTEST = 2.0
"""The highest playback rate that `static/player.js` offers."""
SLACK_SECONDS = 0.15
"""The page counts tenths of a second, and browsers differ by a frame on how long a clip is."""


def unwatched(
    watched: Sequence[float | None],
    *,
    num_clips: int,
    clip_seconds: float,
    fraction: float,
    elapsed_seconds: float,
) -> list[str]:
    """What speaks against an answer by someone who was to watch a fraction of every clip; nothing if it may count.

    Args:
        watched: seconds played of each clip in the order shown; None of one that does not play in that browser.
        clip_seconds: the length of the clips, which is the same for all of a task.
        elapsed_seconds: since the task was shown. Clips play side by side, so they need no longer than the longest.
    """
    need = max(0.0, fraction * clip_seconds - SLACK_SECONDS)
    if len(watched) != num_clips:
        return [f"watched_seconds needs one number per clip ({num_clips}), got {len(watched)}"]
    if all(seconds is None for seconds in watched):
        return ["no clip played: flag the task as broken"]
    problems = [
        f"clip {letter} was watched for {seconds:.1f} of {clip_seconds:.1f} s; {fraction:.0%} are asked for"
        for letter, seconds in zip(LETTERS, watched, strict=False)
        if seconds is not None and seconds < need
    ]
    if elapsed_seconds * FASTEST < need:
        problems.append(
            f"the answer came {elapsed_seconds:.1f} s after the task was shown, before its clips could play"
        )
    return problems

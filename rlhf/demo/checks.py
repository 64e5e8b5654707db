"""What can be wrong with the machine or the clips, found before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

from reelhf.errors import UserError
from rlhf.demo.options import DemoOptions

NEEDED_DISK_BYTES = 3_000_000_000
"""The cache of a standard run with its checkpoints; measured at 1 GB."""


def check_first(options: DemoOptions) -> None:
    """Raises UserError, in one line, for whatever would stop the demo later."""
    check_writable(options.out)
    check_disk(options.out)
    if options.serve:
        check_port(options.port)
        check_port(options.port + 1)
    if options.clips is not None:
        check_clips(options.clips)


def check_writable(folder: Path) -> None:
    """Raises UserError unless files can be made in `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; choose another folder with --out"
        ) from error


def check_disk(folder: Path) -> None:
    """Raises UserError if too little space is left where the results or the cache go."""
    from reelhf.clips import cache_folder

    for place in (folder, _existing_parent(cache_folder())):
        free = shutil.disk_usage(place).free
        if free < NEEDED_DISK_BYTES:
            raise UserError(
                f"{free / 1e9:.1f} GB free at {place}; the demo needs {NEEDED_DISK_BYTES / 1e9:.0f} GB. "
                "Free some, or set REELHF_CACHE and --out to a larger disk"
            )


def check_port(port: int) -> None:
    """Raises UserError if nobody can listen on the port of this machine."""
    from annotation.api.server import bind

    bind("127.0.0.1", port).close()


def check_clips(folder: Path) -> None:
    """Raises UserError naming a caption without a video, or a video that cannot be read."""
    from reelhf.clips import load_clip_folder
    from reelhf.video import probe_video

    for path in sorted({entry.path for entry in load_clip_folder(folder)}):
        probe_video(path)


def _existing_parent(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())

"""The scratch PostgreSQL server itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import time
from tests.postgres_cluster import Cluster
cluster = Cluster()
print(cluster.folder, cluster.pid(), flush=True)
time.sleep(600)
"""


def running(pid: int) -> bool:
    """A process that nobody has waited for yet still has a folder, without a command line."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.postgres
def test_the_server_and_its_folder_go_with_a_test_run_that_is_killed():
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as owner:
        folder, pid = owner.stdout.readline().split()
        assert running(int(pid))
        os.killpg(owner.pid, signal.SIGKILL)  # as a timeout kills: the whole group, at once
    deadline = time.monotonic() + 60
    while running(int(pid)) or Path(folder).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)

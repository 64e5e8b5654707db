"""A scratch PostgreSQL cluster for the tests: its own folder, a Unix socket, no network, no fsync."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from uuid import uuid4

from annotation.database import postgres_program

USER = "postgres"


def postgres_missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    import importlib.util

    if postgres_program("initdb") is None:
        return "no PostgreSQL server on this machine"
    if importlib.util.find_spec("psycopg") is None:
        return "psycopg is not installed"
    if os.getuid() == 0 and shutil.which("su") is None:
        return "PostgreSQL does not run as root, and there is no su"
    return None


GUARDIAN = """
trap '' INT TERM HUP
read -r _  # ends when whoever holds the other end is gone, however they went
pid=$(head -n 1 data/postmaster.pid 2>/dev/null)
if [ -n "$pid" ] && kill -QUIT "$pid" 2>/dev/null; then
    while kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
fi
rm -rf "$PWD"
"""
"""Stops the server as a crash would and removes its folder, once its standard input is closed."""


class Cluster:
    """A running server; `stop` ends it and removes its folder, and so does the death of this process, also by `kill -9`.

    Args:
        initdb: further options of the program that makes it.
        durable: commits reach the disk, as they must where time is measured; tests have no use for that.
    """

    def __init__(self, *initdb: str, durable: bool = False) -> None:
        self._fsync = "on" if durable else "off"
        self.folder = Path(tempfile.mkdtemp(prefix="reelhf-pg-"))
        self._guardian = subprocess.Popen(
            ["sh", "-c", GUARDIAN], cwd=self.folder, stdin=subprocess.PIPE, start_new_session=True
        )
        if os.getuid() == 0:
            shutil.chown(self.folder, USER)
        usual = ("-D", "data", "-U", USER, "--auth=trust", "--no-sync", "--locale=C.UTF-8")
        self._run("initdb", *usual, *initdb)
        self.start()

    def start(self) -> None:
        options = (
            f"-c listen_addresses= -c unix_socket_directories={self.folder} -c fsync={self._fsync}"
        )
        self._run("pg_ctl", "-D", "data", "-w", "-l", "log", "-o", f"'{options}'", "start")

    def kill(self) -> None:
        """Stops the server as a crash would; `start` brings it back with what was committed."""
        self._run("pg_ctl", "-D", "data", "-w", "-m", "immediate", "stop")

    def stop(self) -> None:
        assert self._guardian.stdin is not None
        self._guardian.stdin.close()
        self._guardian.wait()

    def pid(self) -> int | None:
        """The server's process; None if it does not run."""
        try:
            pid = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
            os.kill(pid, 0)
        except (FileNotFoundError, ProcessLookupError):
            return None
        return pid

    def url(self, database: str = USER) -> str:
        return f"postgresql://{USER}@/{database}?host={self.folder}"

    def new_database(self, template: str = "template1", *, tablespace: str = "pg_default") -> str:
        """Makes a database that is a copy of `template`, and returns its URL."""
        import psycopg

        name = f"t{uuid4().hex[:12]}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(
                f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY TABLESPACE {tablespace}"
            )
        return self.url(name)

    def drop_database(self, url: str) -> None:
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(
                f"DROP DATABASE {url.partition('@/')[2].partition('?')[0]} WITH (FORCE)"
            )

    def _run(self, program: str, *arguments: str) -> None:
        command = " ".join([str(postgres_program(program)), *arguments])
        line = (
            ["su", USER, "-s", "/bin/sh", "-c", command]
            if os.getuid() == 0
            else ["sh", "-c", command]
        )
        done = subprocess.run(
            line, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            log = self.folder / "log"
            said = log.read_text()[-2000:] if log.exists() else ""
            raise RuntimeError(f"{program} failed: {done.stderr}{said}")

"""The two databases a project can live in, SQLite and PostgreSQL: engines, transactions, migrations, copies.

SQLite: WAL with synchronous=FULL and every write in a BEGIN IMMEDIATE transaction. PostgreSQL: READ COMMITTED writes that lock the
rows they decide on. On both, reads have an engine of their own that cannot write, so a dashboard never holds a write lock.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.pool import NullPool

from reelhf.errors import UserError

if TYPE_CHECKING:
    from alembic.config import Config as AlembicConfig

BUSY_SECONDS = 30.0
STUCK_SECONDS = 0.2
"""A write's patience once another was turned away for all of its own: one goes on trying, the rest must not hold every thread."""
CONNECT_SECONDS = 5
MIGRATION_LOCK = 0x7265656C  # PostgreSQL's advisory locks are numbers
POSTGRES_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
SQLITE_POOL = {"pool_size": 8, "max_overflow": 16}
BELIEVED_SECONDS = 1.0
"""A connection to PostgreSQL that was used in the last second is taken to be alive."""
POSTGRES_POOL = {"pool_size": 8, "max_overflow": 0}
"""Twice per process; a server allows 100 in all. None beyond the pool: opening one costs as much as twenty claims, just when many come."""


DIALECTS: dict[str, Any] = {"sqlite": sqlite, "postgresql": postgresql}
"""Whose `insert` knows `on_conflict_do_update`, by `connection.dialect.name`."""


class Busy(Exception):
    """The write lock was not free in time; nothing was stored."""


@dataclass(frozen=True)
class Database:
    """One engine to write with and one to read with."""

    engine: Engine
    read_engine: Engine
    name: str
    """What messages call it: a file, or an address without its password."""
    busy_seconds: float
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stuck: threading.Event = field(default_factory=threading.Event)
    """Set from when another program kept SQLite's write lock from us for `busy_seconds` until a write gets it."""

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One write transaction; commits at the end, rolls back on any error. Raises Busy if SQLite's one writer stays away."""
        if not self.is_sqlite:
            with self.engine.begin() as connection:
                yield connection
            return
        patience = STUCK_SECONDS if self._stuck.is_set() else self.busy_seconds
        if not self._lock.acquire(timeout=patience):  # cheaper than SQLite's busy sleep
            raise Busy(f"{self.name} was busy for {patience:.1f} s")
        begun = False
        try:
            with self.engine.begin() as connection:
                begun = True
                self._stuck.clear()
                yield connection
        except sa.exc.OperationalError:
            if not begun:
                self._stuck.set()
            raise
        finally:
            self._lock.release()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent read."""
        with self.read_engine.begin() as connection:
            yield connection

    @contextmanager
    def glance(self) -> Iterator[Connection]:
        """For a single statement that reads: on PostgreSQL one journey instead of three, because no transaction is opened."""
        if self.is_sqlite:
            with self.read() as connection:
                yield connection
            return
        alone = self.read_engine.execution_options(isolation_level="AUTOCOMMIT")
        with alone.connect() as connection:
            yield connection

    @contextmanager
    def together(self, connection: Connection) -> Iterator[None]:
        """Statements in here go to PostgreSQL in one journey; all have run at the end.

        Nothing may be asked of their results, nor may SQLAlchemy ask: an insert that would fetch its new id says `inline()`.
        """
        if self.is_sqlite:
            yield
            return
        import psycopg

        try:
            with connection.connection.driver_connection.pipeline():  # type: ignore[union-attr]
                yield
        except psycopg.Error as error:  # came at the end, where SQLAlchemy could not see it
            raise sa.exc.DBAPIError.instance(
                None, None, error, psycopg.Error, hide_parameters=True, dialect=self.engine.dialect
            ) from error

    def close(self) -> None:
        self.engine.dispose()
        self.read_engine.dispose()

    def copy_to(self, path: Path) -> None:
        """Writes a consistent copy while the database is in use: a SQLite file, or what `pg_dump` makes for `pg_restore`."""
        if self.is_sqlite:
            _vacuum_into(self.engine, path)
        else:
            _dump(self.engine.url, path)

    def upgrade(self, *, copy_beside: Path) -> None:
        """Brings the tables to the newest revision, after a copy of a database that is behind.

        Args:
            copy_beside: the copy is called this plus `.before-<revision>`.
        Raises: UserError if a newer version made the database, or the copy cannot be written.
        """
        from alembic import command

        config = _alembic_config()
        head, known = known_revisions()
        if (current := self._revision()) == head:
            return
        if current is not None:
            if current not in known:
                raise UserError(
                    f"{self.name} was made by a newer version (revision {current}; this one knows {head})"
                )
            copy = copy_beside.with_name(f"{copy_beside.name}.before-{head}")
            copy.unlink(missing_ok=True)
            self.copy_to(copy)
        with self._migrating() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def _revision(self) -> str | None:
        from alembic.migration import MigrationContext

        with self.engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()

    @contextmanager
    def _migrating(self) -> Iterator[Connection]:
        """A transaction that no other migration shares; SQLite's foreign keys are checked at its end, so tables can be remade."""
        if not self.is_sqlite:
            with self.engine.begin() as connection:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATION_LOCK)))
                yield connection
            return
        engine = sqlite_engine(
            Path(str(self.engine.url.database)),
            begin="BEGIN IMMEDIATE",
            busy_seconds=self.busy_seconds,
            foreign_keys=False,
            poolclass=NullPool,
        )
        with engine.begin() as connection:
            yield connection
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
            if broken:
                raise RuntimeError(f"the migration left rows without their parent: {broken[:3]}")


def known_revisions() -> tuple[str | None, frozenset[str]]:
    """The newest revision of the tables, and every one that can be upgraded to it."""
    from alembic.script import ScriptDirectory

    script = ScriptDirectory.from_config(_alembic_config())
    known = frozenset(revision.revision for revision in script.walk_revisions())
    return script.get_current_head(), known


def _alembic_config() -> AlembicConfig:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def open_sqlite(path: Path, *, busy_seconds: float = BUSY_SECONDS) -> Database:
    """A SQLite file, made on first use."""

    def engine(begin: str) -> Engine:
        return sqlite_engine(path, begin=begin, busy_seconds=busy_seconds, **SQLITE_POOL)

    return Database(engine("BEGIN IMMEDIATE"), engine("BEGIN"), str(path), busy_seconds)


def open_postgres(url: str, *, busy_seconds: float = BUSY_SECONDS) -> Database:
    """A PostgreSQL database that exists. What the URL leaves out comes from libpq: PGPASSWORD, ~/.pgpass.

    Raises: UserError if psycopg is not installed, the URL is not understood or the server cannot be reached.
    """
    parsed = parse_postgres_url(url)
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        raise UserError(
            "a PostgreSQL project needs psycopg: pip install 'reelhf[postgres]'"
        ) from error
    milliseconds = int(busy_seconds * 1000)
    limits = f"-c lock_timeout={milliseconds} -c statement_timeout={2 * milliseconds}"

    def engine(options: str, **extra: Any) -> Engine:
        return sa.create_engine(
            parsed,
            hide_parameters=True,  # an error that is logged must not repeat what people wrote
            connect_args={
                "options": options,
                "connect_timeout": CONNECT_SECONDS,
                "keepalives_idle": 30,  # a machine that vanished says nothing; the kernel would wait for a quarter of an hour
                "keepalives_interval": CONNECT_SECONDS,
                "keepalives_count": 3,
                "tcp_user_timeout": 1000 * CONNECT_SECONDS,
            },
            pool_timeout=busy_seconds,
            pool_recycle=1800,
            **POSTGRES_POOL,
            **extra,
        )

    writer = engine(limits)
    writer.dialect.use_insertmanyvalues_wo_returning = True  # several rows are one statement
    # A report may take long; it holds no lock that a writer needs.
    reader = engine("-c default_transaction_read_only=on", isolation_level="REPEATABLE READ")
    _ping_when_idle(writer, reader)
    database = Database(
        writer,
        reader,
        parsed.render_as_string(hide_password=True),
        busy_seconds,
    )
    try:
        with database.engine.connect():
            pass
    except sa.exc.OperationalError as error:
        database.close()
        reason = str(error.orig).strip().splitlines()[-1]
        raise UserError(f"cannot reach the database {database.name}: {reason}") from error
    return database


def _ping_when_idle(*engines: Engine) -> None:
    """After a restart of the server hardly anybody meets a connection of the old one, and no transaction pays a journey for that.

    SQLAlchemy's `pool_pre_ping` asks each time, a tenth of what a claim costs; here a connection that was used a moment ago is believed, unless
    another of the same database was found dead since.
    """
    found_dead = float("-inf")

    def used(_connection: Any, record: Any) -> None:
        record.info["used"] = time.monotonic()

    def failed(context: Any) -> None:
        nonlocal found_dead
        if context.is_disconnect:
            found_dead = time.monotonic()

    def checkout(engine: Engine, connection: Any, record: Any) -> None:
        nonlocal found_dead
        last = record.info["used"]
        if last > found_dead and time.monotonic() - last < BELIEVED_SECONDS:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            found_dead = time.monotonic()
            raise sa.exc.InvalidatePoolError from error  # makes the pool connect anew, for all

    for engine in engines:
        for moment in ("connect", "checkin"):
            event.listen(engine, moment, used)
        event.listen(engine, "handle_error", failed)
        event.listen(engine, "checkout", lambda c, record, _, e=engine: checkout(e, c, record))


def parse_postgres_url(url: str) -> sa.URL:
    """`postgresql://user@host/name` for psycopg. Raises UserError if it is something else."""
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        parsed = None
    if parsed is None or parsed.drivername not in POSTGRES_SCHEMES or not parsed.database:
        scheme = url.partition(":")[0]
        raise UserError(
            f"the database is a {scheme!r} address; expected postgresql://user@host/name, or none for SQLite"
        )
    return parsed.set(drivername="postgresql+psycopg")


def sqlite_engine(
    path: Path, *, begin: str, busy_seconds: float, foreign_keys: bool = True, **pool: Any
) -> Engine:
    """An engine whose transactions open with `begin`; the driver would choose its own."""
    engine = sa.create_engine(
        f"sqlite:///{path}",
        hide_parameters=True,  # an error that is logged must not repeat what people wrote
        connect_args={"check_same_thread": False, "timeout": busy_seconds},
        **pool,
    )

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout={int(busy_seconds * 1000)}",
            "journal_mode=WAL",
            "synchronous=FULL",  # a judgment that was confirmed survives a power cut
            f"foreign_keys={'ON' if foreign_keys else 'OFF'}",
            "recursive_triggers=ON",  # so that INSERT OR REPLACE meets the append-only triggers
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _vacuum_into(engine: Engine, path: Path) -> None:
    raw = engine.raw_connection()
    try:
        cursor = raw.cursor()
        cursor.execute("VACUUM INTO ?", (str(path),))
        cursor.close()
    finally:
        raw.close()


def _dump(url: sa.URL, path: Path) -> None:
    try:
        postgres_client("pg_dump", "--format=custom", f"--file={path}", database=url)
    except UserError:
        path.unlink(missing_ok=True)
        raise


def postgres_client(name: str, *arguments: str, database: sa.URL | None = None) -> str:
    """What a client program of PostgreSQL prints.

    Args:
        database: which it shall work on.
    Raises: UserError if it is not installed, or fails.
    """
    program = postgres_program(name)
    if program is None:
        raise UserError(f"this needs {name}: apt-get install postgresql-client")
    environment = dict(os.environ)
    line = [program, *arguments]
    if database is not None:
        if database.password:  # never on the command line, where every user of the machine reads it
            environment["PGPASSWORD"] = str(database.password)
        address = database.set(drivername="postgresql", password=None).render_as_string()
        line.append(f"--dbname={address}")
    done = subprocess.run(line, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise UserError(f"{name} failed: {' '.join(done.stderr.split())}")
    return done.stdout


def postgres_program(name: str) -> str | None:
    """The newest `name` of PostgreSQL's programs; Debian keeps them beside the path."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(places[-1]) if places else shutil.which(name)

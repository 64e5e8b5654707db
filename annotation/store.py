"""One annotation project: a folder with its media, and its tables in SQLite beside them or in PostgreSQL.

What people say is append-only, enforced by triggers; `annotation.database` says what a transaction is.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, insert, select

from annotation import audit
from annotation import schema as t
from annotation.database import BUSY_SECONDS, Database, open_postgres, open_sqlite
from annotation.known import known_answers
from annotation.place import Place, read_place
from annotation.presentation import (
    Measured,
    PresentationConfig,
    Shown,
    copy_tasks,
    store_picture,
)
from annotation.prompts.near import ClusterIndex
from annotation.records import (
    KINDS,
    MAX_CLIPS,
    MIN_CLIPS,
    PURPOSES,
    ClipRecord,
    Guideline,
    PromptRecord,
    Question,
    load_guideline,
)
from annotation.storage import Files
from annotation.transcoding import copy_pool
from reelhf.errors import UserError
from reelhf.hashing import sha256_file

TASKS_AT_ONCE = 8
ROLES = ("annotator", "reviewer", "admin")


@dataclass(frozen=True)
class Account:
    """Who is signed in. `pseudonym` is what exports carry; it says nothing of the person."""

    id: int
    name: str
    role: str
    pseudonym: str
    simulated: bool


class Store:
    """Opens (and creates, and upgrades) a project. Safe to share among threads."""

    def __init__(self, database: Database, files: Files, now: Callable[[], float]):
        self.database = database
        self.files = files
        self.media = files.folder
        self._now = now
        self.guideline: Guideline = load_guideline()

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        create: bool = True,
        now: Callable[[], float] = time.time,
        busy_seconds: float = BUSY_SECONDS,
    ) -> Store:
        """Opens a project folder, or a `.db` file whose media lie in `media/` beside it.

        Args:
            create: False refuses a project that is not there.
            now: the clock, in seconds since 1970.
            busy_seconds: how long a write waits for others before it gives up.
        Raises: UserError if the place cannot be written or reached, is no project, or was made by a newer version.
        """
        path = Path(str(path).removeprefix("sqlite:///"))
        file = path if path.suffix in (".db", ".sqlite") else path / "annotation.db"
        place = read_place(file.parent) if file.parent == path else Place()
        if not create and place.database is None and not file.exists():
            raise UserError(f"no annotation project at {path} (looked for {file})")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            media = file.parent / "media"
            media.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make a project at {path}: {error.strerror}") from error
        if not os.access(file.parent, os.W_OK):
            raise UserError(f"cannot write to {file.parent}: the folder is read-only")
        if place.database is None:
            database = open_sqlite(file, busy_seconds=busy_seconds)
        else:
            database = open_postgres(place.database, busy_seconds=busy_seconds)
        store = cls(database, Files(media, place.media), now)
        try:
            database.upgrade(copy_beside=file)
            store.remember_guideline()
        except sa.exc.DatabaseError as error:
            store.close()
            raise UserError(
                f"{database.name} is not an annotation database: {error.orig}"
            ) from error
        except UserError:
            store.close()
            raise
        return store

    # --- question texts ---

    def remember_guideline(self) -> None:
        """Keeps the wording of the present version. Raises UserError if that version was shown with another wording."""
        texts = _texts(self.guideline)
        with self.read() as connection:
            known = connection.execute(_wording, {"version": self.guideline.version}).scalar()
        if known == texts:
            return
        if known is not None:
            raise UserError(
                f"the question texts changed, but their version is still {self.guideline.version!r}; give questions.yaml a new version"
            )
        values = {
            "version": self.guideline.version,
            "questions": texts,
            "created_ms": self.now_ms(),
        }
        try:
            with self.write() as connection:
                connection.execute(insert(t.guideline).values(values))
        except sa.exc.IntegrityError:
            self.remember_guideline()  # another process was quicker

    def guideline_of(self, version: str) -> Guideline:
        """The wording of a version that was shown here; the present one where it was not kept."""
        if version == self.guideline.version:
            return self.guideline
        with self.read() as connection:
            texts = connection.execute(_wording, {"version": version}).scalar()
        if texts is None:  # shown before wordings were kept
            return self.guideline
        questions = {
            name: Question(**{**q, "applies_to": tuple(q["applies_to"])})
            for name, q in texts["questions"].items()
        }
        return Guideline(version, questions, texts["guide"])

    def close(self) -> None:
        self.database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self) -> AbstractContextManager[Connection]:
        """One write transaction; commits at the end, rolls back on any error."""
        return self.database.write()

    def read(self) -> AbstractContextManager[Connection]:
        """One consistent read."""
        return self.database.read()

    def glance(self) -> AbstractContextManager[Connection]:
        """A single statement that reads."""
        return self.database.glance()

    def now_ms(self) -> int:
        return int(self._now() * 1000)

    def _record(self, connection: Connection, action: str, subject: str, **detail: Any) -> None:
        audit.record(connection, self.now_ms(), audit.COMMAND_LINE, action, subject, detail)

    # --- accounts ---

    def add_user(
        self,
        name: str,
        password: str,
        *,
        role: str = "annotator",
        simulated: bool = False,
        expert: bool = False,
    ) -> Account:
        """Adds an account with a random pseudonym. Raises UserError if the name is taken or the password is short.

        Args:
            expert: may claim tasks for experts only, and decides about flags and conflicts.
        """
        from argon2 import PasswordHasher

        name = name.strip()
        if role not in ROLES:
            raise UserError(f"role is {role!r}; expected one of {', '.join(ROLES)}")
        if not name or len(name) > 80:
            raise UserError("a user name has 1 to 80 characters")
        if len(password) < 8:
            raise UserError("a password has at least 8 characters")
        values = {
            "name": name,
            "password_hash": PasswordHasher().hash(password),
            "role": role,
            "pseudonym": "annotator-" + secrets.token_hex(4),
            "simulated": simulated,
            "expert": expert,
            "created_ms": self.now_ms(),
        }
        try:
            with self.write() as connection:
                key = connection.execute(insert(t.account).values(values)).inserted_primary_key
                self._record(connection, "user add", str(values["pseudonym"]), role=role)
        except sa.exc.IntegrityError as error:
            raise UserError(f"there is already a user named {name!r}") from error
        assert key is not None
        return Account(key[0], name, role, str(values["pseudonym"]), simulated)

    def set_password(self, name: str, password: str) -> None:
        """Replaces a password and ends that account's sessions."""
        from argon2 import PasswordHasher

        if len(password) < 8:
            raise UserError("a password has at least 8 characters")
        account = self.find_user(name)
        if account is None:
            raise UserError(f"there is no user named {name!r}")
        hashed = PasswordHasher().hash(password)
        with self.write() as connection:
            connection.execute(
                t.account.update().where(t.account.c.id == account.id).values(password_hash=hashed)
            )
            connection.execute(t.session.delete().where(t.session.c.account_id == account.id))
            self._record(connection, "user password", account.pseudonym)

    def set_expert(self, name: str, expert: bool) -> None:
        """Makes an account an expert's, or no longer one. Raises UserError if there is none of that name."""
        account = self.find_user(name)
        if account is None:
            raise UserError(f"there is no user named {name!r}")
        with self.write() as connection:
            connection.execute(
                t.account.update().where(t.account.c.id == account.id).values(expert=expert)
            )
            self._record(connection, "user expert", account.pseudonym, expert=expert)

    def find_user(self, name: str) -> Account | None:
        with self.read() as connection:
            row = connection.execute(select(t.account).where(t.account.c.name == name)).first()
        return _account(row) if row else None

    def users(self) -> list[Account]:
        """Every account, in the order they were made."""
        with self.read() as connection:
            rows = connection.execute(select(t.account).order_by(t.account.c.id))
            return [_account(row) for row in rows]

    def set_role(self, name: str, role: str) -> None:
        """Gives an account another role, within seconds also for whoever is signed in."""
        if role not in ROLES:
            raise UserError(f"role is {role!r}; expected one of {', '.join(ROLES)}")
        with self.write() as connection:
            pseudonym = connection.execute(
                t.account.update()
                .where(t.account.c.name == name)
                .values(role=role)
                .returning(t.account.c.pseudonym)
            ).scalar()
            if pseudonym is None:
                raise UserError(f"there is no user named {name!r}")
            self._record(connection, "user role", pseudonym, role=role)

    def check_password(self, name: str, password: str) -> Account | None:
        """The account, or None. Takes as long for an unknown name as for a wrong password."""
        from argon2 import PasswordHasher
        from argon2.exceptions import InvalidHashError, VerificationError

        with self.read() as connection:
            row = connection.execute(select(t.account).where(t.account.c.name == name)).first()
        hasher = PasswordHasher()
        if row is None:
            hasher.hash(password)
            return None
        try:
            hasher.verify(row.password_hash, password)
        except (VerificationError, InvalidHashError):
            return None
        return _account(row)

    # --- prompts, clips, tasks ---

    def project_id(self, connection: Connection, name: str) -> int:
        """The id of a project, which is made if it is new."""
        if not name.strip() or len(name) > 80:
            raise UserError("a project's name has 1 to 80 characters")
        found = connection.execute(select(t.project.c.id).where(t.project.c.name == name)).scalar()
        if found is None:
            values = {"name": name, "created_ms": self.now_ms()}
            key = connection.execute(insert(t.project).values(values)).inserted_primary_key
            assert key is not None
            found = key[0]
        return int(found)

    def add_prompts(
        self,
        connection: Connection,
        project_id: int,
        records: Sequence[PromptRecord],
        *,
        pool: Sequence[Mapping[str, Any]] | None = None,
        source: str = "clips",
    ) -> list[str]:
        """Adds prompts that are not there yet, to the store and to a project's pool, and returns the prompt id of each.

        Near-duplicates share a cluster, the unit of the split; the cluster of a prompt that is there never changes.

        Args:
            pool: of each record, what the project's pool says of it beside the defaults (`project_prompt`).
            source: where they come from.
        """
        unseen = {record.prompt_id: record for record in reversed(records)}
        known = self._known(connection, t.prompt.c.prompt_id, list(unseen))
        fresh = [unseen[name] for name in reversed(unseen) if name not in known]
        index = self._cluster_index(connection) if fresh else ClusterIndex()
        rows = []
        for record in fresh:
            cluster = index.nearest(record.text) or record.prompt_id
            if cluster == record.prompt_id:
                index.add(cluster, record.text)
            rows.append(
                {
                    "prompt_id": record.prompt_id,
                    "text": record.text,
                    "language": record.language,
                    "cluster": cluster,
                    "created_ms": self.now_ms(),
                }
            )
        if rows:
            connection.execute(insert(t.prompt), rows)
        here = t.project_prompt.c.project_id == project_id
        pooled = self._known(connection, t.project_prompt.c.prompt_id, list(unseen), here)
        entries = {
            record.prompt_id: {
                "project_id": project_id,
                "prompt_id": record.prompt_id,
                "category": None,
                "status": "active",
                "reason": None,
                "weight": 1.0,
                "source": source,
                "uses": 1,
                "created_ms": self.now_ms(),
                **(pool[place] if pool else {}),
            }
            for place, record in reversed(list(enumerate(records)))
            if record.prompt_id not in pooled
        }
        if entries:
            connection.execute(insert(t.project_prompt), list(entries.values()))
        return [record.prompt_id for record in records]

    @staticmethod
    def _known(
        connection: Connection,
        column: sa.Column[Any],
        values: Sequence[Any],
        *where: sa.ColumnElement[bool],
    ) -> set[Any]:
        """Those of the values that the column already holds."""
        return {
            value
            for part in _chunks(values, 500)
            for value in connection.execute(
                select(column).where(column.in_(part), *where)
            ).scalars()
        }

    @staticmethod
    def _cluster_index(connection: Connection) -> ClusterIndex:
        """The leaders of all clusters, oldest first."""
        leads = t.prompt.c.cluster == t.prompt.c.prompt_id
        oldest_first = (t.prompt.c.created_ms, t.prompt.c.prompt_id)
        query = select(t.prompt.c.cluster, t.prompt.c.text).where(leads).order_by(*oldest_first)
        index = ClusterIndex()
        for row in connection.execute(query):
            index.add(row.cluster, row.text)
        return index

    def add_clips(
        self, clips: Iterable[ClipRecord], *, project: str = "default", label: str | None = None
    ) -> list[int]:
        """Copies clips into the media folder, measures them, and returns their ids in the order given.

        A clip whose bytes are already there keeps its first record. Prompts are added as needed.

        Args:
            project: the project they belong to, made if new; the same bytes may belong to several.
            label: shows progress under this name.
        Raises: UserError naming a file that is missing, damaged or no video.
        """
        from reelhf.progress import track
        from reelhf.video import probe_video

        records = list(clips)
        values = []
        items = track(records, label=label) if label else iter(records)
        for record in items:
            if record.task_kind not in ("t2v", "i2v"):
                raise UserError(
                    f"{record.path}: task kind {record.task_kind!r}; expected t2v or i2v"
                )
            info = probe_video(record.path)
            sha256 = sha256_file(record.path)
            key = f"clips/{sha256}{record.path.suffix.lower()}"
            _copy(record.path, self.media / key)
            self.files.share([key])
            picture_key = picture_sha = None
            if record.first_frame is not None:
                picture, picture_sha = store_picture(record.first_frame, self.media / "pictures")
                picture_key = f"pictures/{picture.name}"
                self.files.share([picture_key])
            values.append(
                {
                    "sha256": sha256,
                    "task_kind": record.task_kind,
                    "model": record.model,
                    "stage": record.stage,
                    "checkpoint": record.checkpoint,
                    "seed": record.seed,
                    "fps": info.fps,
                    "num_frames": info.frames,
                    "width": info.width,
                    "height": info.height,
                    "storage_key": key,
                    "first_frame_sha256": picture_sha,
                    "first_frame_key": picture_key,
                    "created_ms": self.now_ms(),
                }
            )
        with self.write() as connection:
            project_id = self.project_id(connection, project)
            ids = self.add_prompts(
                connection,
                project_id,
                [PromptRecord(record.prompt, record.language) for record in records],
            )
            known = dict(connection.execute(select(t.clip.c.sha256, t.clip.c.id)).tuples().all())
            for row, prompt_id in zip(values, ids, strict=True):
                if row["sha256"] not in known:
                    result = connection.execute(insert(t.clip).values(prompt_id=prompt_id, **row))
                    assert result.inserted_primary_key is not None
                    known[row["sha256"]] = result.inserted_primary_key[0]
            clip_ids = [known[row["sha256"]] for row in values]
            self._share_clips(connection, project_id, clip_ids)
            self._record(connection, "clips import", project, clips=len(set(clip_ids)))
        return clip_ids

    def _share_clips(
        self, connection: Connection, project_id: int, clip_ids: Sequence[int]
    ) -> None:
        """Makes clips part of a project; their bytes stay where they are."""
        here = t.project_clip.c.project_id == project_id
        there = self._known(connection, t.project_clip.c.clip_id, sorted(set(clip_ids)), here)
        rows = [
            {"project_id": project_id, "clip_id": clip_id, "created_ms": self.now_ms()}
            for clip_id in dict.fromkeys(clip_ids)
            if clip_id not in there
        ]
        if rows:
            connection.execute(insert(t.project_clip), rows)

    def create_tasks(
        self,
        groups: Sequence[Sequence[int]],
        *,
        need: int = 1,
        round_number: int = 0,
        priority: int = 0,
        prompt_ids: Sequence[str] | None = None,
        project: str | None = None,
        presentation: PresentationConfig | None = None,
        kind: str = "best_worst",
        purpose: str = "work",
        answers: Sequence[Mapping[str, Mapping[str, Any]]] | None = None,
        experts_only: bool = False,
        engine: str = "local",
        label: str | None = None,
    ) -> list[int]:
        """Makes one task per group of clip ids, with copies for showing, and returns the task ids.

        Args:
            need: judgments wanted per task, from different annotators.
            round_number: of the annotate -> train -> align cycle.
            prompt_ids: the prompt each task shows; by default that of its first clip.
            kind: what is asked: `best_worst`, `gsb` (pairs) or `score`.
            purpose: `work`, or why the answer is known: `gold`, `practice`, `exam`.
            answers: the known ones of each task, by the place of a clip in its group (`annotation.known`).
            project: the project of the tasks; by default the first that each group's first clip came in with.
            engine: where the copies are made, `local` or `ray`.
            label: shows progress under this name.
        Raises: UserError if a group has too few or too many clips for its kind, names one twice, or mixes t2v with i2v, or if
        known answers are missing or do not fit.
        """
        known = _check_request(groups, need, prompt_ids, kind, purpose, answers)
        clips_of = self._clips_of(groups, kind)
        stored = [
            self._stored_answers(index, raw, clips)
            for index, (raw, clips) in enumerate(zip(known, clips_of, strict=True))
        ]
        planned = self._copies(clips_of, presentation or PresentationConfig(), engine, label)
        shared = {
            "kind": kind,
            "purpose": purpose,
            "experts_only": experts_only,
            "round": round_number,
            "need_n": need,
            "priority": priority,
        }
        with self.write() as connection:
            named = None if project is None else self.project_id(connection, project)
            owners = self._owners(connection, [clips[0].id for clips in clips_of])
            ids = [
                self._add_task(
                    connection,
                    clips,
                    copied,
                    **shared,
                    project_id=owners[clips[0].id] if named is None else named,
                    prompt_id=prompt_ids[index] if prompt_ids else clips[0].prompt_id,
                    answers=stored[index],
                )
                for index, (clips, copied) in enumerate(zip(clips_of, planned, strict=True))
            ]
            if ids:
                detail = {"tasks": len(ids), "kind": kind, "purpose": purpose}
                self._record(connection, "tasks create", project or "", **detail)
        return ids

    def _clips_of(self, groups: Sequence[Sequence[int]], kind: str) -> list[list[Any]]:
        """The rows of each group's clips. Raises UserError if a clip is unknown or a group cannot be a task of this kind."""
        wanted = sorted({clip_id for group in groups for clip_id in group})
        with self.read() as connection:
            rows = {
                row.id: row
                for part in _chunks(wanted, 500)
                for row in connection.execute(select(t.clip).where(t.clip.c.id.in_(part)))
            }
        clips_of = [[_known_clip(rows, clip_id) for clip_id in group] for group in groups]
        for index, clips in enumerate(clips_of):
            _check_group(index, clips, kind)
        return clips_of

    def _copies(
        self,
        clips_of: Sequence[Sequence[Any]],
        presentation: PresentationConfig,
        engine: str,
        label: str | None,
    ) -> list[Shown]:
        """How each task is shown, and the copies of its clips, which are made here."""
        from reelhf.progress import track

        folder = self.media / "shown"
        folder.mkdir(exist_ok=True)
        planned: list[Shown] = []
        with copy_pool(engine) as pool:
            items = iter(track(clips_of, label=label) if label else clips_of)
            while window := list(islice(items, TASKS_AT_ONCE)):
                measured = [[self._measured(clip) for clip in clips] for clips in window]
                planned += copy_tasks(measured, folder, presentation, pool)
        self.files.share({f"shown/{copy.name}" for _, copies in planned for copy in copies})
        return planned

    def _add_task(
        self, connection: Connection, clips: Sequence[Any], copied: Shown, **values: Any
    ) -> int:
        plan, copies = copied
        pictures = [clip.first_frame_key for clip in clips if clip.first_frame_key]
        self._share_clips(connection, values["project_id"], [clip.id for clip in clips])
        result = connection.execute(
            insert(t.task).values(
                task_kind=clips[0].task_kind,
                state="open",
                num_judgments=0,
                first_frame_key=pictures[0] if pictures else None,
                shown_fps=plan.fps,
                shown_frames=plan.num_frames,
                created_ms=self.now_ms(),
                **values,
            )
        )
        assert result.inserted_primary_key is not None
        task_id: int = result.inserted_primary_key[0]
        connection.execute(
            insert(t.task_clip),
            [
                {
                    "task_id": task_id,
                    "slot": slot,
                    "clip_id": clip.id,
                    "shown_key": f"shown/{copy.name}",
                }
                for slot, (clip, copy) in enumerate(zip(clips, copies, strict=True))
            ],
        )
        return task_id

    def _stored_answers(
        self, index: int, raw: Mapping[str, Mapping[str, Any]] | None, clips: Sequence[Any]
    ) -> dict[str, dict[str, Any]] | None:
        if raw is None:
            return None
        dimensions = self.guideline.dimensions(clips[0].task_kind)
        try:
            return known_answers(raw, [clip.id for clip in clips], dimensions)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"task {index}: {error}") from error

    def _measured(self, clip: Any) -> Measured:
        path = self.files.local(clip.storage_key)
        return Measured(path, clip.sha256, clip.num_frames, clip.fps, clip.width, clip.height)

    @staticmethod
    def _owners(connection: Connection, clip_ids: Sequence[int]) -> dict[int, int]:
        """The first project of each clip."""
        member = t.project_clip.c
        first = sa.func.min(member.project_id)
        return {
            clip_id: project_id
            for part in _chunks(sorted(set(clip_ids)), 500)
            for clip_id, project_id in connection.execute(
                select(member.clip_id, first)
                .where(member.clip_id.in_(part))
                .group_by(member.clip_id)
            )
        }

    def clips_without_task(self, k: int) -> list[list[int]]:
        """Clips that no task shows yet, in groups of up to `k` (at least 2) of one prompt and task kind."""
        if not MIN_CLIPS <= k <= MAX_CLIPS:
            raise UserError(f"k is {k}; best and worst need {MIN_CLIPS} to {MAX_CLIPS} clips")
        query = (
            select(t.clip.c.id, t.clip.c.prompt_id, t.clip.c.task_kind)
            .where(t.clip.c.id.not_in(select(t.task_clip.c.clip_id)))
            .order_by(t.clip.c.model, t.clip.c.id)
        )
        by_prompt: dict[tuple[str, str], list[int]] = {}
        with self.read() as connection:
            for row in connection.execute(query):
                by_prompt.setdefault((row.prompt_id, row.task_kind), []).append(row.id)
        groups = [part for ids in by_prompt.values() for part in _chunks(ids, k)]
        return [list(group) for group in groups if len(group) >= MIN_CLIPS]

    # --- looking ---

    def counts(self) -> dict[str, int]:
        """Rows that say how far the project is: prompts, clips, tasks, open tasks, judgments (human and simulated), skips.

        A judgment that was changed counts once; `revisions` counts the changes.
        """
        first = t.judgment.c.revision == 0

        def number(table: sa.Table, *where: sa.ColumnElement[bool]) -> sa.ScalarSelect[int]:
            return select(sa.func.count()).select_from(table).where(*where).scalar_subquery()

        query = select(
            number(t.prompt).label("prompts"),
            number(t.clip).label("clips"),
            number(t.task).label("tasks"),
            number(t.task, t.task.c.state == "open").label("open_tasks"),
            number(t.task, t.task.c.state == "flagged").label("flagged_tasks"),
            number(t.task, t.task.c.state == "conflict").label("conflict_tasks"),
            number(t.judgment, first).label("judgments"),
            number(t.judgment, first, t.judgment.c.simulated).label("simulated_judgments"),
            number(t.judgment, first, ~t.judgment.c.simulated).label("human_judgments"),
            number(t.judgment, ~first).label("revisions"),
            number(t.skip).label("skips"),
            number(t.flag).label("flags"),
        )
        with self.read() as connection:
            return dict(connection.execute(query).one()._mapping)

    def clips_per_task(self) -> int:
        """The largest K among the tasks, 4 if there is none."""
        query = select(sa.func.max(t.task_clip.c.slot))
        with self.read() as connection:
            largest = connection.execute(query).scalar()
        return 4 if largest is None else largest + 1

    def backup(self, path: Path) -> Path:
        """Writes a consistent copy of the database (not of the media) while it is in use."""
        if path.exists():
            raise UserError(f"{path} is already there; name a new file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.database.copy_to(path)
        except (OSError, sa.exc.DatabaseError) as error:
            raise UserError(f"cannot write the backup {path}: {error}") from error
        return path


# --- helpers -------------------------------------------------------------------------------------


_wording = sa.select(t.guideline.c.questions).where(
    t.guideline.c.version == sa.bindparam("version")
)


def _texts(guideline: Guideline) -> dict[str, Any]:
    questions = {
        name: {**asdict(q), "applies_to": list(q.applies_to)}
        for name, q in guideline.questions.items()
    }
    return {"questions": questions, "guide": dict(guideline.guide)}


def _account(row: Any) -> Account:
    return Account(row.id, row.name, row.role, row.pseudonym, row.simulated)


def _check_request(
    groups: Sequence[Sequence[int]],
    need: int,
    prompt_ids: Sequence[str] | None,
    kind: str,
    purpose: str,
    answers: Sequence[Mapping[str, Mapping[str, Any]]] | None,
) -> list[Mapping[str, Mapping[str, Any]] | None]:
    """The known answers of each group, None where none are due. Raises UserError if the arguments do not fit one another."""
    if kind not in KINDS:
        raise UserError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
    if purpose not in PURPOSES:
        raise UserError(f"purpose is {purpose!r}; expected one of {', '.join(PURPOSES)}")
    known: list[Any] = [None] * len(groups) if answers is None else list(answers)
    if (purpose == "work") != (answers is None) or len(known) != len(groups):
        raise UserError(
            f"a task for {purpose} {'has no' if purpose == 'work' else 'needs a'} known answer; {len(groups)} tasks came with {len(answers or ())}"
        )
    if need < 1:
        raise UserError(f"need is {need}; a task wants at least 1 judgment")
    if prompt_ids is not None and len(prompt_ids) != len(groups):
        raise UserError(f"{len(prompt_ids)} prompt ids came with {len(groups)} groups of clips")
    return known


def _known_clip(rows: dict[int, Any], clip_id: int) -> Any:
    if clip_id not in rows:
        raise UserError(f"there is no clip with id {clip_id}")
    return rows[clip_id]


CLIPS_OF = {"best_worst": (MIN_CLIPS, MAX_CLIPS), "gsb": (2, 2), "score": (1, MAX_CLIPS)}
"""Kind of task -> fewest and most clips."""


def _check_group(index: int, clips: Sequence[Any], kind: str) -> None:
    fewest, most = CLIPS_OF[kind]
    if not fewest <= len(clips) <= most:
        what = {"best_worst": "best and worst need", "gsb": "a pair needs", "score": "scores need"}
        wanted = str(most) if fewest == most else f"{fewest} to {most}"
        raise UserError(f"task {index} has {len(clips)} clips; {what[kind]} {wanted}")
    if len({clip.id for clip in clips}) != len(clips):
        raise UserError(f"task {index} shows the same clip twice (files with equal bytes)")
    if len({clip.task_kind for clip in clips}) != 1:
        raise UserError(f"task {index} mixes text-to-video and image-to-video clips")


def _copy(source: Path, target: Path) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{secrets.token_hex(4)}.tmp")
    try:
        shutil.copyfile(source, aside)
        aside.replace(target)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"cannot copy {source} to {target.parent}: {error.strerror}") from error


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

"""The prompts and clips of a project: what tasks are made of."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, insert, select

from annotation import schema as t
from annotation.ground import Ground
from annotation.presentation import store_picture
from annotation.prompts.near import ClusterIndex
from annotation.records import ClipRecord, PromptRecord
from reelhf.errors import UserError
from reelhf.hashing import sha256_file

PER_STATEMENT = 500
"""Values that one statement asks for; SQLite takes no more than some thousand."""


class Library(Ground):
    """The prompts and clips of a project."""

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
            for part in chunks(values, PER_STATEMENT)
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
            self.share_clips(connection, project_id, clip_ids)
            self._record(connection, "clips import", project, clips=len(set(clip_ids)))
        return clip_ids

    def share_clips(self, connection: Connection, project_id: int, clip_ids: Sequence[int]) -> None:
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


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """The items in runs of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]

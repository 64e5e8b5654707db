"""Making tasks: which clips are judged together, and the copies that are shown of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, insert, select

from annotation import schema as t
from annotation.known import known_answers
from annotation.library import PER_STATEMENT, Library, chunks
from annotation.presentation import Measured, PresentationConfig, Shown, copy_tasks
from annotation.records import KINDS, MAX_CLIPS, MIN_CLIPS, PURPOSES, Guideline
from annotation.transcoding import copy_pool
from reelhf.errors import UserError

TASKS_AT_ONCE = 8


class Tasks(Library):
    """The tasks of a project."""

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
        stored: list[dict[str, dict[str, Any]] | None] = [None] * len(groups)
        if answers is not None:
            asked = self._guidelines(clips_of, project)
            stored = [
                _stored_answers(index, *each)
                for index, each in enumerate(zip(known, clips_of, asked, strict=True))
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
                for part in chunks(wanted, PER_STATEMENT)
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
        self.share_clips(connection, values["project_id"], [clip.id for clip in clips])
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

    def _guidelines(
        self, clips_of: Sequence[Sequence[Any]], project: str | None
    ) -> list[Guideline]:
        """What the project of each group of clips asks; the present questions in one that is yet to be made."""
        versions = select(t.project.c.id, t.project.c.guideline_version)
        with self.read() as connection:
            if project is not None:
                row = connection.execute(versions.where(t.project.c.name == project)).first()
                return [self.guideline_of(row and row.guideline_version)] * len(clips_of)
            owners = self._owners(connection, [clips[0].id for clips in clips_of])
            version = dict(connection.execute(versions).tuples().all())
        return [self.guideline_of(version[owners[clips[0].id]]) for clips in clips_of]

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
            for part in chunks(sorted(set(clip_ids)), PER_STATEMENT)
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
        groups = [part for ids in by_prompt.values() for part in chunks(ids, k)]
        return [list(group) for group in groups if len(group) >= MIN_CLIPS]


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


def _stored_answers(
    index: int,
    raw: Mapping[str, Mapping[str, Any]],
    clips: Sequence[Any],
    guideline: Guideline,
) -> dict[str, dict[str, Any]]:
    dimensions = guideline.dimensions(clips[0].task_kind)
    try:
        return known_answers(raw, [clip.id for clip in clips], dimensions)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"task {index}: {error}") from error


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

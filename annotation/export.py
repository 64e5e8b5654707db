"""Judgments become preference data (contract 3 of the design), page by page: memory does not grow with the project.

What a judgment yields, per dimension:
- a free, admissible pick: one `explicit` pair (best over worst, weight 1) and the other 2K - 4 pairs that best and worst imply;
- a pick made after a veto: its explicit pair only, `constrained`; beside it the vetoed free pick, whole, with `admissible` false
  (an honest opinion of this dimension that must not reach the composite or DPO);
- a tie: one explicit tie between two clips drawn at random, the other pairs as implied ties;
- a pair that was called good, same or bad (`gsb`): that pair, or a tie;
- scores: every pair; the one of best and worst is explicit, the others implied.

Of a judgment that was changed, the latest revision counts. Gold tasks and re-tests are in the table of judgments, with their
`purpose`, and yield no preferences; practice and exams are left out. What an expert decided about a conflict is one more
annotator's judgment, or (`adjudicated_only`) the only one of that task.

Implied pairs are written on request. Pairs with a purged clip, and judgments that were withdrawn, stay out and are counted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, select

from annotation import audit
from annotation import schema as t
from annotation.export_rows import Votes, judgment_row, pairs_of, picks_of, preference_rows
from annotation.history import is_latest
from annotation.pairs import Pair
from annotation.preference_files import PreferenceWriter
from annotation.projects import project_id
from annotation.routing import COUNTED
from annotation.store import Store

PAGE_JUDGMENTS = 500
KEPT_TASKS = 5000
KEPT_CLIPS = 20_000
PAGE_CLIPS = 2000
IN_LIST = 500
"""Values in one SQL `IN`; databases limit them."""


@dataclass(frozen=True)
class ExportQuery:
    """Which judgments an export holds. Written into its manifest."""

    project: str | None = None
    """Tasks of this project; all projects by default."""
    min_round: int = 0
    max_round: int | None = None
    exclude_simulated: bool = False
    include_implied: bool = False
    """Also the pairs that best and worst imply, marked `implied`."""
    adjudicated_only: bool = False
    """Of tasks that an expert decided, the preferences come from the decision alone."""

    def words(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in asdict(self).items())


def export_preferences(
    store: Store, out: Path | str, query: ExportQuery | None = None, *, fmt: str = "parquet"
) -> Path:
    """Writes the preference data of a store; the same judgments give the same tables.

    Args:
        query: which judgments; all of them, explicit pairs only, by default.
        fmt: `parquet`, `jsonl` or `csv`.
    Returns: the folder, readable by `annotation.records.read_preferences`.
    """
    query = query or ExportQuery()
    with PreferenceWriter(out, fmt=fmt) as writer, store.read() as connection:
        of_project = None if query.project is None else project_id(connection, query.project)
        newest = select(sa.func.max(t.judgment.c.id))
        last = connection.execute(newest).scalar() or 0
        where = [*_where(query, of_project), t.judgment.c.id <= last]
        counts: Counter[str] = Counter()
        left_out: Counter[str] = Counter()
        versions: set[str] = set()
        used = _Ids()
        for judgments, preferences, clip_ids in _pages(connection, where, query, left_out):
            writer.write("judgments", judgments)
            writer.write("preferences", preferences)
            for judgment in judgments:
                counts[_answer(judgment)] += 1
                versions.add(judgment["guideline_version"])
            used.update(clip_ids)
        for clips in _clip_pages(connection, used):
            rows = [_clip_row(store, writer.folder, clip, query.project) for clip in clips]
            writer.write("clips", rows)
        folder = writer.finish(
            guideline_version=", ".join(sorted(versions)) or store.guideline.version,
            source_query=query.words(),
            extra={
                "answers": dict(counts),
                "left_out": {name: number for name, number in left_out.items() if number},
                "last_judgment": last,
            },
        )
    with store.write() as connection:
        detail = {"query": query.words(), "last_judgment": last}
        subject = folder.name[: audit.MAX_SUBJECT]
        audit.record(connection, store.now_ms(), audit.COMMAND_LINE, "export", subject, detail)
    return folder


def judgment_table(
    store: Store, query: ExportQuery | None = None, *, newest: int | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The `judgments` and `clips` rows of an export, in memory: for reports.

    Args:
        newest: of the last so many judgments only.
    """
    query = query or ExportQuery()
    with store.read() as connection:
        of_project = None if query.project is None else project_id(connection, query.project)
        found, used = [], _Ids()
        where = _where(query, of_project)
        if newest is not None:
            older = select(t.judgment.c.id).order_by(t.judgment.c.id.desc()).offset(newest).limit(1)
            where.append(t.judgment.c.id > (connection.execute(older).scalar() or 0))
        for judgments, _, clip_ids in _pages(connection, where, query, Counter()):
            found += judgments
            used.update(clip_ids)
        clips = [
            _clip_row(store, store.media.parent, clip, query.project)
            for page in _clip_pages(connection, used)
            for clip in page
        ]
    return found, clips


_deleted_on_label_studio = (
    select(sa.literal(1))
    .select_from(t.label_studio_annotation)
    .where(
        t.label_studio_annotation.c.judgment_id == t.judgment.c.id,
        t.label_studio_annotation.c.state == "deleted",
    )
    .correlate(t.judgment)
    .exists()
)
"""Who deletes an annotation takes the vote back; it stays on record."""


def _where(query: ExportQuery, of_project: int | None) -> list[sa.ColumnElement[bool]]:
    where: list[sa.ColumnElement[bool]] = [
        t.task.c.round >= query.min_round,
        t.judgment.c.purpose.in_(COUNTED),
        is_latest(),
        ~_deleted_on_label_studio,
    ]
    if of_project is not None:
        where.append(t.task.c.project_id == of_project)
    if query.max_round is not None:
        where.append(t.task.c.round <= query.max_round)
    if query.exclude_simulated:
        where.append(~t.judgment.c.simulated)
    return where


def _answer(judgment: Mapping[str, Any]) -> str:
    if judgment["pick"] == "first":
        return "vetoed"
    return "constrained" if judgment["constrained"] else str(judgment["status"])


class _Ids:
    """A set of row ids at one bit each."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def update(self, ids: set[int]) -> None:
        if ids and max(ids) // 8 >= len(self._bits):
            self._bits.extend(bytes(max(ids) // 8 + 1 - len(self._bits)))
        for number in ids:
            self._bits[number // 8] |= 1 << number % 8

    def pages(self, size: int) -> Iterator[list[int]]:
        """The ids in ascending order, at most `size` at a time."""
        page: list[int] = []
        for place, byte in enumerate(self._bits):
            page += [8 * place + bit for bit in range(8) if byte >> bit & 1]
            if len(page) >= size:
                yield page[:size]
                page = page[size:]
        if page:
            yield page


def _pages(
    connection: Connection,
    where: Sequence[sa.ColumnElement[bool]],
    query: ExportQuery,
    left_out: Counter[str],
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]], set[int]]]:
    """Judgment rows, preference rows and ids of the clips they name, page by page in the order judged.

    A page is read by key (`id` above the last one), so the thousandth costs what the first does.
    """
    withdrawn = _withdrawn(connection)
    tasks = _Tasks(connection, where, query, withdrawn)
    known = _Clips(connection)
    after = 0
    while True:
        page = list(
            connection.execute(
                select(t.judgment.c.id, t.judgment.c.task_id)
                .join(t.task, t.task.c.id == t.judgment.c.task_id)
                .where(*where, t.judgment.c.id > after)
                .order_by(t.judgment.c.id)
                .limit(PAGE_JUDGMENTS)
            )
        )
        if not page:
            return
        first, after = page[0].id, page[-1].id
        tasks.read({row.task_id for row in page})
        of_page = _choices.where(*where, t.judgment.c.id.between(first, after))
        choices = connection.execute(of_page).all()
        clips = known.read({clip for row in choices for clip in row.clip_order})
        judgments: list[dict[str, Any]] = []
        preferences: list[dict[str, Any]] = []
        used: set[int] = set()
        for row in sorted(choices, key=lambda row: (row.judgment_id, row.position)):
            if row.account_id in withdrawn:
                left_out["withdrawn answers"] += 1
                continue
            shown = [clips[clip_id] for clip_id in row.clip_order]
            used.update(clip["id"] for clip in shown if not clip["purged_ms"])
            for pick in picks_of(row, [clip["sha256"] for clip in shown]):
                judgments.append(judgment_row(row, pick))
                if not tasks.teaches(row):
                    continue
                pairs = pairs_of(pick)
                kept = [pair for pair in pairs if not _purged(pair, shown)]
                left_out["pairs with a purged clip"] += len(pairs) - len(kept)
                preferences += preference_rows(
                    row,
                    shown,
                    pick,
                    kept,
                    include_implied=query.include_implied,
                    votes=tasks.votes(row.task_id),
                )
        yield judgments, preferences, used


class _Tasks:
    """What all annotators said of each task: a pair's agreement needs it. The last `KEPT_TASKS` are kept, for a task's judgments lie
    close together; an older one is read again."""

    def __init__(
        self,
        connection: Connection,
        where: Sequence[sa.ColumnElement[bool]],
        query: ExportQuery,
        withdrawn: set[int],
    ):
        self._connection, self._where, self._query = connection, where, query
        self._withdrawn = withdrawn
        self._votes: dict[int, Votes] = {}
        self._decided: dict[int, bool] = {}

    def read(self, task_ids: set[int]) -> None:
        """Reads the tasks that are not kept."""
        missing = sorted(task_ids - self._votes.keys())
        if len(self._votes) + len(missing) > KEPT_TASKS:
            old = [task for task in self._votes if task not in task_ids]
            for task_id in old[: len(self._votes) + len(missing) - KEPT_TASKS]:
                del self._votes[task_id], self._decided[task_id]
        found: dict[int, list[Any]] = {task_id: [] for task_id in missing}
        for start in range(0, len(missing), IN_LIST):
            part = t.task.c.id.in_(missing[start : start + IN_LIST])
            for row in self._connection.execute(_said.where(*self._where, part)):
                if row.account_id not in self._withdrawn:
                    found[row.task_id].append(row)
        for task_id, rows in found.items():
            self._decided[task_id] = any(row.purpose == "adjudication" for row in rows)
            taught = [row for row in rows if self.teaches(row)]
            self._votes[task_id] = Votes(taught, include_implied=self._query.include_implied)

    def votes(self, task_id: int) -> Votes:
        return self._votes[task_id]

    def teaches(self, row: Any) -> bool:
        """True if preferences come of it: real work that no expert has decided otherwise, or the expert's word."""
        if row.purpose == "adjudication":
            return True
        overruled = self._query.adjudicated_only and self._decided[row.task_id]
        return bool(row.purpose == "work" and not overruled)


class _Clips:
    """What is needed of the clips that were shown. The last `KEPT_CLIPS` are kept, for the judgments of a task lie close together."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._rows: dict[int, dict[str, Any]] = {}

    def read(self, clip_ids: set[int]) -> Mapping[int, dict[str, Any]]:
        """Rows by clip id: these, and others that were read before."""
        missing = clip_ids - self._rows.keys()
        if (over := len(self._rows) + len(missing) - KEPT_CLIPS) > 0:
            for clip_id in [clip for clip in self._rows if clip not in clip_ids][:over]:
                del self._rows[clip_id]
        self._rows |= _rows_by_id(self._connection, _shown_clips, missing)
        return self._rows


def _purged(pair: Pair, shown: Sequence[Mapping[str, Any]]) -> bool:
    return bool(shown[pair.a]["purged_ms"] or shown[pair.b]["purged_ms"])


def _withdrawn(connection: Connection) -> set[int]:
    """Accounts that were purged and whose judgments were withdrawn with them."""
    gone = select(t.tombstone.c.subject).where(
        t.tombstone.c.kind == "user", t.tombstone.c.withdrawn
    )
    query = select(t.account.c.id).where(t.account.c.pseudonym.in_(gone))
    return set(connection.execute(query).scalars())


def _rows_by_id(
    connection: Connection, query: sa.Select[Any], clip_ids: set[int]
) -> dict[int, dict[str, Any]]:
    """Rows about clips, by clip id."""
    ids = sorted(clip_ids)
    return {
        row.id: dict(row._mapping)
        for start in range(0, len(ids), IN_LIST)
        for row in connection.execute(query.where(t.clip.c.id.in_(ids[start : start + IN_LIST])))
    }


def _clip_pages(connection: Connection, used: _Ids) -> Iterator[list[dict[str, Any]]]:
    for ids in used.pages(PAGE_CLIPS):
        clips = _rows_by_id(connection, _clips, set(ids))
        yield [clips[clip_id] for clip_id in ids]


_said = (
    select(
        t.choice,
        t.judgment.c.task_id,
        t.judgment.c.account_id,
        t.judgment.c.purpose,
        t.presentation.c.clip_order,
    )
    .join(t.judgment, t.judgment.c.id == t.choice.c.judgment_id)
    .join(t.presentation, t.presentation.c.id == t.judgment.c.presentation_id)
    .join(t.task, t.task.c.id == t.judgment.c.task_id)
)

_shown_clips = select(
    t.clip.c.id,
    t.clip.c.sha256,
    t.clip.c.stage,
    t.clip.c.first_frame_sha256,
    t.clip.c.purged_ms,
)

_first_project = (
    select(t.project.c.name)
    .join(t.project_clip, t.project_clip.c.project_id == t.project.c.id)
    .where(t.project_clip.c.clip_id == t.clip.c.id)
    .order_by(t.project.c.id)
    .limit(1)
    .correlate(t.clip)
    .scalar_subquery()
)

_clips = select(
    t.clip,
    t.prompt.c.text.label("prompt_text"),
    t.prompt.c.language.label("prompt_language"),
    _first_project.label("project"),
).join(t.prompt, t.prompt.c.prompt_id == t.clip.c.prompt_id)

_choices = (
    select(
        t.choice,
        t.judgment.c.task_id,
        t.judgment.c.account_id,
        t.judgment.c.kind,
        t.judgment.c.purpose,
        t.judgment.c.revision,
        t.judgment.c.surplus,
        t.judgment.c.simulated,
        t.judgment.c.guideline_version,
        t.judgment.c.seconds,
        t.judgment.c.submitted_ms,
        t.account.c.pseudonym,
        t.presentation.c.clip_order,
        t.presentation.c.shown_ms,
        t.project.c.name.label("project"),
        t.task.c.round,
        t.task.c.prompt_id,
        t.task.c.task_kind,
        t.prompt.c.text,
        t.prompt.c.language,
        t.prompt.c.cluster,
    )
    .join(t.judgment, t.judgment.c.id == t.choice.c.judgment_id)
    .join(t.presentation, t.presentation.c.id == t.judgment.c.presentation_id)
    .join(t.account, t.account.c.id == t.judgment.c.account_id)
    .join(t.task, t.task.c.id == t.judgment.c.task_id)
    .join(t.project, t.project.c.id == t.task.c.project_id)
    .join(t.prompt, t.prompt.c.prompt_id == t.task.c.prompt_id)
)


def _clip_row(
    store: Store, out: Path, clip: Mapping[str, Any], project: str | None
) -> dict[str, Any]:
    def uri(key: str | None) -> str | None:
        return key and Path(os.path.relpath(store.media / key, out)).as_posix()

    copied = (
        "sha256",
        "prompt_id",
        "task_kind",
        "first_frame_sha256",
        "model",
        "stage",
        "checkpoint",
        "seed",
        "fps",
        "num_frames",
        "width",
        "height",
    )
    return {
        **{name: clip[name] for name in copied},
        "project": project or clip["project"],
        "prompt": clip["prompt_text"],
        "language": clip["prompt_language"],
        "uri": uri(clip["storage_key"]),
        "first_frame_uri": uri(clip["first_frame_key"]),
    }

"""Our tasks become tasks of a Label Studio project, each exactly once however often this runs."""

from __future__ import annotations

import random
import secrets
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from sqlalchemy import Row, insert, select, update

from annotation import schema as t
from annotation.api.signing import Signer, site_key
from annotation.label_studio.template import label_config, task_data
from annotation.records import Guideline
from annotation.store import Store
from reelhf.errors import UserError

BATCH = 200
TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    project: int
    new: int
    known: int
    """Tasks that were there before."""


def connect(server: str, key: str, http: httpx.Client | None = None) -> Any:
    """A client of a Label Studio server. Raises UserError if it does not answer or refuses the key."""
    from label_studio_sdk import LabelStudio
    from label_studio_sdk.core.api_error import ApiError

    client = LabelStudio(
        base_url=server, api_key=key, httpx_client=http or httpx.Client(timeout=TIMEOUT_SECONDS)
    )
    try:
        client.users.whoami()
    except httpx.HTTPError as error:
        raise UserError(f"Label Studio at {server} does not answer: {error}") from error
    except ApiError as error:
        raise UserError(
            f"Label Studio at {server} refuses the key (status {error.status_code}); "
            "make one under Account & Settings and put it in LABEL_STUDIO_API_KEY"
        ) from error
    return client


def push(
    client: Any,
    store: Store,
    *,
    server: str,
    media_url: str,
    project: int | None = None,
    title: str = "ReelHF best and worst",
    link_days: float = 90.0,
    seed: int | None = None,
) -> Pushed:
    """Sends every open best/worst task that the project does not have yet.

    Args:
        server: address of Label Studio; with the project it names where a task went.
        media_url: how browsers reach our own server, which sends the clips.
        project: an existing one; None makes a new one, whose best/worst form fits the tasks.
        link_days: links to clips work this long.
        seed: of the orders shown; None draws them.
    Raises: UserError if no task is open, or their clips or dimensions differ: one project has one form.
    """
    tasks = _open_tasks(store)
    if not tasks:
        raise UserError("no task is open: make some with `reelhf annotate tasks create`")
    shapes = {(task.dimensions, len(task.clips), task.guideline.version) for task in tasks}
    if len(shapes) > 1:
        raise UserError(
            "the open tasks differ in their questions or number of clips; a Label Studio project has one form, so push them apart"
        )
    dimensions, num_clips, _ = shapes.pop()
    if project is None:
        made = client.projects.create(
            title=title,
            label_config=label_config(tasks[0].guideline, dimensions, num_clips),
            maximum_annotations=max(task.row.need_n for task in tasks),
            show_skip_button=True,
        )
        project = int(made.id)
    _recover(client, store, server, project)
    with store.read() as connection:
        known = set(
            connection.execute(
                select(t.label_studio_task.c.task_id).where(
                    t.label_studio_task.c.server == server, t.label_studio_task.c.project == project
                )
            ).scalars()
        )
    new = [task for task in tasks if task.row.id not in known]
    rng = random.Random(seed) if seed is not None else random.SystemRandom()
    signer = Signer(store, site_key(store, "media"))
    for start in range(0, len(new), BATCH):
        _send(
            client,
            store,
            new[start : start + BATCH],
            server,
            project,
            media_url,
            signer,
            link_days,
            rng,
        )
    return Pushed(project, len(new), len(known))


@dataclass(frozen=True)
class _Task:
    row: Row[Any]
    clips: tuple[int, ...]
    dimensions: tuple[str, ...]
    guideline: Guideline


def _open_tasks(store: Store) -> list[_Task]:
    query = (
        select(t.task, t.prompt.c.text, t.project.c.guideline_version)
        .join(t.prompt, t.prompt.c.prompt_id == t.task.c.prompt_id)
        .join(t.project, t.project.c.id == t.task.c.project_id)
        .where(t.task.c.state == "open", t.task.c.kind == "best_worst", t.task.c.purpose == "work")
        .order_by(t.task.c.priority.desc(), t.task.c.id)
    )
    clips: dict[int, list[int]] = defaultdict(list)
    with store.read() as connection:
        rows = connection.execute(query).all()
        ordered = select(t.task_clip).order_by(t.task_clip.c.task_id, t.task_clip.c.slot)
        for row in connection.execute(ordered):
            clips[row.task_id].append(row.clip_id)
    found = []
    for row in rows:
        guideline = store.guideline_of(row.guideline_version)
        dimensions = guideline.dimensions(row.task_kind)
        if row.first_frame_key is None:
            dimensions = tuple(name for name in dimensions if name != "preservation")
        found.append(_Task(row, tuple(clips[row.id]), tuple(dimensions), guideline))
    return found


def _send(
    client: Any,
    store: Store,
    tasks: Sequence[_Task],
    server: str,
    project: int,
    media_url: str,
    signer: Signer,
    link_days: float,
    rng: random.Random,
) -> None:
    """One batch. Our rows come first: what was sent and never confirmed is found again by its uid."""
    rows, bodies = [], []
    for task in tasks:
        uid = secrets.token_hex(12)
        order = list(task.clips)
        rng.shuffle(order)
        urls = [
            media_url.rstrip("/")
            + signer.sign(f"/media/task/{uid}/{position}", seconds=link_days * 86_400)
            for position in range(len(order))
        ]
        rows.append(
            {
                "uid": uid,
                "server": server,
                "project": project,
                "task_id": task.row.id,
                "clip_order": order,
                "dimension_order": list(task.dimensions),
                "guideline_version": task.guideline.version,
                "pushed_ms": store.now_ms(),
            }
        )
        data = task_data(
            uid=uid,
            prompt=task.row.text,
            order=order,
            urls=urls,
            fps=task.row.shown_fps,
            guideline_version=task.guideline.version,
        )
        bodies.append({"data": data})
    with store.write() as connection:
        connection.execute(insert(t.label_studio_task), rows)
    answer = client.projects.import_tasks(id=project, request=bodies, return_task_ids=True)
    _confirm(store, zip((row["uid"] for row in rows), answer.task_ids or [], strict=True))


def _confirm(store: Store, pairs: Any) -> None:
    with store.write() as connection:
        for uid, their_id in pairs:
            connection.execute(
                update(t.label_studio_task)
                .where(t.label_studio_task.c.uid == uid)
                .values(their_id=their_id)
            )


def _recover(client: Any, store: Store, server: str, project: int) -> None:
    """Settles what an earlier push sent without hearing back: found by uid it is confirmed, otherwise it never arrived."""
    table = t.label_studio_task
    unsure = (table.c.server == server, table.c.project == project, table.c.their_id.is_(None))
    with store.read() as connection:
        waiting = set(connection.execute(select(table.c.uid).where(*unsure)).scalars())
    if not waiting:
        return
    there = {uid: number for uid, number in _uids(client, project) if uid in waiting}
    _confirm(store, there.items())
    with store.write() as connection:
        connection.execute(table.delete().where(*unsure))


def _uids(client: Any, project: int) -> Iterator[tuple[str, int]]:
    for task in client.tasks.list(project=project, fields="all", page_size=500):
        data = task.data or {}
        if data.get("uid"):
            yield str(data["uid"]), int(task.id)

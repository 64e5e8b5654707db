"""Projects of one store: each has its prompts, tasks, exports, members and guideline version; the bytes of clips are shared.

A small team never names one: everything is then in the project `default`, where everyone may work.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection, insert, select

from annotation import audit
from annotation import schema as t
from annotation.store import Store
from reelhf.errors import UserError, did_you_mean

MEMBER_ROLES = ("annotator", "reviewer", "admin")


@dataclass(frozen=True)
class ProjectLine:
    """One project, counted."""

    id: int
    name: str
    guideline_version: str | None
    retention_days: int | None
    prompts: int
    clips: int
    tasks: int
    members: int
    """0: everyone with an account may work here."""


def project_id(connection: Connection, name: str) -> int:
    """The id of a project. Raises UserError naming the nearest one if there is none."""
    names = dict(connection.execute(select(t.project.c.name, t.project.c.id)).tuples().all())
    if name not in names:
        raise UserError(f"there is no project {name!r}.{did_you_mean(name, names)}")
    return int(names[name])


def list_projects(store: Store) -> list[ProjectLine]:
    """Every project, in the order made."""

    def number(table: sa.Table) -> sa.ScalarSelect[int]:
        return (
            select(sa.func.count())
            .select_from(table)
            .where(table.c.project_id == t.project.c.id)
            .correlate(t.project)
            .scalar_subquery()
        )

    query = select(
        t.project.c.id,
        t.project.c.name,
        t.project.c.guideline_version,
        t.project.c.retention_days,
        number(t.project_prompt).label("prompts"),
        number(t.project_clip).label("clips"),
        number(t.task).label("tasks"),
        number(t.project_member).label("members"),
    ).order_by(t.project.c.id)
    with store.read() as connection:
        return [ProjectLine(**row._mapping) for row in connection.execute(query)]


def set_member(store: Store, project: str, name: str, role: str | None, *, actor: str) -> None:
    """Gives an account a role in a project, or takes it away (None). A project with members is closed to everyone else.

    Raises: UserError if the role, the project or the account is unknown.
    """
    if role is not None and role not in MEMBER_ROLES:
        raise UserError(f"role is {role!r}; expected one of {', '.join(MEMBER_ROLES)}")
    account = store.find_user(name)
    if account is None:
        raise UserError(f"there is no user named {name!r}")
    with store.write() as connection:
        found = project_id(connection, project)
        members = t.project_member
        mine = sa.and_(members.c.project_id == found, members.c.account_id == account.id)
        connection.execute(sa.delete(members).where(mine))
        if role is not None:
            values = {"project_id": found, "account_id": account.id, "role": role}
            connection.execute(insert(members).values(values))
        audit.record(
            connection,
            store.now_ms(),
            actor,
            "project member",
            project,
            {"annotator": account.pseudonym, "role": role},
        )


def configure(
    store: Store,
    project: str,
    *,
    retention_days: int | None,
    guideline_version: str | None,
    actor: str,
) -> None:
    """Sets how long clips are kept and which wording of the questions the project is judged by; makes the project if new.

    Args:
        guideline_version: one that the store keeps (`Store.remember_guideline`); None is always the present one.
    Raises: UserError if the retention is no time, or no such wording is kept.
    """
    if retention_days is not None and retention_days < 1:
        raise UserError(f"retention is {retention_days} days; expected 1 or more")
    versions = store.guideline_versions()
    if guideline_version is not None and guideline_version not in versions:
        raise UserError(
            f"no questions of version {guideline_version!r} are kept here; there are {', '.join(versions)}."
            f"{did_you_mean(guideline_version, versions)} New ones come from a file: --guideline questions.yaml"
        )
    values = {"retention_days": retention_days, "guideline_version": guideline_version}
    with store.write() as connection:
        found = store.project_id(connection, project)
        connection.execute(sa.update(t.project).where(t.project.c.id == found).values(values))
        audit.record(connection, store.now_ms(), actor, "project settings", project, values)

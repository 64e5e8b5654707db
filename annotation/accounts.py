"""Who may sign in, and as what."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Row, insert, select

from annotation import schema as t
from annotation.ground import Ground
from reelhf.errors import UserError

ROLES = ("annotator", "reviewer", "admin")


@dataclass(frozen=True)
class Account:
    """Who is signed in. `pseudonym` is what exports carry; it says nothing of the person."""

    id: int
    name: str
    role: str
    pseudonym: str
    simulated: bool

    @classmethod
    def of(cls, row: Row[Any]) -> Account:
        """From a row of `account`."""
        return cls(row.id, row.name, row.role, row.pseudonym, row.simulated)


class Accounts(Ground):
    """The accounts of a project."""

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
        return Account.of(row) if row else None

    def users(self) -> list[Account]:
        """Every account, in the order they were made."""
        with self.read() as connection:
            rows = connection.execute(select(t.account).order_by(t.account.c.id))
            return [Account.of(row) for row in rows]

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
        return Account.of(row)

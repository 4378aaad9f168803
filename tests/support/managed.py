"""Backbones with a control plane: a real database and Valkey, users with keys, and real backbone processes.

with managed(model, directory, database_url, valkey_url) as control:
    key = control.user("alice").key
    one = control.backbone()            # `privatelora backbone`, told where the control plane is
    DeviceSession(one.url, token=key, ...)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.service import BACKBONE, ServiceProcess, running_process

from privatelora.platform import keys
from privatelora.platform.database import Database
from privatelora.platform.tables import Quota, Role, Scope, SessionRow, UsageDay, User, new_id, utc_now


@dataclass(frozen=True)
class Member:
    """A user, and a key of theirs."""

    id: str
    key: str
    key_id: str


@dataclass
class Managed:
    """One control plane's database, and the backbones that were started on it."""

    model: Path
    directory: Path
    database_url: str
    valkey_url: str
    database: Database
    settings: dict[str, str]
    _stack: ExitStack
    _count: int = field(default=0)

    def user(
        self,
        name: str,
        *,
        plan: str = "default",
        team: str | None = None,
        role: Role = Role.MEMBER,
        scope: Scope = Scope.DEVICE,
    ) -> Member:
        with self.database.write() as session:
            user = User(id=new_id("usr"), name=name, role=role, plan=plan, team=team, created_at=utc_now())
            session.add(user)
            session.flush()
            row, text = keys.new_key(user, "test", scope)
            session.add(row)
        return Member(user.id, text, row.id)

    def quota(self, level: str, subject: str, resource: str, limit: int, **more: Any) -> str:
        with self.database.write() as session:
            row = Quota(id=new_id("quo"), level=level, subject=subject, resource=resource, limit=limit, **more)
            session.add(row)
        return row.id

    def backbone(self, **settings: str) -> ServiceProcess:
        """A backbone process; `settings` are PRIVATELORA_* variables without their prefix."""
        self._count += 1
        given = {"database_url": self.database_url, "valkey_url": self.valkey_url} | self.settings | settings
        environment = {f"PRIVATELORA_{name}".upper(): value for name, value in given.items()}
        data_dir = self.directory / "data"
        options = (
            "--model",
            str(self.model),
            "--dtype",
            "float32",
            "--data-dir",
            str(data_dir),
            "--torch-threads",
            "1",
        )
        log = self.directory / f"backbone-{self._count}.log"
        return self._stack.enter_context(running_process(BACKBONE, options, log, environment))

    def sessions(self, user: str | None = None) -> list[SessionRow]:
        with self.database.read() as session:
            query = session.query(SessionRow).order_by(SessionRow.id)
            return list(query if user is None else query.filter(SessionRow.user_id == user))

    def used(self, user: str) -> tuple[int, int, int]:
        """Bytes up, bytes down and tokens of a user's days."""
        with self.database.read() as session:
            days = session.query(UsageDay).filter(UsageDay.user_id == user).all()
        return sum(d.bytes_up for d in days), sum(d.bytes_down for d in days), sum(d.tokens for d in days)


@contextmanager
def managed(model: Path, directory: Path, database_url: str, valkey_url: str, **settings: str) -> Iterator[Managed]:
    """A control plane on an empty database."""
    database = Database(database_url)
    database.upgrade()
    with ExitStack() as stack:
        stack.callback(database.close)
        yield Managed(model, directory, database_url, valkey_url, database, settings, stack)

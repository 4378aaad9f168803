"""The API over a real database and Valkey, with users of every role and an object of each kind that belongs to one.

    with control(database_url, valkey_url) as plane:
        plane.client.get("/api/v1/me", headers=plane.as_("operator"))

The app runs in this process; `tests/platform/test_api_server.py` has the real one on a socket.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from secrets import token_hex

from fastapi import FastAPI
from starlette.testclient import TestClient

from privatelora.platform import keys, schedules
from privatelora.platform.api import create_app
from privatelora.platform.audit import SHELL, record
from privatelora.platform.database import Database
from privatelora.platform.jobs import machine
from privatelora.platform.settings import load_settings
from privatelora.platform.tables import (
    BackboneNode,
    Device,
    MetricPoint,
    PublishedModel,
    PublishedSet,
    Quota,
    Role,
    Scope,
    SessionRow,
    SessionState,
    UsageDay,
    User,
    new_id,
    utc_now,
)

ROLES = ("operator", "overseer", "device", "reader", "other")
"""operator and read-only operator; device and read-only key of alice; a device key of bob."""


@dataclass
class Control:
    """A running API and what it knows: keys by role, ids by kind of object, all of them alice's."""

    app: FastAPI
    client: TestClient
    database: Database
    keys: dict[str, str] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)

    def as_(self, role: str) -> dict[str, str]:
        """Headers with the key of a role."""
        return {"Authorization": f"Bearer {self.keys[role]}"}

    def user(self, name: str, role: Role, scope: Scope) -> tuple[str, str, str]:
        """A user with a key: their ids, and the key."""
        with self.database.write() as session:
            user = User(id=new_id("usr"), name=name, role=role, plan="free", team="red")
            session.add(user)
            session.flush()
            row, text = keys.new_key(user, "test", scope)
            session.add(row)
        return user.id, row.id, text

    def another_key(self, user_id: str, scope: Scope) -> tuple[str, str]:
        with self.database.write() as session:
            row, text = keys.new_key(session.get_one(User, user_id), "another", scope)
            session.add(row)
        return row.id, text

    def objects(self) -> dict[str, str]:
        """A fresh object of each kind, alice's where it is someone's: id by kind."""
        now, alice = utc_now(), self.ids["user"]
        with self.database.write() as session:
            key, _ = keys.new_key(session.get_one(User, alice), "spare", Scope.DEVICE)
            node = BackboneNode(id=new_id("bbn"), url="http://127.0.0.1:1", model_hash="1" * 64, info={}, state="gone")
            device = Device(id=new_id("dev"), user_id=alice, installation=token_hex(16), allows=["evaluate"])
            session.add_all([key, node, device])
            session.flush()
            row = SessionRow(
                id=new_id("ses"),
                number=1,
                user_id=alice,
                key_id=key.id,
                device_id=device.id,
                backbone_id=node.id,
                placement="paper",
                state=SessionState.OPEN,
                view={"passes": []},
            )
            quota = Quota(id=new_id("quo"), level="key", subject=key.id, resource="bytes_up_per_day", limit=1 << 40)
            session.add_all([row, quota, MetricPoint(backbone_id=node.id, at=now, interval_s=10.0, values={"a": 1.0})])
            job = machine.queue(session, SHELL, "evaluate", {}, device=device)
            assert job is not None
            schedule = schedules.create(
                session, SHELL, name=new_id("x"), kind="evaluate", cron="0 2 * * *", params={}, target={"all": True}
            )
        return {
            "user": alice, "key": key.id, "device": device.id, "session": row.id, "quota": quota.id, "job": job.id,
            "schedule": schedule.id, "backbone": node.id, "installation": device.installation,
        }  # fmt: skip


@contextmanager
def control(database_url: str, valkey_url: str, **settings: object) -> Iterator[Control]:
    """The API on an empty database, with the roles' users and one object of each kind."""
    given = {"database_url": database_url, "valkey_url": valkey_url, "requests_per_minute": 10**6}
    database = Database(database_url)
    database.upgrade()
    app = create_app(load_settings(given | settings))
    try:
        with TestClient(app, raise_server_exceptions=False, client=("127.0.0.1", 5000)) as client:
            plane = Control(app, client, database)
            operator, _, plane.keys["operator"] = plane.user("operator", Role.OPERATOR, Scope.OPERATOR)
            _, plane.keys["overseer"] = plane.another_key(operator, Scope.READ_ONLY)
            plane.ids["user"], _, plane.keys["device"] = plane.user("alice", Role.MEMBER, Scope.DEVICE)
            _, plane.keys["reader"] = plane.another_key(plane.ids["user"], Scope.READ_ONLY)
            _, _, plane.keys["other"] = plane.user("bob", Role.MEMBER, Scope.DEVICE)
            plane.ids |= plane.objects()
            _published(plane)
            yield plane
    finally:
        database.close()


def _published(plane: Control) -> None:
    now = utc_now()
    with plane.database.write() as session:
        session.add(
            PublishedModel(sha256="1" * 64, name="tiny", dtype="float32", shape={"layers": 4}, context_length=512)
        )
        session.add(
            PublishedSet(sha256="2" * 64, kind="random", model_hash="1" * 64, max_rank_down=8, max_rank_up=8, nbytes=1)
        )
        for days in range(3):
            session.add(UsageDay(user_id=plane.ids["user"], day=(now - timedelta(days=days)).date(), bytes_up=days))
        record(session, SHELL, "user.created", plane.ids["user"], name="alice")
    plane.ids |= {"model": "1" * 64, "adapter": "2" * 64}

"""`privatelora admin` on a real database of each kind: what it makes works, what it changes is in the audit log."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from datetime import date
from io import StringIO
from typing import Any

import pytest
from tests.support.servers import ValkeyServer
from typer.testing import CliRunner

from privatelora.platform import keys
from privatelora.platform.cli import app
from privatelora.platform.database import Database
from privatelora.platform.events import STREAM, read_event
from privatelora.platform.tables import ApiKey, BackboneNode, SessionRow, UsageDay, new_id
from privatelora.platform.valkey import connect
from privatelora.protocol.errors import AuthenticationError, ConfigurationError

Admin = Callable[..., Any]


@pytest.fixture
def text(database: Database, valkey: ValkeyServer) -> Callable[..., str]:
    """Run an admin command as a shell does, and return what it prints; an error of the tree is raised."""
    variables = {
        "PRIVATELORA_DATABASE_URL": database.engine.url.render_as_string(hide_password=False),
        "PRIVATELORA_VALKEY_URL": valkey.url,
        "COLUMNS": "300",
    }

    def invoke(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["admin", *arguments], env=variables)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return invoke


@pytest.fixture
def admin(text: Callable[..., str]) -> Admin:
    """The same with --json, read."""
    return lambda *arguments: json.loads(text(*arguments, "--json"))


def holder(database: Database, key: str) -> keys.Caller:
    with database.read() as session:
        return keys.find(session, key)


def actions(admin: Admin) -> list[str]:
    """What the audit log has, the newest first, all of it done at a shell."""
    entries = admin("audit")
    assert {entry["address"] for entry in entries} <= {"shell"}
    return [entry["action"] for entry in entries]


def test_a_key_works_until_it_is_replaced_revoked_or_its_user_disabled(
    admin: Admin, text: Callable[..., str], database: Database, valkey: ValkeyServer
) -> None:
    (alice,) = admin("create-user", "alice", "--plan", "research")
    first = text("create-key", "alice").splitlines()[0]
    assert holder(database, first).user == alice["id"]
    assert holder(database, first).plan == "research"
    (listed,) = admin("list-keys", "--user", "alice")
    assert "digest" not in listed
    assert first not in json.dumps(listed)
    second = admin("rotate-key", listed["id"], "--grace-s", "0")
    with pytest.raises(AuthenticationError, match="expired"):
        holder(database, first)
    assert holder(database, second["key"]).scope == "device"
    admin("disable-user", "alice")
    with pytest.raises(AuthenticationError, match="disabled"):
        holder(database, second["key"])
    admin("enable-user", alice["id"])
    admin("revoke-key", second["prefix"])
    with pytest.raises(AuthenticationError, match="revoked"):
        holder(database, second["key"])
    done = ["key.revoked", "user.enabled", "user.disabled", "key.rotated", "key.created", "user.created"]
    assert actions(admin) == done
    told = [read_event(fields).kind for _, fields in connect(valkey.url).xrange(STREAM)]  # type: ignore[union-attr]  # the client is no async one
    assert told[-2:] == ["user.disabled", "key.revoked"]
    with database.read() as session:
        assert not any(key in json.dumps(admin("audit")) for key in (first, second["key"]))
        assert session.query(ApiKey).count() == 2


def test_only_an_operator_gets_a_key_that_operates(admin: Admin, database: Database) -> None:
    admin("create-user", "bob")
    admin("create-user", "root", "--role", "operator")
    with pytest.raises(ConfigurationError, match=r"bob is a member.*--scope device or read-only"):
        admin("create-key", "bob", "--scope", "operator")
    assert holder(database, admin("create-key", "root", "--scope", "operator")["key"]).operates
    assert not holder(database, admin("create-key", "root", "--scope", "read-only")["key"]).operates


def test_what_cannot_be_done_says_why_and_changes_nothing(admin: Admin) -> None:
    admin("create-user", "bob")
    before = actions(admin)
    for words, reason in (
        (("create-user", "bob"), "there is a user bob already"),
        (("create-user", "eve", "--role", "king"), "--role=king: use one of operator, member"),
        (("create-user", "two\nlines"), "is no name"),
        (("create-key", "nobody"), "there is no user nobody"),
        (("revoke-key", "plk_00000000"), "0 keys fit"),
        (("set-quota", "plan", "default", "bytes"), "either a limit or --delete"),
        (("set-quota", "plan", "default", "money", "5"), "RESOURCE=money: use one of"),
        (("set-quota", "plan", "default", "tokens_per_minute", "5", "--soft-limit", "6"), "above the limit of 5"),
        (("set-quota", "plan", "x", "tokens_per_minute", "5", "--resets-at", "25:00"), "--resets-at=25:00"),
        (("queue-job", "nonsense"), "nonsense"),
        (("queue-job", "usage-rollup", "--params", "[1]"), "no JSON object"),
        (("cancel-job", "job_0"), "there is no job job_0"),
        (("drain",), "name sessions, or a --backbone"),
        (("end-session", "ses_0"), "there is no live session ses_0"),
        (("usage", "--since", "yesterday"), "--since=yesterday"),
    ):
        with pytest.raises(Exception, match=reason):
            admin(*words)
    assert actions(admin) == before


def test_quotas_are_made_changed_and_deleted(admin: Admin, text: Callable[..., str]) -> None:
    (user,) = admin("create-user", "alice")
    (made,) = admin("set-quota", "user", "alice", "bytes_up_per_day", "1000", "--soft-limit", "800")
    assert (made["subject"], made["limit"], made["soft_limit"]) == (user["id"], 1000, 800)
    admin("set-quota", "user", "alice", "bytes_up_per_day", "2000", "--resets-at", "06:30")
    (changed,) = admin("list-quotas")
    assert (changed["id"], changed["limit"], changed["soft_limit"], changed["used"]) == (made["id"], 2000, 800, 0)
    assert "06:30" in text("list-quotas")
    assert admin("set-quota", "user", "alice", "bytes_up_per_day", "--delete") == []
    assert admin("list-quotas") == []
    assert actions(admin)[:3] == ["quota.deleted", "quota.changed", "quota.created"]


def test_sessions_of_a_backbone_are_asked_to_leave(admin: Admin, database: Database) -> None:
    admin("create-user", "alice")
    key = admin("create-key", "alice")
    with database.write() as session:
        node = BackboneNode(id=new_id("bbn"), url="http://b", model_hash="0" * 64, info={})
        session.add(node)
        session.flush()
        for number in (1, 2):
            session.add(
                SessionRow(
                    id=new_id("ses"), number=number, user_id=key["user_id"], key_id=key["id"], backbone_id=node.id,
                    placement="paper",
                )
            )  # fmt: skip
    second, first = admin("list-sessions", "--user", "alice")
    assert [one["id"] for one in admin("end-session", first["id"])] == [first["id"]]
    assert [one["id"] for one in admin("drain", "--backbone", node.id)] == [first["id"], second["id"]]
    found = {one["id"]: one["command"] for one in admin("list-sessions")}
    assert found == {first["id"]: "end", second["id"]: "drain"}  # who is to leave now is not asked to drain
    assert [one["id"] for one in admin("list-backbones")] == [node.id]


def test_jobs_are_queued_and_cancelled(admin: Admin) -> None:
    (queued,) = admin("queue-job", "usage-rollup", "--priority", "3")
    assert (queued["state"], queued["priority"]) == ("queued", 3)
    assert [job["id"] for job in admin("list-jobs", "--state", "queued")] == [queued["id"]]
    (cancelled,) = admin("cancel-job", queued["id"])
    assert cancelled["state"] == "cancelled"
    assert actions(admin) == ["job.cancelled", "job.queued"]
    assert admin("list-schedules") == []


def test_usage_is_told_as_csv_that_computes_nothing(admin: Admin, text: Callable[..., str], database: Database) -> None:
    (user,) = admin("create-user", "=cmd|calc")
    with database.write() as session:
        for day in (24, 25):
            session.add(UsageDay(user_id=user["id"], day=date(2026, 11, day), bytes_up=5, bytes_down=6, tokens=7))
    rows = list(csv.DictReader(StringIO(text("usage", "--since", "2026-11-25", "--until", "2026-11-25", "--csv"))))
    assert [(row["day"], row["user"], row["bytes_up"], row["tokens"]) for row in rows] == [
        ("2026-11-25", "'=cmd|calc", "5", "7")
    ]
    assert len(admin("usage", "--since", "2026-11-01", "--until", "2026-11-30", "--user", user["id"])) == 2


def test_the_schema_goes_back_and_comes_again(text: Callable[..., str], database: Database) -> None:
    at = database.revision
    assert text("downgrade", "base", "--yes").split()[-1] == "none"
    with pytest.raises(ConfigurationError, match="has schema revision none"):
        text("list-users")
    assert text("upgrade").split()[-1] == at
    assert text("list-users").splitlines()[0].startswith("id")

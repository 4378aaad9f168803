"""The schema: up and down on SQLite and PostgreSQL, the same as the models, and an audit log that can only grow."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlalchemy.exc import DatabaseError
from sqlalchemy_celery_beat.session import ModelBase

from privatelora.platform.audit import SHELL, record
from privatelora.platform.database import Database
from privatelora.platform.tables import AuditEntry, Base
from privatelora.protocol.errors import ConfigurationError


def names(database: Database) -> set[str]:
    return set(inspect(database.engine).get_table_names()) - {"alembic_version"}


def test_the_schema_goes_up_down_and_up_again(empty: Database) -> None:
    with pytest.raises(ConfigurationError, match="revision none, this release needs 0001; run `privatelora admin"):
        empty.check()
    empty.upgrade()
    empty.check()
    whole = names(empty)
    assert {"users", "api_keys", "sessions", "jobs", "celery_periodictask"} <= whole
    empty.downgrade("base")
    assert names(empty) == set()
    empty.upgrade()
    assert names(empty) == whole


def test_autogenerate_would_change_nothing(database: Database) -> None:
    beat = type(Base.metadata)()
    for table in ModelBase.metadata.sorted_tables:
        table.to_metadata(beat, schema=None)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, [Base.metadata, beat]) == []


def test_a_column_that_the_migration_lacks_is_drift(database: Database) -> None:
    with database.engine.begin() as connection:
        connection.execute(text("ALTER TABLE users DROP COLUMN disabled_at"))
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert "disabled_at" in str(compare_metadata(context, Base.metadata))


@pytest.mark.parametrize("change", ["UPDATE audit_log SET action = 'x'", "DELETE FROM audit_log"])
def test_the_database_refuses_to_change_the_audit_log(database: Database, change: str) -> None:
    with database.write() as session:
        record(session, SHELL, "user.created", "usr_x", name="alice")
    with pytest.raises(DatabaseError, match="append-only"), database.write() as session:
        session.execute(text(change))
    with database.read() as session:
        assert [entry.action for entry in session.query(AuditEntry)] == ["user.created"]


def test_a_transaction_that_fails_leaves_nothing(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.write() as session:
        record(session, SHELL, "user.created", "usr_x")
        session.flush()
        raise ZeroDivisionError
    with database.read() as session:
        assert session.query(AuditEntry).count() == 0


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("mysql://root@host/name", "database mysql is not supported"),
        ("postgresql", "cannot be read"),
        ("oracle+nonsense://x", "not supported"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        Database(url)


def test_a_database_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    database = Database("postgresql://alice:secret-word@127.0.0.1:1/name")
    with pytest.raises(ConfigurationError, match="cannot be reached") as refused:
        database.check()
    assert "secret-word" not in str(refused.value)

"""Servers that the tests of the control plane share: one PostgreSQL and one Valkey a test session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tests.support.servers import PostgresServer, ValkeyServer, postgres, valkey_server

from privatelora.platform.database import Database


@pytest.fixture(scope="session")
def server() -> Iterator[PostgresServer]:
    with TemporaryDirectory(prefix="privatelora-postgres-") as folder, postgres(Path(folder) / "data") as running:
        yield running


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    with valkey_server() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database without a table, of each kind."""
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path}/control.db")
    else:
        database = Database(request.getfixturevalue("server").database())
    yield database
    database.close()


@pytest.fixture
def database(empty: Database) -> Database:
    """A database with this release's schema, of each kind."""
    empty.upgrade()
    return empty

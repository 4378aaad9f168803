"""`privatelora up`: the whole service as one supervised command, on one data directory.

    Valkey (from its wheel), then API, worker, beat and backbone, each a process of its own, told by its environment
    where the database and Valkey are; the database is SQLite. A URL of yours replaces either.

The API's port is the one that people know. It is opened here and handed on, so that a port in use is reported at once,
and a client that comes while the API is started again waits instead of being refused. Devices ask there which backbone
to use. `run` is ready once the API and a backbone answer through that port.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
from pydantic import SecretStr
from redis.exceptions import RedisError
from rich.console import Console
from rich.text import Text

from privatelora.platform import embedded, valkey
from privatelora.platform.database import Database
from privatelora.platform.net import listening, url_of
from privatelora.platform.settings import PREFIX, Settings
from privatelora.platform.supervisor import Part, Show, Supervisor
from privatelora.protocol.errors import ConfigurationError, ServiceError
from privatelora.protocol.local import token_path
from privatelora.protocol.messages import INFO_PATH

STOP_ORDER = (("backbone",), ("worker", "beat"), ("api",), ("valkey",))
STOP_S = 15.0
ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # hosts that mean every address, and where we ask ourselves
LOOK_S = 0.1  # between two looks at whether something answers
VALKEY_START_S = 30.0  # a long append-only file is read first
COLOURS = {"valkey": "red", "api": "green", "worker": "yellow", "beat": "magenta", "backbone": "cyan"}


@dataclass(frozen=True)
class Ready:
    """A service that answers.

    admin_key : the first operator's key, which only the first start knows.
    """

    url: str
    token_file: Path
    admin_key: str | None


def run(settings: Settings, ready: Callable[[Ready], None]) -> None:
    """Run the service until SIGINT, SIGTERM or SIGHUP; a second one ends it at once.

    Raises `ConfigurationError` for what a person has to mend before it can start, and `ServiceError` if a part of it
    keeps dying.
    """
    if settings.host in ANY and settings.public_url is None:
        raise ConfigurationError(
            f"--host={settings.host} is every address of this machine, and devices have to be told one for the "
            "backbone: set PRIVATELORA_PUBLIC_URL=https://NAME:8766 and PRIVATELORA_BACKBONE_PORT=8766"
        )
    os.umask(0o077)  # what it writes is its owner's
    with embedded.locked(settings.data_dir) as lock, listening(settings.host, settings.port) as listener:
        asyncio.run(_Service(settings, lock, listener).run(ready))


class _Service:
    def __init__(self, settings: Settings, lock: int, listener: socket.socket) -> None:
        self._lock, self._listener = lock, listener
        self._valkey = None
        if settings.valkey_url == embedded.NO_URL:
            self._valkey = embedded.embedded_valkey(settings.data_dir)
            settings = settings.model_copy(update={"valkey_url": self._valkey.url})
            embedded.tell(lock, embedded.Running(os.getpid(), self._valkey.url))
        if settings.database_url is None:
            settings = settings.model_copy(update={"database_url": embedded.database_url(settings.data_dir)})
        self._settings = settings
        self._database_url, self._valkey_url = str(settings.database_url), str(settings.valkey_url)
        self._failure: ServiceError | ConfigurationError | None = None

    async def run(self, ready: Callable[[Ready], None]) -> None:
        show = lines_shown(self._settings.log_format)
        main = asyncio.current_task()
        if main is None:
            raise ServiceError("there is no task to run in")

        def fail(error: ServiceError | ConfigurationError) -> None:
            self._failure = self._failure or error
            main.cancel()

        supervisor = Supervisor(show, fail)
        with _told_by_signals(main, supervisor):
            try:
                ready(await self._start(supervisor, show))
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if self._failure is None:
                    show("up", "stopping")
            finally:
                self._listener.close()  # nobody new; what the API has accepted is still answered
                await supervisor.stop(STOP_ORDER, max(STOP_S, self._settings.drain_s + 5))
        if self._failure is not None:
            raise self._failure

    async def _start(self, supervisor: Supervisor, show: Show) -> Ready:
        settings, token_file = self._settings, token_path(self._settings.data_dir)
        if self._valkey is not None:
            command = [str(self._valkey.binary), "-"]
            part = Part("valkey", command, os.environ, announces=False, stdin=self._valkey.config, keeps=(self._lock,))
            await supervisor.start(part)
            await self._valkey_answers()
        else:
            valkey.check(valkey.connect(self._valkey_url), self._valkey_url)
        with closing(Database(self._database_url)) as database:
            database.upgrade()
            token = embedded.ensure_local(database, token_file)
            for name, arguments in self._commands().items():
                await supervisor.start(self._part(name, arguments))
            for name in self._commands():
                await supervisor.announced(name)
            url = url_of(settings.certfile is not None, settings.host, self._listener)
            await self._answers(token)
            return Ready(url, token_file, embedded.first_admin_key(database))

    def _commands(self) -> dict[str, list[str]]:
        return {
            "backbone": ["backbone", "--port", str(self._settings.backbone_port), "--json"],  # takes longest
            "api": ["api", "--fd", str(self._listener.fileno()), "--json"],
            "worker": ["worker", "--json"],
            "beat": ["beat", "--json"],
        }

    def _part(self, name: str, arguments: list[str]) -> Part:
        keeps = (self._lock, self._listener.fileno()) if name == "api" else (self._lock,)
        command = [sys.executable, "-m", "privatelora.platform", *arguments]
        grace_s = self._settings.drain_s + 3 if name == "backbone" else 5.0
        environment = environment_of(self._settings) | {"PYTHONWARNINGS": "ignore:::celery.platforms"}  # of being root
        return Part(name, command, environment, keeps=keeps, grace_s=grace_s)

    async def _valkey_answers(self) -> None:
        client = valkey.connect(self._valkey_url)
        for _ in range(int(VALKEY_START_S / LOOK_S)):
            try:
                client.ping()
            except RedisError:
                await asyncio.sleep(LOOK_S)
            else:
                client.close()
                return
        raise ServiceError(f"the embedded Valkey did not answer within {VALKEY_START_S:.0f} s; see its lines above")

    async def _answers(self, token: str) -> None:
        """Wait until the API is ready and sends devices on to a backbone."""
        port = self._listener.getsockname()[1]
        scheme = "https" if self._settings.certfile else "http"
        host = ANY.get(self._settings.host, self._settings.host)
        base = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        headers = {"Authorization": f"Bearer {token}"}
        # the certificate is our own, and its name need not be this address
        async with httpx.AsyncClient(base_url=base, headers=headers, verify=False, trust_env=False) as client:
            for path, enough in (("/readyz", (200,)), (INFO_PATH, (200, 401))):  # 401: this machine's key was revoked
                while True:
                    try:
                        if (await client.get(path)).status_code in enough:
                            break
                    except httpx.HTTPError:
                        pass  # it is being started again, which its lines tell
                    await asyncio.sleep(LOOK_S)


def environment_of(settings: Settings) -> dict[str, str]:
    """The environment of a process with exactly these settings."""
    given = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        if value is not None:
            given[f"{PREFIX}{name.upper()}"] = ";".join(value) if isinstance(value, tuple) else str(value)
    inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)}
    return inherited | given


def lines_shown(log_format: str) -> Show:
    """What prints a part's line on stderr: with the part's name before it, or as JSON with the field `process`."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def as_text(name: str, line: str) -> None:
        if console.is_terminal:
            console.print(Text(f"{name:<8} | ", COLOURS.get(name, "bold")), end="")
            console.print(line, markup=False)
        else:
            print(f"{name:<8} | {line}", file=sys.stderr, flush=True)

    def as_json(name: str, line: str) -> None:
        try:
            told = json.loads(line)
        except ValueError:
            told = None
        fields = told if isinstance(told, dict) else {"event": line}
        print(json.dumps(fields | {"process": name}), file=sys.stderr, flush=True)

    return as_json if log_format == "json" else as_text


@contextmanager
def _told_by_signals(main: asyncio.Task[None], supervisor: Supervisor) -> Iterator[None]:
    """Cancel `main` at the first signal, kill everything at the second."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    came = False

    def stop() -> None:
        nonlocal came
        if came:
            supervisor.kill()
        else:
            main.cancel()
        came = True

    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)

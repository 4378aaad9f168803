"""uvicorn for the API: strict about heads, quiet, and ended cleanly by SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from privatelora.platform import valkey
from privatelora.platform.api import create_app
from privatelora.platform.api.services import Services
from privatelora.platform.net import url_of
from privatelora.platform.settings import Settings
from privatelora.protocol.errors import ConfigurationError

MAX_HEAD_BYTES = 16 * 1024
HEAD_S = 10.0  # for a request's head to arrive
MAX_CONNECTIONS = 1000
IDLE_S = 30  # that a kept connection may wait for its next request
STOP_S = 5  # for open requests, at a stop


def serve(settings: Settings, listener: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve the API on a listening socket until SIGINT or SIGTERM; `ready` is told its URL once it answers.

    Raises `ConfigurationError` where the database or Valkey cannot be reached, or the certificate cannot be used.
    """
    app = create_app(settings)
    services: Services = app.state.services
    services.database.check()
    valkey.check(services.valkey, str(settings.valkey_url))
    try:
        config = uvicorn.Config(
            app,
            http=GuardedHttp,
            loop="uvloop",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=STOP_S,
            ssl_certfile=settings.certfile,
            ssl_keyfile=settings.keyfile,
        )
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"TLS certificate {settings.certfile} cannot be used ({error}); check both PEM files"
        ) from None
    server = Serving(config, services)
    url = url_of(settings.certfile is not None, settings.host, listener)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_run(server, listener, lambda: ready(url)))


class GuardedHttp(H11Protocol):
    """HTTP/1.1 whose request heads must be short, and arrive within a time: uvicorn alone would wait for ever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own has it
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        begins = self.conn.their_state is h11.IDLE
        if begins and len(data) > MAX_HEAD_BYTES and b"\r\n\r\n" not in data[:MAX_HEAD_BYTES]:
            self.send_400_response("The request's head is too large.")  # h11 minds only one that is not whole yet
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._deadline is None:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._deadline = self.loop.call_later(HEAD_S, self.transport.abort)

    def _forget_head(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Serving(uvicorn.Server):
    """uvicorn, which lets go of whoever waits, and does not raise the signal again that ended it."""

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self.services = services

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.services.offers.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGTERM or not self.should_exit:
            self.should_exit = True
        else:
            super().handle_exit(sig, frame)


async def _run(server: uvicorn.Server, listener: socket.socket, ready: Callable[[], None]) -> None:
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():  # noqa: ASYNC110 (uvicorn has no other sign of its start)
        await asyncio.sleep(0.01)
    if server.started:
        ready()
    await serving

"""uvicorn for the API: strict about heads, quiet, and ended cleanly by SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
from collections.abc import Callable
from types import FrameType

import uvicorn

from privatelora.platform import valkey
from privatelora.platform.api import create_app
from privatelora.platform.api.services import Services
from privatelora.platform.net import url_of
from privatelora.platform.settings import Settings
from privatelora.protocol.errors import ConfigurationError

MAX_HEAD_BYTES = 16 * 1024
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
            http="h11",  # which has limits for heads
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
    server = _Server(config)
    url = url_of(settings.certfile is not None, settings.host, listener)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_run(server, listener, lambda: ready(url)))


class _Server(uvicorn.Server):
    """uvicorn, which does not raise the signal again that ended it: that was no failure."""

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

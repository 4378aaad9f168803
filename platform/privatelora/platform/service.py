"""The service in this process: loads the frozen model, opens its port and serves the data plane until it is stopped.

    Settings -> socket -> Backbone (published model, adapter sets) -> DataPlane -> uvicorn

`serve` is what `privatelora up` and `privatelora backbone` run; `ready` is told the address once connections are
answered. The port is taken before the model is loaded, so that one in use is reported at once, and a device that comes
while the model loads waits instead of being refused.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import structlog
import torch
import uvicorn

from privatelora.cloud.admission import TokenAdmission, local_token
from privatelora.cloud.backbone import Backbone
from privatelora.cloud.endpoint import server
from privatelora.cloud.plane import DataPlane, DataPlaneSettings
from privatelora.platform.models import source_of
from privatelora.platform.settings import Settings
from privatelora.protocol.errors import ConfigurationError
from privatelora.protocol.local import token_path
from privatelora.protocol.placement import NAMES, Placement

log = structlog.get_logger("privatelora.platform")

LOCAL_USER = "local"  # owner of the embedded service's one token


@dataclass(frozen=True)
class Ready:
    """A service that accepts connections."""

    url: str
    token_file: Path
    model: str
    layers: int
    dtype: str
    default_placement: str


def serve(settings: Settings, progress: Callable[[str], None], ready: Callable[[Ready], None]) -> None:
    """Run a service until SIGINT or SIGTERM; both end it cleanly.

    Raises `ConfigurationError` for a port in use, an address that is not this machine's, or a placement that does not
    fit the model; and what loading the model raises.
    """
    with _stopped_by_signals(), _listening(settings.host, settings.port) as listener:
        token_file = token_path(settings.data_dir)
        admission = TokenAdmission({local_token(token_file): LOCAL_USER})
        backbone = Backbone.load(
            source_of(settings.model),
            settings.data_dir,
            getattr(torch, settings.dtype),
            settings.device,
            progress,
        )
        depth = backbone.config.num_layers
        plane = DataPlane(backbone, admission, _data_plane_settings(settings, depth))
        tls = (str(settings.certfile), str(settings.keyfile)) if settings.certfile else (None, None)
        running = server(plane, settings.host, settings.port, *tls)
        address = Ready(
            url=_url("https" if settings.certfile else "http", settings.host, listener),
            token_file=token_file,
            model=backbone.model_info.name,
            layers=depth,
            dtype=settings.dtype,
            default_placement=plane.settings.default_placement,
        )
        with asyncio.Runner(loop_factory=running.config.get_loop_factory()) as runner:
            runner.run(_run(running, listener, lambda: ready(address)))


async def _run(running: uvicorn.Server, listener: socket.socket, ready: Callable[[], None]) -> None:
    serving = asyncio.create_task(running.serve(sockets=[listener]))
    while not running.started and not serving.done():  # noqa: ASYNC110 (uvicorn has no other sign of its start)
        await asyncio.sleep(0.01)
    if running.started:
        ready()
    await serving


class _Stop(Exception):
    """SIGINT or SIGTERM came."""


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """End the block quietly at SIGINT or SIGTERM.

    While uvicorn serves it handles both itself, waits for open connections, and then raises the signal again, which
    ends up here as it does while the model loads.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stop

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except _Stop:
        log.info("stopped")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket, closed in the end; what connects to it is answered once uvicorn has it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()  # binding alone would not keep another process from the same port
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host}:{port} ({error.strerror or error}); stop what uses it, or choose another "
                "with --port (0 takes a free one) or --host"
            ) from None
        yield listener


def _url(scheme: str, host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _data_plane_settings(settings: Settings, depth: int) -> DataPlaneSettings:
    """Placements by the names that the data plane compares, checked against the model's depth."""
    allowed = []
    for text in settings.placements:
        try:
            allowed.append(text if text == "custom" else Placement.parse(text, depth).describe(depth))
        except ConfigurationError:
            if text not in NAMES:
                raise
            log.info("placement not offered", placement=text, layers=depth)  # a name that a shallow model cannot have
    return DataPlaneSettings(
        placements=tuple(allowed),
        default_placement=Placement.parse(settings.default_placement, depth).describe(depth),
        max_sessions=settings.max_sessions,
        max_waiting=settings.max_waiting,
        memory_bytes=settings.memory_mb << 20 if settings.memory_mb is not None else None,
        kept_layers=settings.kept_layers,
        park_after_s=settings.park_after_s,
        idle_timeout_s=settings.idle_timeout_s,
        drain_s=settings.drain_s,
        torch_threads=settings.torch_threads,
        busy_poll_ms=settings.busy_poll_ms,
    )

"""A backbone in this process: loads the frozen model, opens its port and serves the data plane until it is stopped.

    Settings -> socket -> Backbone (published model, adapter sets) -> DataPlane -> uvicorn
                          Gate (database, Valkey) ------------------^    where there is a control plane

`serve` is what `privatelora backbone` runs, alone or as one of the processes of `privatelora up`; `ready` is told the
address once connections are answered. Alone it knows one token, which it keeps in a file; with a control plane the
database says who may connect. The port is taken before the model is loaded, so that one in use is reported at once, and
a device that comes while the model loads waits instead of being refused.
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
from privatelora.cloud.endpoint import DrainingServer, server
from privatelora.cloud.plane import DataPlane, DataPlaneSettings
from privatelora.platform import valkey
from privatelora.platform.database import Database
from privatelora.platform.gate import Gate
from privatelora.platform.models import source_of
from privatelora.platform.net import listening, url_of
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
    token_file: Path | None  # None where the control plane knows the keys
    model: str
    layers: int
    dtype: str
    default_placement: str


def serve(settings: Settings, progress: Callable[[str], None], ready: Callable[[Ready], None]) -> None:
    """Run a service until SIGINT or SIGTERM; both end it cleanly.

    Raises `ConfigurationError` for a port in use, an address that is not this machine's, or a placement that does not
    fit the model; and what loading the model raises.
    """
    with _stopped_by_signals(), listening(settings.host, settings.port) as listener:
        gate = _gate(settings)
        token_file = token_path(settings.data_dir) if gate is None else None
        backbone = Backbone.load(
            source_of(settings.model),
            settings.data_dir,
            getattr(torch, settings.dtype),
            settings.device,
            progress,
        )
        depth = backbone.config.num_layers
        plane_settings = _data_plane_settings(settings, depth)
        if gate is not None:
            plane = DataPlane(backbone, gate, plane_settings, gate)
        else:
            plane = DataPlane(backbone, TokenAdmission(_local_tokens(settings)), plane_settings)
        tls = (str(settings.certfile), str(settings.keyfile)) if settings.certfile else (None, None)
        running = server(plane, settings.host, settings.port, *tls)
        address = Ready(
            url=url_of(settings.certfile is not None, settings.host, listener),
            token_file=token_file,
            model=backbone.model_info.name,
            layers=depth,
            dtype=settings.dtype,
            default_placement=plane.settings.default_placement,
        )
        with asyncio.Runner(loop_factory=running.config.get_loop_factory()) as runner:
            if gate is None:
                runner.run(_run(running, listener, lambda: ready(address)))
            else:
                public = (settings.public_url or address.url).rstrip("/")
                runner.run(_run_with(gate, public, running, listener, lambda: ready(address)))


def _local_tokens(settings: Settings) -> dict[str, str]:
    return {local_token(token_path(settings.data_dir)): LOCAL_USER}


def _gate(settings: Settings) -> Gate | None:
    """The control plane's end here, if there is a control plane; raises `ConfigurationError` if it is not reached."""
    if settings.database_url is None or settings.valkey_url is None:
        return None
    database = Database(settings.database_url)
    database.check()
    client = valkey.connect(settings.valkey_url)
    valkey.check(client, settings.valkey_url)
    return Gate(database, client, settings)


async def _run(running: uvicorn.Server, listener: socket.socket, ready: Callable[[], None]) -> None:
    serving = asyncio.create_task(running.serve(sockets=[listener]))
    while not running.started and not serving.done():  # noqa: ASYNC110 (uvicorn has no other sign of its start)
        await asyncio.sleep(0.01)
    if running.started:
        ready()
    await serving


async def _run_with(
    gate: Gate, url: str, running: DrainingServer, listener: socket.socket, ready: Callable[[], None]
) -> None:
    """`_run` beside the gate, whose last words come when the last session has ended; one that fails ends the server."""
    await gate.enter(running.plane, url)
    beside = asyncio.create_task(gate.run())
    beside.add_done_callback(lambda task: setattr(running, "should_exit", True))
    try:
        await _run(running, listener, ready)
    finally:
        if not beside.done():
            beside.cancel()
        (failure,) = await asyncio.gather(beside, return_exceptions=True)
        await gate.leave()
    if isinstance(failure, Exception):
        raise failure


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

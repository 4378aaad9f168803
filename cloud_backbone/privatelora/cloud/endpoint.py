"""The data plane over HTTP: what a service announces, what devices download, and the WebSocket that they compute over.

    GET  /v1/info            ServiceInfo (JSON)
    GET  /v1/blobs/{sha256}  model parts, tokenizer files and adapter sets, with ranges
    WS   /v1/sessions        OPEN, then the exchanges of `session.py`; one session a connection
    GET  /healthz            200 while the process serves

`create_app` builds the FastAPI app around a backbone; `serve` runs it on uvicorn. Everything but /healthz needs a
bearer token. An error is answered as `ErrorInfo` and ends that connection only.
"""

from __future__ import annotations

import asyncio
import secrets
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
import structlog
import uvicorn
from fastapi import Depends, FastAPI, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import FileResponse

from privatelora.cloud.admission import Admission, Principal, Quota, Unmetered
from privatelora.cloud.backbone import Backbone
from privatelora.cloud.engine import Engine, Waker
from privatelora.cloud.guards import HANDSHAKE_TIMEOUT_S, GuardedHttp, GuardedWebSocket
from privatelora.cloud.session import Session, Work
from privatelora.protocol.errors import (
    AdmissionError,
    AuthenticationError,
    ConfigurationError,
    ConnectionLostError,
    PrivateLoraError,
    ProtocolError,
    ServiceError,
)
from privatelora.protocol.frames import HEADER, VERSION, Frame, Kind
from privatelora.protocol.messages import (
    BLOB_PATH,
    DATA_PLANE_PATH,
    INFO_PATH,
    ErrorInfo,
    Limits,
    Opened,
    OpenRequest,
    ServiceInfo,
    control_frame,
    parse,
)
from privatelora.protocol.placement import NAMES, Placement

log = structlog.get_logger("privatelora.cloud")

WAITING_CONNECTIONS = 64  # that have no session yet, besides those that have one
STATUS_OF = {AuthenticationError.code: 401, AdmissionError.code: 429, ServiceError.code: 500}


def authenticate(request: Request) -> Principal:
    """FastAPI dependency: the owner of the request's bearer token; raises `AuthenticationError`."""
    plane: DataPlane = request.app.state.plane
    return plane.admission.authenticate(_bearer(request.headers.get("authorization")))


Owner = Annotated[Principal, Depends(authenticate)]


@dataclass(frozen=True)
class DataPlaneSettings:
    """What one backbone process allows."""

    placements: tuple[str, ...] = (*NAMES, "custom")
    default_placement: str = "paper"
    max_sessions: int = 64
    max_tokens_per_step: int = 8192
    max_sequences: int = 64
    max_streams: int = 16
    idle_timeout_s: float = 600.0
    torch_threads: int | None = None
    busy_poll_ms: float = 1.0


@dataclass
class DataPlane:
    """Everything that connections share."""

    backbone: Backbone
    admission: Admission
    settings: DataPlaneSettings
    quota: Quota = field(default_factory=Unmetered)
    sessions: dict[int, Session] = field(default_factory=dict)
    connections: int = 0

    def __post_init__(self) -> None:
        self.limits = message_limits(self.backbone, self.settings)
        self.engine = Engine(self.settings.torch_threads)
        self.waker = Waker(self.settings.busy_poll_ms / 1e3, lambda: self.engine.busy)

    @property
    def info(self) -> ServiceInfo:
        return ServiceInfo(
            protocol_version=VERSION,
            data_plane=DATA_PLANE_PATH,
            model=self.backbone.model_info,
            sets=self.backbone.set_infos(),
            default_sets=self.backbone.default_sets,
            placements=list(self.settings.placements),
            default_placement=self.settings.default_placement,
            limits=self.limits,
        )

    def open(self, principal: Principal, request: OpenRequest) -> Session:
        """Admit a session; raises what makes it impossible."""
        self.check_room(len(self.sessions), self.settings.max_sessions)
        self._check_placement(request.placement)
        session = Session(secrets.randbits(63) | 1, principal.user, request, self.backbone, self.limits)
        self.sessions[session.id] = session
        return session

    def check_room(self, used: int, room: int) -> None:
        """Raise `AdmissionError` if as many sessions, or connections that may become one, are open as may be."""
        if used >= room:
            raise AdmissionError(
                f"all {self.settings.max_sessions} sessions of this service are in use; try again later",
                retry_after_s=5.0,
            )

    def _check_placement(self, placement: Placement) -> None:
        allowed = self.settings.placements
        name = placement.check(self.backbone.config.num_layers).describe(self.backbone.config.num_layers)
        if "custom" not in allowed and name not in allowed:
            raise ConfigurationError(f"placement {name} is not allowed here; use one of {', '.join(allowed)}")


def message_limits(backbone: Backbone, settings: DataPlaneSettings) -> Limits:
    """Limits to announce; the longest message is a step of the most tokens in float32, at the set's largest ranks."""
    widest = max(backbone.config.hidden_size, *(3 * max(s.max_rank_down, s.max_rank_up) for s in backbone.set_infos()))
    tables = 4 * settings.max_tokens_per_step + 12 * settings.max_sequences
    return Limits(
        max_tokens_per_step=settings.max_tokens_per_step,
        max_sequences=settings.max_sequences,
        max_streams=settings.max_streams,
        max_message_bytes=HEADER.size + tables + 4 * settings.max_tokens_per_step * widest,
        idle_timeout_s=settings.idle_timeout_s,
    )


def create_app(plane: DataPlane) -> FastAPI:
    """The ASGI app of one backbone process."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        plane.engine.close()

    app = FastAPI(title="privatelora data plane", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.plane = plane

    @app.exception_handler(PrivateLoraError)
    async def refused(request: Request, error: PrivateLoraError) -> Response:
        return _error_response(error)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(INFO_PATH)
    async def info(owner: Owner) -> Response:
        return Response(msgspec.json.encode(plane.info), media_type="application/json")

    @app.get(BLOB_PATH + "/{sha256}")
    async def blob(sha256: str, owner: Owner) -> FileResponse:
        path = plane.backbone.blob_path(sha256)
        if path is None:
            raise ConfigurationError(f"no file with hash {sha256[:64]!r} is published here; read {INFO_PATH} again")
        return FileResponse(path, media_type="application/octet-stream", headers={"ETag": f'"{sha256}"'})

    @app.websocket(DATA_PLANE_PATH)
    async def sessions(websocket: WebSocket) -> None:
        try:
            owner = plane.admission.authenticate(_bearer(websocket.headers.get("authorization")))
            plane.check_room(plane.connections, plane.settings.max_sessions + WAITING_CONNECTIONS)
        except PrivateLoraError as error:
            refusal = _error_response(error)
            for name in ("content-length", "content-type"):  # uvicorn sends its own as well; two are no valid answer
                del refusal.headers[name]
            await websocket.send_denial_response(refusal)
            return
        plane.connections += 1
        try:
            await websocket.accept()
            await Connection(plane, websocket, owner).run()
        finally:
            plane.connections -= 1

    return app


class Connection:
    """One WebSocket and the session on it: reads frames, hands their work to the engine, sends what comes back."""

    def __init__(self, plane: DataPlane, websocket: WebSocket, owner: Principal) -> None:
        self.plane, self.websocket, self.owner = plane, websocket, owner
        self.session: Session | None = None
        self._working: set[asyncio.Task[None]] = set()
        self._answered_at = 0.0  # time.perf_counter of the last short unit's end
        self._prompt = False  # whether the device answered it within the waker's window
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Serve until the device leaves, breaks a rule or falls silent."""
        reader = asyncio.create_task(self._read())
        try:
            await asyncio.wait({reader, self._failed}, return_when=asyncio.FIRST_COMPLETED)
            error = self._failed.exception() if self._failed.done() else reader.exception()
            if error is not None:
                await self._refuse(error)
        finally:
            await self._end(reader)

    async def _read(self) -> None:
        request = await self._receive(HANDSHAKE_TIMEOUT_S)
        if request is None:
            return
        if request.kind is not Kind.OPEN:
            raise ProtocolError(f"the first frame is {request.kind.name}; send OPEN first")
        session = self.session = self.plane.open(self.owner, parse(request.payload, OpenRequest))
        log.info("session opened", session=session.id, user=session.user)
        await self._send(control_frame(Kind.OPENED, Opened(session=session.id)))
        while (frame := await self._receive(self.plane.settings.idle_timeout_s)) is not None:
            if frame.kind is Kind.CLOSE:
                return
            self._prompt = time.perf_counter() - self._answered_at < self.plane.waker.window_s
            self.plane.quota.spend(self.owner, frame.payload_bytes, 0)
            work = session.accept(frame)
            if work is None:
                continue
            if self.plane.engine.is_short(work.rows):
                await self._answer(work)
            else:  # other streams' frames are read meanwhile
                task = asyncio.create_task(self._answer(work))
                self._working.add(task)
                task.add_done_callback(self._finished)
                await self._room()

    async def _answer(self, work: Work) -> None:
        engine = self.plane.engine
        frame = await engine.run(work.run, work.rows)
        if frame is None:
            return
        self.plane.quota.spend(self.owner, 0, frame.payload_bytes)
        if not work.waits():
            await self._send(frame)
        elif engine.is_short(work.rows):
            await self._send(frame)
            await asyncio.sleep(0)  # what was sent is written when the loop turns
            work.ahead()
            if self._prompt:
                self.plane.waker.expect()
            self._answered_at = time.perf_counter()
        else:
            ahead = asyncio.create_task(engine.run(work.ahead, work.rows))
            try:
                await self._send(frame)
            except BaseException:
                ahead.cancel()
                raise
            await ahead

    async def _room(self) -> None:
        """Wait while as many answers are under way as there may be streams: who does not take them is not read."""
        try:
            async with asyncio.timeout(self.plane.settings.idle_timeout_s):
                while len(self._working) >= self.plane.settings.max_streams:
                    await asyncio.wait(self._working, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise ConnectionLostError("the answers were not taken; connect again and read them") from None

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._working.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._failed.done():
            self._failed.set_exception(error)

    async def _receive(self, timeout_s: float) -> Frame | None:
        """The next frame; None when the device closed the connection."""
        try:
            async with asyncio.timeout(timeout_s):
                message = await self.websocket.receive()
        except TimeoutError:
            raise ConnectionLostError(f"nothing came for {timeout_s:g} s; connect again when there is work") from None
        if message["type"] == "websocket.disconnect":
            return None
        data = message.get("bytes")
        if data is None:
            raise ProtocolError("a text message came; every message of this protocol is binary")
        return Frame.unpack(data)

    async def _send(self, frame: Frame) -> None:
        await self.websocket.send_bytes(frame.pack())

    async def _refuse(self, error: BaseException) -> None:
        """Tell the device why its session ends, if it still listens."""
        session_id = self.session.id if self.session else 0
        if isinstance(error, WebSocketDisconnect):
            return
        if not isinstance(error, PrivateLoraError):
            log.error("session failed", session=session_id, error=type(error).__name__, exc_info=error)
            error = ServiceError("the service failed at this step; connect again, and tell the operator if it recurs")
        log.info("session refused", session=session_id, code=error.code)
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                await self._send(control_frame(Kind.ERROR, ErrorInfo.of(error), session_id))
                await self.websocket.close(1008, error.code)
        except (WebSocketDisconnect, RuntimeError, TimeoutError) as failure:
            log.info("device left before it was told", session=session_id, reason=type(failure).__name__)

    async def _end(self, reader: asyncio.Task[None]) -> None:
        if self.session is not None:
            self.session.close()
            self.plane.sessions.pop(self.session.id, None)
            log.info("session closed", session=self.session.id, tokens=self.session.tokens)
        tasks = {reader, *self._working}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._failed.cancel()


def server(
    plane: DataPlane, host: str, port: int, certfile: str | None = None, keyfile: str | None = None
) -> uvicorn.Server:
    """A uvicorn server for `plane`; TLS if a certificate is given."""
    try:
        config = uvicorn.Config(
            create_app(plane),
            host=host,
            port=port,
            http=GuardedHttp,
            ws=GuardedWebSocket,
            ws_max_size=plane.limits.max_message_bytes,
            ws_per_message_deflate=False,
            ws_ping_interval=None,  # a device computes for longer than a ping waits; the idle timeout ends dead ones
            loop="uvloop",
            log_config=None,
            access_log=False,
            limit_concurrency=4 * plane.settings.max_sessions + 64,
            timeout_graceful_shutdown=5,
            ssl_certfile=certfile,
            ssl_keyfile=keyfile,
        )
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"TLS certificate {certfile!r} cannot be used ({error}); check both PEM files"
        ) from None
    return uvicorn.Server(config)


def _bearer(authorization: str | None) -> str | None:
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token else None


def _error_response(error: PrivateLoraError) -> Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = f"{error.retry_after_s:.0f}"
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = "Bearer"
    body = msgspec.json.encode(ErrorInfo.of(error))
    return Response(body, STATUS_OF.get(error.code, 400), headers, media_type="application/json")

"""The data plane over HTTP: what a service announces, what devices download, and the WebSocket that they compute over.

    GET  /v1/info            ServiceInfo (JSON)
    GET  /v1/blobs/{sha256}  model parts, tokenizer files and adapter sets, with ranges
    WS   /v1/sessions        OPEN, then the exchanges of `session.py`; one session a connection
    GET  /metrics            what the process does, in Prometheus' text format
    GET  /healthz            200 while the process serves

`create_app` builds the FastAPI app around a `DataPlane`; `server` runs it on uvicorn, and drains it before it stops.
Everything but /healthz needs a bearer token. An error is answered as `ErrorInfo` and ends that connection only.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType
from typing import Annotated, Any

import msgspec
import structlog
import uvicorn
from fastapi import Depends, FastAPI, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.requests import HTTPConnection
from fastapi.responses import FileResponse

from privatelora.cloud.admission import Principal
from privatelora.cloud.guards import HANDSHAKE_TIMEOUT_S, SOCKET, GuardedHttp, GuardedWebSocket
from privatelora.cloud.plane import DataPlane
from privatelora.cloud.session import Session
from privatelora.protocol.errors import (
    AdmissionError,
    AuthenticationError,
    ConfigurationError,
    ConnectionLostError,
    PrivateLoraError,
    ProtocolError,
    QuotaError,
    ServiceError,
)
from privatelora.protocol.frames import HEADER, KIND_AT, Frame, Kind
from privatelora.protocol.messages import (
    BLOB_PATH,
    DATA_PLANE_PATH,
    INFO_PATH,
    ErrorInfo,
    Opened,
    OpenRequest,
    Queued,
    control_frame,
    parse,
)

log = structlog.get_logger("privatelora.cloud")

IDLE_LOOK_S = 0.5  # until the next look at a device that is silent because it waits for the service
WAITING_CONNECTIONS = 64  # that have no session yet, besides those that have one
STATUS_OF = {
    AuthenticationError.code: 401,
    AdmissionError.code: 429,
    QuotaError.code: 429,
    ServiceError.code: 500,
}


async def authenticate(connection: HTTPConnection) -> Principal:
    """FastAPI dependency: the owner of the request's bearer token; raises `AuthenticationError`."""
    plane: DataPlane = connection.app.state.plane
    address = connection.client.host if connection.client else ""
    return await plane.admission.authenticate(_bearer(connection.headers.get("authorization")), address)


Owner = Annotated[Principal, Depends(authenticate)]


def observer(owner: Owner) -> Principal:
    """FastAPI dependency: an owner who may read what the whole process does; raises `AuthenticationError`."""
    if not owner.observes:
        raise AuthenticationError("this key sees what is its own; ask the operator for a key that may read metrics")
    return owner


def create_app(plane: DataPlane) -> FastAPI:
    """The ASGI app of one backbone process."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        house = asyncio.create_task(plane.keep_house())
        yield
        house.cancel()
        await asyncio.gather(house, return_exceptions=True)
        plane.engine.close()

    app = FastAPI(title="privatelora data plane", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.plane = plane

    @app.exception_handler(PrivateLoraError)
    async def refused(request: Request, error: PrivateLoraError) -> Response:
        return _error_response(error)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics(owner: Annotated[Principal, Depends(observer)]) -> Response:
        return Response(plane.metrics.prometheus_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

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
            owner = await authenticate(websocket)
            plane.check_serving()
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
    """One WebSocket and the session on it, from OPEN to whatever ends it."""

    def __init__(self, plane: DataPlane, websocket: WebSocket, owner: Principal) -> None:
        self.plane, self.websocket, self.owner = plane, websocket, owner
        self.socket: GuardedWebSocket = websocket.scope[SOCKET]
        self.write = self.socket.write
        self.session: Session | None = None
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reason = "left"  # why the session ends: without a word, unless something is said

    async def run(self) -> None:
        """Serve until the device leaves, breaks a rule or falls silent."""
        try:
            await self._serve()
        except Exception as error:  # noqa: BLE001 (whatever it was ends this session only, and is told and logged)
            if not isinstance(error, WebSocketDisconnect):
                self._reason = error.code if isinstance(error, PrivateLoraError) else ServiceError.code
            await self._refuse(error)
        finally:
            self._end()

    def fail(self, error: BaseException) -> None:
        """End the session with an error."""
        if not self._over.done():
            self._over.set_exception(error)

    def tell_place(self, place: int, waiting: int) -> None:
        """QUEUED: there is no room for a session yet."""
        self.socket.write(control_frame(Kind.QUEUED, Queued(place=place, waiting=waiting)).pack(), b"")

    async def _serve(self) -> None:
        request = await self._first_frame()
        if request is None:
            return
        if request.kind is not Kind.OPEN:
            raise ProtocolError(f"the first frame is {request.kind.name}; send OPEN first")
        # ASGI has only the end of the connection from here on: the socket gives every message to the session
        left = asyncio.create_task(self.websocket.receive())
        self.socket.attach(self._receive, self.plane.settings.max_streams, self.plane.sockets)
        serving = asyncio.create_task(self._session(parse(request.payload, OpenRequest)))
        try:
            waited: set[asyncio.Future[Any]] = {left, serving, self._over}
            ended, _ = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            for one in (left, serving, self._over):
                if one in ended:
                    one.result()
            if left in ended and left.result().get("text") is not None:
                raise ProtocolError("a text message came; every message of this protocol is binary")
        finally:
            left.cancel()
            serving.cancel()
            await asyncio.gather(left, serving, return_exceptions=True)

    async def _session(self, request: OpenRequest) -> None:
        """Open a session, and raise `ConnectionLostError` once its device was silent for too long."""
        session = self.session = await self.plane.admit(self, request)
        log.info("session opened", session=session.id, user=session.user)
        self.socket.write(control_frame(Kind.OPENED, Opened(session=session.id)).pack(), b"")
        limit = self.plane.settings.idle_timeout_s
        while (silent := time.perf_counter() - session.heard_at) < limit or not session.awaits_device:  # noqa: ASYNC110 (frames are no event)
            await asyncio.sleep(max(limit - silent, IDLE_LOOK_S))
        if not self.socket.writable.is_set():
            raise ConnectionLostError("the answers were not taken; connect again and read them")
        raise ConnectionLostError(f"nothing came for {limit:g} s; connect again when there is work")

    async def _first_frame(self) -> Frame | None:
        """The first frame; None when the device closed the connection."""
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                message = await self.websocket.receive()
        except TimeoutError:
            raise ConnectionLostError(
                f"nothing came for {HANDSHAKE_TIMEOUT_S:g} s; connect again when there is work"
            ) from None
        if message["type"] == "websocket.disconnect":
            return None
        data = message.get("bytes")
        if data is None:
            raise ProtocolError("a text message came; every message of this protocol is binary")
        return Frame.unpack(data)

    def _receive(self, data: bytes) -> None:
        """One message, straight from the socket."""
        if self._over.done():
            return
        try:
            if len(data) == HEADER.size and data[KIND_AT] == Kind.CLOSE:
                self._reason = "closed"
                self._over.set_result(None)
            elif self.session is None:
                raise ProtocolError("a frame came before OPENED was sent; wait for it")
            else:
                self.session.receive(data)
        except Exception as error:  # noqa: BLE001 (told and logged by `run`)
            self.fail(error)

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
                await self.websocket.send_bytes(control_frame(Kind.ERROR, ErrorInfo.of(error), session_id).pack())
                await self.websocket.close(1008, error.code)
        except (WebSocketDisconnect, RuntimeError, TimeoutError) as failure:
            log.info("device left before it was told", session=session_id, reason=type(failure).__name__)

    def _end(self) -> None:
        self._over.cancel()
        if self.session is not None:
            self.plane.close(self.session, self._reason)
            log.info(
                "session closed", session=self.session.id, tokens=self.session.tokens, reason=self.session.end_reason
            )


class DrainingServer(uvicorn.Server):
    """uvicorn, which lets the data plane finish what runs before it closes the sockets."""

    def __init__(self, config: uvicorn.Config, plane: DataPlane) -> None:
        super().__init__(config)
        self.plane = plane

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGTERM:  # uvicorn would raise it again in the end: no exit with 0 for a drained process
            self.should_exit = True
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self.plane.drain()
        await super().shutdown(sockets)


def server(
    plane: DataPlane, host: str, port: int, certfile: str | None = None, keyfile: str | None = None
) -> DrainingServer:
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
    return DrainingServer(config, plane)


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

"""The outermost layer of the API, before any route: ids and log lines of requests, limits of bodies, security headers.

    uvicorn -> Edge -> FastAPI's routes
                 X-Request-ID, body of at most 1 MiB as JSON, a log line and a count for each answer

Whatever goes wrong further in ends here as a problem, so that no client sees a traceback or an empty answer.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from email.message import Message as Header

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from ulid import ULID

from privatelora.platform.api.counts import HttpCounts
from privatelora.platform.api.problems import (
    Refusal,
    TooLarge,
    TooSlow,
    WrongMedia,
    refusal_of,
    render,
)
from privatelora.protocol.messages import INFO_PATH

MAX_BODY_BYTES = 1 << 20
BODY_S = 10.0  # for a request's body to arrive
WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,40}")

log = structlog.get_logger("privatelora.api")


class Edge:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, counts: HttpCounts) -> None:
        self.app, self.counts = app, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = Headers(scope=scope)
        state = scope.setdefault("state", {})
        state["request_id"] = _request_id(headers)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request=state["request_id"])
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(MutableHeaders(scope=message), state)
            await send(message)

        try:
            if scope["method"] in WITH_BODY:
                receive = await _whole_body(headers, receive)
            await self.app(scope, receive, answer)
        except Exception as error:  # noqa: BLE001 (whatever it was is told and logged, and ends this request only)
            refusal = refusal_of(error)
            if not status:
                await render(refusal, for_device=scope["path"] == INFO_PATH)(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "unmatched")
            self.counts.count(scope["method"], route, status, seconds)
            log.info(
                "request",
                method=scope["method"][:16],
                route=route,
                status=status,
                ms=round(1000 * seconds, 1),
                user=state.get("user"),
                key=state.get("key"),
            )


def _request_id(headers: Headers) -> str:
    """The client's own id of this request if it is sane, else a new one."""
    told = headers.get("x-request-id", "")
    return told if _SANE_ID.fullmatch(told) else str(ULID())


def _add_headers(headers: MutableHeaders, state: Mapping[str, object]) -> None:
    headers["X-Request-ID"] = str(state["request_id"])
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Cache-Control"] = "no-store"
    for name, value in dict(state.get("allowance") or {}).items():  # type: ignore[call-overload]  # set by `auth`
        headers.setdefault(name, value)


async def _whole_body(headers: Headers, receive: Receive) -> Receive:
    """The request's body, read and checked; what comes after it is the client's leaving."""
    too_large = TooLarge(f"a body has at most {MAX_BODY_BYTES} bytes")
    length = headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 9 or int(length) > MAX_BODY_BYTES):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                body += message.get("body", b"")
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    break
    except TimeoutError:
        raise TooSlow(f"the body did not arrive within {BODY_S:g} s; send it again") from None
    if body:
        _check_media(headers)
    waiting: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


def _check_media(headers: Headers) -> None:
    media = Header()
    media["content-type"] = headers.get("content-type", "")
    charset = media.get_param("charset", "utf-8")
    if "content-type" not in headers or media.get_content_type() != "application/json":
        raise WrongMedia("a body is JSON; send it with Content-Type: application/json")
    if not isinstance(charset, str) or charset.lower() not in ("utf-8", "utf8"):
        raise WrongMedia("JSON is UTF-8 here; send the body in it")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise WrongMedia("a body is sent as it is, without Content-Encoding")


__all__ = ["MAX_BODY_BYTES", "Edge", "Refusal"]

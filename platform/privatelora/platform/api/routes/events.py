"""/api/v1/events: what happens, as it happens, as server-sent events; users hear of what is theirs.

A client that comes back with Last-Event-ID gets what it missed, as far as Valkey has kept it. The key is looked at
again all the while: one that is revoked hears no more.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated

import structlog
from fastapi import APIRouter, Header
from fastapi.concurrency import run_in_threadpool
from redis import asyncio as aioredis
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response, StreamingResponse

from privatelora.platform import keys
from privatelora.platform.api.auth import AnyCall, Call
from privatelora.platform.api.problems import TooMany
from privatelora.platform.events import STREAM, read_event
from privatelora.platform.keys import Caller
from privatelora.platform.valkey import TIMEOUT_S
from privatelora.protocol.errors import AuthenticationError

router = APIRouter(prefix="/api/v1/events", tags=["events"])
log = structlog.get_logger("privatelora.api")

BLOCK_MS = 1000  # of one look; the key is looked at again after each
QUIET_LOOKS = 15  # without an event, after which a comment says that the stream lives
MOST_STREAMS = 200  # of one process
BATCH = 100

MOST_OF_A_USER = 20

_open: dict[int, str] = {}  # streams that are open, and whose they are
LastEventId = Annotated[
    str | None,
    Header(alias="Last-Event-ID", pattern=r"^[0-9]{1,15}-[0-9]{1,15}$", description="Go on after this event."),
]


@router.get(
    "",
    response_class=Response,
    responses={
        200: {
            "description": "Events, one after another, without end.",
            "content": {
                "text/event-stream": {
                    "schema": {"type": "string"},
                    "example": 'id: 1795694400000-0\nevent: session.opened\ndata: {"session": "ses_…"}\n\n',
                }
            },
        }
    },
    summary="Events as they happen",
)
async def stream_events(call: AnyCall, last_event_id: LastEventId = None) -> Response:
    """session.opened, session.closed, job.<state>, quota.soft_limit, quota.spent, key.revoked, user.disabled."""
    if len(_open) >= MOST_STREAMS:
        raise TooMany(f"{MOST_STREAMS} streams are open already; try again later", retry_after_s=5.0)
    if list(_open.values()).count(call.caller.user) >= MOST_OF_A_USER:
        raise TooMany(f"{MOST_OF_A_USER} streams of this user are open already; close one", retry_after_s=5.0)
    client = aioredis.Redis.from_url(
        str(call.services.settings.valkey_url),
        socket_timeout=TIMEOUT_S + BLOCK_MS / 1000,
        socket_connect_timeout=TIMEOUT_S,
    )
    try:
        newest = await client.xrevrange(STREAM, count=1)  # asked before the answer begins: it is 503 if Valkey is away
    except RedisError:
        await client.aclose()
        raise
    after = last_event_id or (newest[0][0].decode() if newest else "0-0")
    return StreamingResponse(_events(call, client, after), media_type="text/event-stream")


async def _events(call: Call, client: aioredis.Redis, after: str) -> AsyncIterator[str]:
    _open[id(client)] = call.caller.user
    quiet = 0
    caller: Caller | None = call.caller
    try:
        yield ": privatelora\n\n"
        while not call.services.offers.closed and (caller := await _as_now(call, caller)):
            found = await client.xread({STREAM: after}, count=BATCH, block=BLOCK_MS)
            quiet += 1
            for _, entries in found or ():
                for entry_id, fields in entries:
                    after = entry_id.decode()
                    event = read_event(fields)
                    if caller.sees_all or event.user == caller.user:
                        quiet = 0
                        yield f"id: {after}\nevent: {event.kind}\ndata: {json.dumps(dict(event.data))}\n\n"
            if quiet >= QUIET_LOOKS:
                quiet = 0
                yield ": nothing new\n\n"
    except RedisError as error:  # the client comes back by itself, with the last id
        log.warning("events broken off", reason=type(error).__name__)
    finally:
        _open.pop(id(client), None)
        await client.aclose()


async def _as_now(call: Call, before: Caller | None) -> Caller | None:
    """Who listens, as they are now; None once their key is no longer good."""

    def look() -> Caller:
        with call.services.database.read() as session:
            return keys.holder(session, call.caller.key)

    try:
        return await run_in_threadpool(look)
    except AuthenticationError:
        return None
    except SQLAlchemyError:  # nobody is sent away because the database is
        return before

"""`Idempotency-Key`: a POST that is sent again gets the first one's answer, and changes nothing again.

    none yet                  a row says that it is under way, the change is made, row and change are committed together
    answered, same request    the same answer, with `Idempotency-Replayed: true`
    answered, another request 422
    under way                 409

A request that was refused frees its key. Nothing secret is stored: a route says what is kept of its answer. After
the client of IETF's draft-ietf-httpapi-idempotency-key-header.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

from fastapi import Depends, Header, Request
from pydantic import BaseModel
from sqlalchemy import delete, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from starlette.responses import Response

from privatelora.platform import events
from privatelora.platform.api.answers import tag_of
from privatelora.platform.api.auth import Call
from privatelora.platform.api.problems import Conflict, Invalid
from privatelora.platform.events import Event
from privatelora.platform.tables import IdempotentRequest, utc_now

GONE_S = 60.0  # after which a request that never ended is taken for lost with its process


@dataclass(frozen=True)
class Once:
    """A POST's idempotency key, if it has one, and what the request is known by."""

    key: str | None
    digest: str


@dataclass(frozen=True)
class Made:
    """What a POST has done.

    stored : the answer as it is kept for a repetition, where that is another one.
    events : to be told once it is committed.
    """

    body: BaseModel
    status: int = 200
    stored: BaseModel | None = None
    events: Sequence[Event] = ()
    then: Callable[[], object] | None = None


async def _once(
    request: Request,
    key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            min_length=1,
            max_length=100,
            pattern=r"^[\x21-\x7e]+$",
            description="Random text; the same POST with the same one is done once and answered the same.",
        ),
    ] = None,
) -> Once:
    told = hashlib.sha256(f"{request.method}\n{request.url.path}\n{request.url.query}\n".encode())
    told.update(await request.body())
    return Once(key, told.hexdigest())


OnceOnly = Annotated[Once, Depends(_once)]


def make(call: Call, once: Once, work: Callable[[Session], Made], location: str | None = None) -> Response:
    """Do `work` in a transaction and answer with what it made; or answer as the same request was answered before.

    location : path under which what was made is found by its id.
    """
    if once.key is None:
        with call.services.database.write() as session:
            made = work(session)
        _tell(call, made)
        return _answer(made.body.model_dump_json(by_alias=True), made.status, location)
    before = _begin(call, once)
    if before is not None:
        return before
    row = (IdempotentRequest.key_id == call.caller.key, IdempotentRequest.idempotency_key == once.key)
    try:
        with call.services.database.write() as session:
            made = work(session)
            kept = (made.stored or made.body).model_dump_json(by_alias=True)
            session.execute(update(IdempotentRequest).where(*row).values(status=made.status, body=kept))
    except BaseException:
        with call.services.database.write() as session:
            session.execute(delete(IdempotentRequest).where(*row))
        raise
    _tell(call, made)
    return _answer(made.body.model_dump_json(by_alias=True), made.status, location)


def _begin(call: Call, once: Once) -> Response | None:
    """Note that the request is under way; the answer, if it has one already."""
    place = (call.caller.key, once.key)
    try:
        with call.services.database.write() as session:
            found = session.get(IdempotentRequest, place, with_for_update=True)
            if found is None:
                session.add(IdempotentRequest(key_id=place[0], idempotency_key=place[1], digest=once.digest))
                return None
            if found.digest != once.digest:
                raise Invalid("header.Idempotency-Key", "was used for another request; make a new one for this")
            if found.status is not None:
                return _answer(found.body or "{}", found.status, None, replayed=True)
            if found.created_at > utc_now() - timedelta(seconds=GONE_S):
                raise _under_way()
            found.created_at = utc_now()
            return None
    except IntegrityError:  # the same request, at the same moment
        raise _under_way() from None


def _under_way() -> Conflict:
    return Conflict("the same request is under way; ask again for its answer", retry_after_s=1.0)


def _tell(call: Call, made: Made) -> None:
    for event in made.events:
        events.emit(call.services.valkey, event)
    if made.then is not None:
        made.then()


def _answer(text: str, status: int, location: str | None, replayed: bool = False) -> Response:
    body: dict[str, Any] = json.loads(text)
    headers = {}
    if isinstance(version := body.get("version"), int):
        headers["ETag"] = f'"{tag_of(text.encode(), version)}"'
    if location is not None and "id" in body:
        headers["Location"] = f"{location}/{body['id']}"
    if replayed:
        headers["Idempotency-Replayed"] = "true"
    return Response(text, status, headers, "application/json")

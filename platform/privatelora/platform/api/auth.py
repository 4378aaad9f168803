"""Who calls: the key of `Authorization: Bearer`, and what its holder may do here.

Routes take a `Call` of the kind that they need, and are not reached by anyone else:

    AnyCall         any valid key
    ChangingCall    one that may change its user's own things: every scope but read-only
    OperatorCall    an operator's with the scope operator
    OverseerCall    an operator's that may look: operator or read-only
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated

import structlog
from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.exc import SQLAlchemyError

from privatelora.platform import keys
from privatelora.platform.api.problems import Forbidden, NotFound
from privatelora.platform.api.services import Services, services_of
from privatelora.platform.audit import Actor
from privatelora.platform.keys import Caller
from privatelora.platform.tables import Scope
from privatelora.protocol.errors import AuthenticationError

bearer = HTTPBearer(
    bearerFormat="plk_…",
    scheme_name="bearer",
    description="An API key; `privatelora admin create-key` or `POST /api/v1/api-keys` make one.",
    auto_error=False,
)
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]

log = structlog.get_logger("privatelora.api")


@dataclass(frozen=True)
class Call:
    """A request of someone who is known."""

    caller: Caller
    actor: Actor
    services: Services

    def scope_user(self, asked: str | None) -> str | None:
        """Whose things a list shows: those of `asked`, of everyone (None), or for a member always their own.

        Raises `Forbidden` when a member asks for someone else's.
        """
        if self.caller.sees_all:
            return asked
        if asked is not None and asked != self.caller.user:
            raise Forbidden("only an operator may list what is another user's; leave user_id out")
        return self.caller.user

    def check_sees(self, owner: str | None, what: str) -> None:
        """Raise `NotFound` unless the caller may look at what is `owner`'s: to others it does not exist."""
        if not self.caller.sees_all and owner != self.caller.user:
            raise not_found(what)

    def check_changes(self, owner: str | None, what: str) -> None:
        """Raise `NotFound` for what the caller may not see, `Forbidden` for what it sees and may not change."""
        self.check_sees(owner, what)
        if not self.caller.operates and owner != self.caller.user:
            raise Forbidden(f"an operator's key of scope operator is needed to change this {what}")


def not_found(what: str) -> NotFound:
    """There is none of this id, or it is someone else's."""
    return NotFound(f"there is no such {what} among what this key may see")


async def authenticated(request: Request, credentials: Bearer) -> Call:
    """The call of whoever holds the request's key; raises `AuthenticationError` or `TooManyError`."""
    services = services_of(request)
    address = request.client.host if request.client else "-"
    text = credentials.credentials if credentials is not None else None
    if not text:
        raise AuthenticationError(
            "an API key is needed: send it as `Authorization: Bearer plk_…`; an operator makes one with "
            "`privatelora admin create-key`"
        )
    digest = keys.digest_of(text)
    services.limits.check_address(address, digest)
    try:
        caller = await run_in_threadpool(_find, services, text)
    except AuthenticationError:
        services.limits.count_wrong(address)
        raise
    services.limits.count_right(address, digest)
    request.state.user, request.state.key = caller.user, caller.key
    structlog.contextvars.bind_contextvars(user=caller.user, key=caller.key)
    request.state.allowance = services.limits.spend(caller.key).headers()
    return Call(caller, Actor(caller.user, caller.key, request.state.request_id, address[:64]), services)


async def _changing(call: Annotated[Call, Depends(authenticated)]) -> Call:
    if call.caller.scope is Scope.READ_ONLY:
        raise Forbidden("this key may only look; use one of scope device or operator")
    return call


async def _operating(call: Annotated[Call, Depends(authenticated)]) -> Call:
    if not call.caller.operates:
        raise Forbidden("an operator's key of scope operator is needed for this")
    return call


async def _overseeing(call: Annotated[Call, Depends(authenticated)]) -> Call:
    if not call.caller.sees_all:
        raise Forbidden("an operator's key of scope operator or read-only is needed for this")
    return call


AnyCall = Annotated[Call, Depends(authenticated)]
ChangingCall = Annotated[Call, Depends(_changing)]
OperatorCall = Annotated[Call, Depends(_operating)]
OverseerCall = Annotated[Call, Depends(_overseeing)]


def _find(services: Services, text: str) -> Caller:
    with services.database.read() as session:
        caller = keys.find(session, text)
    if _touched.due(caller.key):
        try:
            with services.database.write() as session:
                keys.touch(session, caller.key)
        except SQLAlchemyError as error:  # when a key was last used is worth no refusal
            log.warning("a key's use was not noted", reason=type(error).__name__)
    return caller


class _Touched:
    """When this process last noted that a key was used, so that most requests write nothing."""

    def __init__(self, most: int = 10_000) -> None:
        self._at: dict[str, float] = {}
        self._most = most

    def due(self, key_id: str) -> bool:
        now = time.monotonic()
        if now - self._at.get(key_id, -keys.USED_S) < keys.USED_S:
            return False
        if len(self._at) >= self._most:
            self._at.clear()
        self._at[key_id] = now
        return True


_touched = _Touched()

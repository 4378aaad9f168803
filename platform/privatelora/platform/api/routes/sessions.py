"""/api/v1/sessions: devices' sessions, live and past, written by their backbones; and what is asked of a live one.

`drain` and `end` are noted in the session's row; its backbone looks there several times a second and obeys.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.responses import Response

from privatelora.platform import audit
from privatelora.platform.api.answers import IfNoneMatch, answer, one
from privatelora.platform.api.auth import AnyCall, Call, ChangingCall, OperatorCall, not_found
from privatelora.platform.api.fields import BackboneId, DeviceId, KeyId, SessionId, Shown, UserId, When
from privatelora.platform.api.idempotency import Made, OnceOnly, make
from privatelora.platform.api.pages import Page, Paging, fetch
from privatelora.platform.api.problems import Conflict, Invalid
from privatelora.platform.tables import Command, SessionRow, SessionState

router = APIRouter(prefix="/api/v1/sessions", tags=["sessions"])

_ORDERS = {"id": (SessionRow.id,), "opened_at": (SessionRow.opened_at, SessionRow.id)}


class SessionShown(Shown):
    """A device's session."""

    id: SessionId
    number: int = Field(description="What frames and logs call it.", examples=[17])
    user_id: UserId
    key_id: KeyId
    device_id: DeviceId | None
    backbone_id: BackboneId
    placement: str = Field(examples=["paper"])
    state: SessionState
    command: Command | None = Field(description="What was asked of it.", examples=[None])
    bytes_up: int = Field(examples=[1048576])
    bytes_down: int = Field(examples=[524288])
    tokens: int = Field(examples=[512])
    opened_at: When
    closed_at: When | None = Field(examples=[None])
    end_reason: str | None = Field(examples=[None])


class SessionDetails(SessionShown):
    """A session with the layer scheduler's view of it."""

    view: dict[str, Any] = Field(
        description="Its passes: phase, point, and what they wait for; sizes and times only.",
        examples=[{"passes": [{"phase": "decode", "point": 12, "waits_for": "device"}]}],
    )


class SessionQuery(Paging):
    sort: Literal["id", "-id", "opened_at", "-opened_at"] = "-id"
    state: SessionState | None = Field(default=None, description="Sessions in this state.")
    user_id: UserId | None = Field(default=None, description="Sessions of this user.")
    device_id: DeviceId | None = Field(default=None, description="Sessions of this device.")
    backbone_id: BackboneId | None = Field(default=None, description="Sessions on this backbone.")
    key_id: KeyId | None = Field(default=None, description="Sessions opened with this key.")
    opened_from: When | None = Field(default=None, description="Opened then or later.")
    opened_to: When | None = Field(default=None, description="Opened before then.")


@router.get("", response_model=Page[SessionShown], summary="List sessions")
def list_sessions(call: AnyCall, query: Annotated[SessionQuery, Query()]) -> Response:
    """Sessions, live and past: one's own, or everyone's for operators."""
    owner = call.scope_user(query.user_id)
    filters = (
        (SessionRow.user_id, owner),
        (SessionRow.state, query.state),
        (SessionRow.device_id, query.device_id),
        (SessionRow.backbone_id, query.backbone_id),
        (SessionRow.key_id, query.key_id),
    )
    found = select(SessionRow).where(*(column == value for column, value in filters if value is not None))
    if query.opened_from is not None:
        found = found.where(SessionRow.opened_at >= query.opened_from)
    if query.opened_to is not None:
        if query.opened_from is not None and query.opened_to < query.opened_from:
            raise Invalid("query.opened_to", "is before opened_from")
        found = found.where(SessionRow.opened_at < query.opened_to)
    with call.services.database.read() as session:
        rows, following = fetch(session, found, _ORDERS, query)
    return answer(Page(items=[SessionShown.model_validate(row) for row in rows], next=following))


@router.get("/{session_id}", response_model=SessionDetails, summary="One session")
def get_session(call: AnyCall, session_id: SessionId, if_none_match: IfNoneMatch = None) -> Response:
    """A session with the layer scheduler's view of it."""
    with call.services.database.read() as session:
        row = session.get(SessionRow, session_id)
    call.check_sees(row.user_id if row else None, "session")
    if row is None:
        raise not_found("session")
    return one(SessionDetails.model_validate(row), if_none_match)


@router.post("/{session_id}/drain", response_model=SessionShown, summary="Drain a session")
def drain_session(call: OperatorCall, session_id: SessionId, once: OnceOnly) -> Response:
    """Let the session finish its running passes and leave; it begins no new ones."""
    return make(call, once, lambda session: _asked(session, call, session_id, Command.DRAIN))


@router.post("/{session_id}/end", response_model=SessionShown, summary="End a session")
def end_session(call: ChangingCall, session_id: SessionId, once: OnceOnly) -> Response:
    """End a session now: operators any, others their own."""
    return make(call, once, lambda session: _asked(session, call, session_id, Command.END))


def _asked(session: Session, call: Call, session_id: str, command: Command) -> Made:
    row = session.get(SessionRow, session_id, with_for_update=True)
    call.check_changes(row.user_id if row else None, "session")
    if row is None:
        raise not_found("session")
    if row.state == SessionState.CLOSED:
        raise Conflict(f"this session has ended already ({row.end_reason or 'closed'})")
    if row.command != Command.END and row.command != command:  # who is to leave now is not asked to drain
        row.command = command
        audit.record(session, call.actor, f"session.{command}", row.id, user=row.user_id)
        session.flush()
    return Made(SessionShown.model_validate(row))

"""/api/v1/audit-log: who did what, for those that overlook; the database lets nobody change it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field, StringConstraints
from sqlalchemy import select
from starlette.responses import Response

from privatelora.platform.api.answers import answer
from privatelora.platform.api.auth import OverseerCall
from privatelora.platform.api.fields import AnyId, AuditId, Shown, UserId, When
from privatelora.platform.api.pages import Page, Paging, fetch
from privatelora.platform.tables import AuditEntry

router = APIRouter(prefix="/api/v1/audit-log", tags=["audit-log"])

_ORDERS = {"id": (AuditEntry.id,)}


class EntryShown(Shown):
    """Something that was done."""

    id: AuditId
    at: When
    user_id: UserId | None = Field(description="Who; null for the shell and the service itself.")
    key_id: str | None = Field(examples=[None])
    action: str = Field(examples=["user.created"])
    object_id: str | None = Field(examples=["usr_01JDMV5Z3T8Q6W9E2R4Y7H1K0N"])
    details: dict[str, Any] = Field(examples=[{"name": "alice"}])
    request_id: str | None = Field(examples=[None])
    address: str | None = Field(examples=["127.0.0.1"])


class EntryQuery(Paging):
    sort: Literal["id", "-id"] = "-id"
    user_id: UserId | None = Field(default=None, description="What this user did.")
    object_id: AnyId | None = Field(default=None, description="What was done to this object.")
    action: Annotated[str, StringConstraints(pattern="^[a-z_.-]{1,60}$")] | None = Field(
        default=None, description="Such as user.created.", examples=["user.created"]
    )


@router.get("", response_model=Page[EntryShown], summary="Who did what")
def list_entries(call: OverseerCall, query: Annotated[EntryQuery, Query()]) -> Response:
    """Every change that anyone made, the newest first."""
    filters = (
        (AuditEntry.user_id, query.user_id),
        (AuditEntry.object_id, query.object_id),
        (AuditEntry.action, query.action),
    )
    found = select(AuditEntry).where(*(column == value for column, value in filters if value is not None))
    with call.services.database.read() as session:
        rows, following = fetch(session, found, _ORDERS, query)
    return answer(Page(items=[EntryShown.model_validate(row) for row in rows], next=following))

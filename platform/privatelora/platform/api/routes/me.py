"""/api/v1/me: who the key of a request belongs to, and what it may do."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.responses import Response

from privatelora.platform.api.answers import IfNoneMatch, one
from privatelora.platform.api.auth import AnyCall
from privatelora.platform.api.fields import KeyId, UserId
from privatelora.platform.tables import Role, Scope

router = APIRouter(prefix="/api/v1/me", tags=["users"])


class Me(BaseModel):
    """The holder of a key."""

    user_id: UserId
    key_id: KeyId
    role: Role
    scope: Scope
    plan: str = Field(examples=["default"])
    team: str | None = Field(examples=["research"])


@router.get("", response_model=Me, summary="Whose key this is")
def get_me(call: AnyCall, if_none_match: IfNoneMatch = None) -> Response:
    """User, role and scope of the key that the request came with."""
    who = call.caller
    body = Me(user_id=who.user, key_id=who.key, role=who.role, scope=who.scope, plan=who.plan, team=who.team)
    return one(body, if_none_match)

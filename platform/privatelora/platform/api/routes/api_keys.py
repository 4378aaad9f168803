"""/api/v1/api-keys: made by operators, shown once, rotated and revoked by their users or an operator.

A key is known here by its id and its first characters. Revoking is at once: the next request is refused, and backbones
end its sessions within a second.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import Field
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.responses import Response

from privatelora.platform import audit, events, keys
from privatelora.platform.api.answers import IfMatch, IfNoneMatch, answer, check_match, one
from privatelora.platform.api.auth import AnyCall, Call, ChangingCall, OperatorCall, not_found
from privatelora.platform.api.fields import KeyId, Name, Shown, Strict, UserId, When
from privatelora.platform.api.idempotency import Made, OnceOnly, make
from privatelora.platform.api.pages import Page, Paging, fetch
from privatelora.platform.api.problems import Conflict, Forbidden, Invalid
from privatelora.platform.events import Event
from privatelora.platform.tables import ApiKey, Role, Scope, User, utc_now

PATH = "/api/v1/api-keys"
router = APIRouter(prefix=PATH, tags=["api-keys"])

LONGEST_GRACE_S = 7 * 24 * 3600
SHOWN_ONCE = "the key was shown once, in the first answer to this request; it is not kept"
_ORDERS = {"id": (ApiKey.id,)}


class KeyShown(Shown):
    """A key, without its text."""

    id: KeyId
    user_id: UserId
    name: str = Field(examples=["laptop"])
    scope: Scope
    prefix: str = Field(description="Its first characters.", examples=["plk_Zm9vYmFy"])
    replaces: KeyId | None = Field(description="The key that this one was made to replace.", examples=[None])
    created_at: When
    expires_at: When | None = Field(examples=["2027-11-26T00:00:00Z"])
    revoked_at: When | None = Field(examples=[None])
    last_used_at: When | None = Field(description="No older than a minute.", examples=["2026-11-26T02:00:00Z"])
    version: int = Field(examples=[1])


class KeyMade(KeyShown):
    """A new key with its text, which is shown this once."""

    key: str | None = Field(
        default=None,
        description="The key itself; null when an Idempotency-Key repeats the answer.",
        examples=["plk_Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6cXV4Zm9vYmFyYmE"],
    )
    note: str | None = Field(default=None, description="Why `key` is null.", examples=[None])


class NewKey(Strict):
    """A key to be made."""

    user_id: UserId
    name: Name = Field(examples=["laptop"])
    scope: Scope = Field(description="operator only for users of role operator.", examples=["device"])
    expires_at: When | None = Field(default=None, examples=["2027-11-26T00:00:00Z"])


class Rotation(Strict):
    """How a key is replaced."""

    grace_s: Annotated[int, Field(strict=True, ge=0, le=LONGEST_GRACE_S)] = Field(
        default=3600, description="Seconds for which the old key still works.", examples=[3600]
    )


class KeyQuery(Paging):
    sort: Literal["id", "-id"] = "-id"
    user_id: UserId | None = Field(default=None, description="Keys of this user.")


@router.get("", response_model=Page[KeyShown], summary="List keys")
def list_keys(call: AnyCall, query: Annotated[KeyQuery, Query()]) -> Response:
    """Keys without their texts: one's own, or everyone's for operators."""
    owner = call.scope_user(query.user_id)
    found = select(ApiKey) if owner is None else select(ApiKey).where(ApiKey.user_id == owner)
    with call.services.database.read() as session:
        rows, following = fetch(session, found, _ORDERS, query)
    return answer(Page(items=[KeyShown.model_validate(row) for row in rows], next=following))


@router.post("", response_model=KeyMade, status_code=201, summary="Make a key")
def create_key(call: OperatorCall, new: NewKey, once: OnceOnly) -> Response:
    """The answer is the only place where the key is ever shown."""

    def work(session: Session) -> Made:
        user = session.get(User, new.user_id)
        if user is None:
            raise Invalid("body.user_id", "is no user's id")
        if new.scope is Scope.OPERATOR and user.role != Role.OPERATOR:
            raise Invalid("body.scope", "is operator, which needs a user of role operator")
        if new.expires_at is not None and new.expires_at <= utc_now():
            raise Invalid("body.expires_at", "is in the past")
        row, text = keys.new_key(user, new.name, new.scope, new.expires_at)
        session.add(row)
        audit.record(session, call.actor, "key.created", row.id, user=user.id, scope=new.scope, prefix=row.prefix)
        return _shown_once(session, row, text)

    return make(call, once, work, PATH)


@router.get("/{key_id}", response_model=KeyShown, summary="One key")
def get_key(call: AnyCall, key_id: KeyId, if_none_match: IfNoneMatch = None) -> Response:
    """A key without its text."""
    with call.services.database.read() as session:
        row = session.get(ApiKey, key_id)
    call.check_sees(row.user_id if row else None, "key")
    if row is None:
        raise not_found("key")
    return one(KeyShown.model_validate(row), if_none_match, row.version)


@router.post("/{key_id}/rotate", response_model=KeyMade, status_code=201, summary="Replace a key")
def rotate_key(call: ChangingCall, key_id: KeyId, rotation: Rotation, once: OnceOnly) -> Response:
    """A new key of the same user, name, scope and end; the old one goes on for a time of grace."""

    def work(session: Session) -> Made:
        old = _for_change(session, call, key_id)
        now = utc_now()
        if old.revoked_at is not None or (old.expires_at is not None and old.expires_at <= now):
            raise Conflict("this key is revoked or has expired; an operator can make a new one")
        row, text = keys.rotate(session, old, timedelta(seconds=rotation.grace_s))
        audit.record(session, call.actor, "key.rotated", old.id, by=row.id, prefix=row.prefix, grace_s=rotation.grace_s)
        return _shown_once(session, row, text)

    return make(call, once, work, PATH)


@router.post("/{key_id}/revoke", response_model=KeyShown, summary="Revoke a key")
def revoke_key(call: ChangingCall, key_id: KeyId, once: OnceOnly) -> Response:
    """The key is refused from now on, and its sessions end within a second. Repeating it does nothing."""
    return make(call, once, lambda session: _revoked(session, call, key_id, None))


@router.delete("/{key_id}", status_code=204, summary="Revoke a key, as DELETE")
def delete_key(call: ChangingCall, key_id: KeyId, if_match: IfMatch = None) -> Response:
    """The same as revoking: its row stays for usage and audit."""
    with call.services.database.write() as session:
        made = _revoked(session, call, key_id, if_match)
    for event in made.events:
        events.emit(call.services.valkey, event)
    return Response(None, 204)


def _revoked(session: Session, call: Call, key_id: str, if_match: str | None) -> Made:
    row = _for_change(session, call, key_id)
    check_match(if_match, row.version)
    if row.revoked_at is not None:
        return Made(KeyShown.model_validate(row))
    row.revoked_at = utc_now()
    audit.record(session, call.actor, "key.revoked", row.id, user=row.user_id, prefix=row.prefix)
    session.flush()
    return Made(KeyShown.model_validate(row), events=[Event("key.revoked", row.user_id, {"key": row.id})])


def _for_change(session: Session, call: Call, key_id: str) -> ApiKey:
    row = session.get(ApiKey, key_id, with_for_update=True)
    call.check_changes(row.user_id if row else None, "key")
    if row is None:
        raise not_found("key")
    of_operator = row.scope == Scope.OPERATOR or (call.caller.role is Role.OPERATOR and row.scope != call.caller.scope)
    if of_operator and not call.caller.operates:
        # a device's key must not become one that operates or sees everything by rotating that, nor shut its user out
        raise Forbidden("this key of an operator is changed by one of scope operator only")
    return row


def _shown_once(session: Session, row: ApiKey, text: str) -> Made:
    session.flush()
    shown = KeyMade.model_validate(row)
    return Made(
        shown.model_copy(update={"key": text}),
        201,
        stored=shown.model_copy(update={"note": SHOWN_ONCE}),
    )

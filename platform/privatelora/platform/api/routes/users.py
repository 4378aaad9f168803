"""/api/v1/users: who has keys. Operators see and change everyone; members see themselves.

A user is never deleted, since usage and audit log refer to it: DELETE disables it, and its keys stop working at once.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import Field
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.responses import Response

from privatelora.platform import audit, events
from privatelora.platform.api.answers import IfMatch, IfNoneMatch, answer, check_match, one, tag_of
from privatelora.platform.api.auth import AnyCall, Call, OperatorCall, OverseerCall, not_found
from privatelora.platform.api.fields import Flag, Name, Shown, Strict, UserId, When
from privatelora.platform.api.idempotency import Made, OnceOnly, make
from privatelora.platform.api.pages import Page, Paging, fetch
from privatelora.platform.api.problems import Conflict
from privatelora.platform.events import Event
from privatelora.platform.tables import Role, User, new_id, utc_now

PATH = "/api/v1/users"
router = APIRouter(prefix=PATH, tags=["users"])

_ORDERS = {"id": (User.id,), "name": (User.name,)}


class UserShown(Shown):
    """Someone with keys."""

    id: UserId
    name: str = Field(examples=["ada"])
    role: Role = Field(description="operator: sees and changes everything; member: only their own.")
    plan: str = Field(examples=["default"])
    team: str | None = Field(examples=["research"])
    disabled_at: When | None = Field(description="Since when no key of theirs works.", examples=[None])
    created_at: When
    version: int = Field(examples=[1], description="Counts changes.")


class NewUser(Strict):
    """A user to be made."""

    name: Name = Field(examples=["ada"])
    role: Role = Role.MEMBER
    plan: Name = Field(default="default", examples=["default"])
    team: Name | None = Field(default=None, examples=["research"])


class UserChange(Strict):
    """What to change of a user; what is left out stays."""

    name: Name = Field(default="", examples=["ada"])
    role: Role = Role.MEMBER
    plan: Name = Field(default="", examples=["pro"])
    team: Name | None = Field(default=None, examples=["research"])
    disabled: Flag = Field(default=False, description="true: no key of theirs works any more, and sessions end.")


class UserQuery(Paging):
    sort: Literal["id", "-id", "name", "-name"] = "id"
    name: Name | None = Field(default=None, description="Exactly this name.")
    plan: Name | None = Field(default=None, description="Users of this plan.")
    team: Name | None = Field(default=None, description="Users of this team.")


@router.get("", response_model=Page[UserShown], summary="List users")
def list_users(call: OverseerCall, query: Annotated[UserQuery, Query()]) -> Response:
    """All users, for operators."""
    found = select(User)
    for column, value in ((User.name, query.name), (User.plan, query.plan), (User.team, query.team)):
        if value is not None:
            found = found.where(column == value)
    with call.services.database.read() as session:
        rows, following = fetch(session, found, _ORDERS, query)
    return answer(Page(items=[UserShown.model_validate(row) for row in rows], next=following))


@router.post("", response_model=UserShown, status_code=201, summary="Make a user")
def create_user(call: OperatorCall, new: NewUser, once: OnceOnly) -> Response:
    """A user without keys; `POST /api/v1/api-keys` makes those."""

    def work(session: Session) -> Made:
        _check_free(session, new.name)
        user = User(id=new_id("usr"), created_at=utc_now(), version=1, **new.model_dump())
        session.add(user)
        audit.record(session, call.actor, "user.created", user.id, **new.model_dump(mode="json"))
        session.flush()
        return Made(UserShown.model_validate(user), 201)

    return make(call, once, work, PATH)


@router.get("/{user_id}", response_model=UserShown, summary="One user")
def get_user(call: AnyCall, user_id: UserId, if_none_match: IfNoneMatch = None) -> Response:
    """A user; members may read themselves."""
    call.check_sees(user_id, "user")
    with call.services.database.read() as session:
        user = session.get(User, user_id)
    if user is None:
        raise not_found("user")
    return one(UserShown.model_validate(user), if_none_match, user.version)


@router.patch("/{user_id}", response_model=UserShown, summary="Change a user")
def change_user(call: OperatorCall, user_id: UserId, change: UserChange, if_match: IfMatch = None) -> Response:
    """Change name, role, plan or team, or disable and enable. The last operator stays one."""
    given = change.model_dump(exclude_unset=True)
    with call.services.database.write() as session:
        user = _for_change(session, user_id, if_match)
        if "name" in given and given["name"] != user.name:
            _check_free(session, given["name"])
        disabled = given.pop("disabled", None)
        told: list[Event] = []
        for name, value in given.items():
            setattr(user, name, value)
        if disabled is not None:
            told = _set_disabled(user, disabled)
        _keep_an_operator(session, user)
        details = change.model_dump(mode="json", exclude_unset=True)
        audit.record(session, call.actor, "user.changed", user.id, **details)
        session.flush()
        shown = UserShown.model_validate(user)
    _tell(call, told)
    text = shown.model_dump_json().encode()
    return Response(text, 200, {"ETag": f'"{tag_of(text, shown.version)}"'}, "application/json")


@router.delete("/{user_id}", status_code=204, summary="Disable a user")
def delete_user(call: OperatorCall, user_id: UserId, if_match: IfMatch = None) -> Response:
    """Disable a user for good, as far as the API goes: its rows stay for usage and audit. Repeating it does nothing."""
    with call.services.database.write() as session:
        user = _for_change(session, user_id, if_match)
        told = _set_disabled(user, True)
        _keep_an_operator(session, user)
        if told:
            audit.record(session, call.actor, "user.disabled", user.id)
    _tell(call, told)
    return Response(None, 204)


def _for_change(session: Session, user_id: str, if_match: str | None) -> User:
    user = session.get(User, user_id, with_for_update=True)
    if user is None:
        raise not_found("user")
    check_match(if_match, user.version)
    return user


def _check_free(session: Session, name: str) -> None:
    if session.scalar(select(User.id).where(User.name == name)) is not None:
        raise Conflict(f"there is a user of this name already ({name}); choose another")


def _set_disabled(user: User, disabled: bool) -> list[Event]:
    before: datetime | None = user.disabled_at
    if not disabled:
        user.disabled_at = None
    elif before is None:
        user.disabled_at = utc_now()
        return [Event("user.disabled", user.id, {"user": user.id})]
    return []


def _keep_an_operator(session: Session, user: User) -> None:
    """Refuse the change that would leave nobody who may operate."""
    if user.role == Role.OPERATOR and user.disabled_at is None:
        return
    session.flush()
    others = select(User.id).where(User.role == Role.OPERATOR, User.disabled_at.is_(None))
    left = session.scalars(others.with_for_update()).all()  # locked: two may not leave at the same moment
    if not left:
        raise Conflict("this is the last operator; make another one first")


def _tell(call: Call, told: list[Event]) -> None:
    for event in told:
        events.emit(call.services.valkey, event)

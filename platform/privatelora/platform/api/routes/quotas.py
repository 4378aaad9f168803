"""/api/v1/quotas: what plans, teams, users and keys may use. Operators make them; members see those that hold for them.

A change reaches live sessions with the next lease that their backbone takes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Query
from pydantic import AfterValidator, Field, StringConstraints
from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session
from starlette.responses import Response

from privatelora.platform import audit, quotas
from privatelora.platform.api.answers import IfMatch, IfNoneMatch, answer, check_match, one, tag_of
from privatelora.platform.api.auth import AnyCall, Call, OperatorCall, not_found
from privatelora.platform.api.fields import Count, Name, QuotaId, Shown, Strict, When
from privatelora.platform.api.idempotency import Made, OnceOnly, make
from privatelora.platform.api.pages import Page, Paging, fetch
from privatelora.platform.api.problems import Conflict, Invalid
from privatelora.platform.tables import ApiKey, Level, Quota, Resource, new_id, utc_now

PATH = "/api/v1/quotas"
router = APIRouter(prefix=PATH, tags=["quotas"])

_ORDERS = {"id": (Quota.id,)}


def _is_webhook(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or "@" in parts.netloc or not url.isascii():
        raise ValueError("is no http:// or https:// URL without user and password")
    return url


TimeOfDay = Annotated[str, StringConstraints(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$"), Field(examples=["00:00"])]
Webhook = Annotated[
    str,
    StringConstraints(min_length=8, max_length=500, pattern=r"^https?://[!-~]+$"),
    AfterValidator(_is_webhook),
    Field(examples=["https://hooks.example.org/quota"]),
]


class QuotaShown(Shown):
    """A limit, and where it stands now."""

    id: QuotaId
    level: Level
    subject: str = Field(description="Name of the plan or team, id of the user or key.", examples=["default"])
    resource: Resource
    limit: int = Field(examples=[1_000_000_000])
    soft_limit: int | None = Field(description="Warns, by event and webhook, when passed.", examples=[800_000_000])
    resets_at: str = Field(description="Time of day in UTC at which a daily window begins.", examples=["00:00"])
    webhook_url: str | None = Field(examples=["https://hooks.example.org/quota"])
    created_at: When
    version: int = Field(examples=[1])


class QuotaDetails(QuotaShown):
    """A limit, and what is used of it now."""

    used: int | None = Field(
        default=None,
        description="Used in the running window; null for what is not counted in the database.",
        examples=[123_456],
    )
    window_starts_at: When | None = Field(default=None, description="Null for a limit without a window.")
    window_resets_at: When | None = Field(default=None, description="When the whole limit may be used again.")


class NewQuota(Strict):
    """A quota to be made."""

    level: Level
    subject: Name = Field(description="Name of the plan or team, id of the user or key.", examples=["default"])
    resource: Resource
    limit: Count = Field(examples=[1_000_000_000])
    soft_limit: Count | None = Field(default=None, description="At most `limit`.", examples=[800_000_000])
    resets_at: TimeOfDay = "00:00"
    webhook_url: Webhook | None = None


class QuotaChange(Strict):
    """What to change of a quota; what is left out stays."""

    limit: Count = Field(default=0, examples=[2_000_000_000])
    soft_limit: Count | None = Field(default=None, examples=[1_500_000_000])
    resets_at: TimeOfDay = "00:00"
    webhook_url: Webhook | None = None


class QuotaQuery(Paging):
    sort: Literal["id", "-id"] = "id"
    level: Level | None = Field(default=None, description="Quotas of this level.")
    subject: Name | None = Field(default=None, description="Quotas of this subject; with `level`.")
    resource: Resource | None = Field(default=None, description="Quotas of this resource.")


@router.get("", response_model=Page[QuotaShown], summary="List quotas")
def list_quotas(call: AnyCall, query: Annotated[QuotaQuery, Query()]) -> Response:
    """Quotas: those that hold for oneself, or all of them for operators."""
    if query.subject is not None and query.level is None:
        raise Invalid("query.level", "is needed with subject, which may be a name of several levels")
    filters = ((Quota.level, query.level), (Quota.subject, query.subject), (Quota.resource, query.resource))
    found = select(Quota).where(*(column == value for column, value in filters if value is not None))
    with call.services.database.read() as session:
        if not call.caller.sees_all:
            found = found.where(_visible(session, call))
        rows, following = fetch(session, found, _ORDERS, query)
    return answer(Page(items=[QuotaShown.model_validate(row) for row in rows], next=following))


@router.post("", response_model=QuotaShown, status_code=201, summary="Make a quota")
def create_quota(call: OperatorCall, new: NewQuota, once: OnceOnly) -> Response:
    """One quota for a level, subject and resource; it holds for sessions from their next lease on."""

    def work(session: Session) -> Made:
        _check_soft(new.limit, new.soft_limit)
        if not quotas.exists(session, new.level, new.subject):
            raise Invalid("body.subject", f"is no {new.level}'s id")
        place = (Quota.level == new.level, Quota.subject == new.subject, Quota.resource == new.resource)
        if session.scalar(select(Quota.id).where(*place)) is not None:
            raise Conflict("there is a quota for this level, subject and resource already; change that")
        row = Quota(id=new_id("quo"), created_at=utc_now(), version=1, **new.model_dump())
        session.add(row)
        audit.record(session, call.actor, "quota.created", row.id, **new.model_dump(mode="json"))
        session.flush()
        return Made(QuotaShown.model_validate(row), 201)

    return make(call, once, work, PATH)


@router.get("/{quota_id}", response_model=QuotaDetails, summary="One quota")
def get_quota(call: AnyCall, quota_id: QuotaId, if_none_match: IfNoneMatch = None) -> Response:
    """A quota with what is used of it now, and when its window resets."""
    now = utc_now()
    with call.services.database.read() as session:
        found = select(Quota).where(Quota.id == quota_id)
        if not call.caller.sees_all:
            found = found.where(_visible(session, call))
        row = session.scalar(found)
        if row is None:
            raise not_found("quota")
        details = QuotaDetails.model_validate(row)
        span = quotas.window(row, now)
        if span is not None:
            details.window_starts_at, details.window_resets_at = span.starts_at, span.resets_at
        if row.resource in (Resource.BYTES_UP_PER_DAY, Resource.BYTES_DOWN_PER_DAY):
            details.used = quotas.used(session, row, now)
    return one(details, if_none_match, row.version)


@router.patch("/{quota_id}", response_model=QuotaShown, summary="Change a quota")
def change_quota(call: OperatorCall, quota_id: QuotaId, change: QuotaChange, if_match: IfMatch = None) -> Response:
    """Change limits, reset time or webhook; level, subject and resource are what a quota is."""
    given = change.model_dump(exclude_unset=True)
    with call.services.database.write() as session:
        row = _for_change(session, quota_id, if_match)
        for name, value in given.items():
            setattr(row, name, value)
        _check_soft(row.limit, row.soft_limit)
        audit.record(session, call.actor, "quota.changed", row.id, **given)
        session.flush()
        shown = QuotaShown.model_validate(row)
    return _changed(shown)


@router.delete("/{quota_id}", status_code=204, summary="Delete a quota")
def delete_quota(call: OperatorCall, quota_id: QuotaId, if_match: IfMatch = None) -> Response:
    """What it limited is free from the next lease on."""
    with call.services.database.write() as session:
        row = _for_change(session, quota_id, if_match)
        session.delete(row)
        audit.record(
            session, call.actor, "quota.deleted", row.id, level=row.level, subject=row.subject, resource=row.resource
        )
    return Response(None, 204)


def _changed(shown: QuotaShown) -> Response:
    text = shown.model_dump_json().encode()
    return Response(text, 200, {"ETag": f'"{tag_of(text, shown.version)}"'}, "application/json")


def _for_change(session: Session, quota_id: str, if_match: str | None) -> Quota:
    row = session.get(Quota, quota_id, with_for_update=True)
    if row is None:
        raise not_found("quota")
    check_match(if_match, row.version)
    return row


def _check_soft(limit: int, soft_limit: int | None) -> None:
    if soft_limit is not None and soft_limit > limit:
        raise Invalid("body.soft_limit", f"is above the limit of {limit}")


def _visible(session: Session, call: Call) -> ColumnElement[bool]:
    """The quotas that hold for the caller or one of their keys."""
    own = list(session.scalars(select(ApiKey.id).where(ApiKey.user_id == call.caller.user)))
    condition: Any = quotas.visible(call.caller.user, own, call.caller.plan, call.caller.team)
    return condition  # type: ignore[no-any-return]  # which the helper types as object

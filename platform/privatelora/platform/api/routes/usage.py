"""/api/v1/usage: what users used, by day; also as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from datetime import date
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select, tuple_
from starlette.responses import Response, StreamingResponse

from privatelora.platform.api.answers import answer
from privatelora.platform.api.auth import AnyCall, Call
from privatelora.platform.api.fields import FIRST_YEAR, LAST_YEAR, Shown, UserId
from privatelora.platform.api.pages import Page, Paging, fetch
from privatelora.platform.api.problems import Invalid
from privatelora.platform.tables import UsageDay, User

router = APIRouter(prefix="/api/v1", tags=["usage"])

_ORDERS = {"day": (UsageDay.day, UsageDay.user_id)}
COLUMNS = ("day", "user_id", "user", "bytes_up", "bytes_down", "tokens", "sessions")
CHUNK = 1000  # rows of one piece of a CSV, each read by itself: no slow reader holds a connection

Day = Annotated[date, Field(ge=date(FIRST_YEAR, 1, 1), le=date(LAST_YEAR, 12, 31), examples=["2026-11-26"])]


class UsageShown(Shown):
    """What a user used on a day (UTC)."""

    user_id: UserId
    day: date = Field(examples=["2026-11-26"])
    bytes_up: int = Field(description="Payload bytes from devices.", examples=[1_048_576])
    bytes_down: int = Field(description="Payload bytes to devices.", examples=[524_288])
    tokens: int = Field(description="Tokens through the service's layers.", examples=[512])
    sessions: int = Field(description="Sessions that were opened.", examples=[3])


class UsageRange(BaseModel):
    model_config = ConfigDict(extra="forbid")

    user_id: UserId | None = Field(default=None, description="Of this user.")
    day_from: Day | None = Field(default=None, description="On that day or later.")
    day_to: Day | None = Field(default=None, description="On that day or before.")


class UsageQuery(Paging, UsageRange):
    sort: Literal["day", "-day"] = "-day"


@router.get("/usage", response_model=Page[UsageShown], summary="Usage by user and day")
def list_usage(call: AnyCall, query: Annotated[UsageQuery, Query()]) -> Response:
    """One's own, or everyone's for operators; running sessions are in it within seconds."""
    with call.services.database.read() as session:
        rows, following = fetch(session, _range(select(UsageDay), call, query), _ORDERS, query)
    return answer(Page(items=[UsageShown.model_validate(row) for row in rows], next=following))


@router.get(
    "/usage.csv",
    response_class=Response,
    responses={200: {"content": {"text/csv": {"schema": {"type": "string"}, "example": ",".join(COLUMNS) + "\r\n"}}}},
    summary="Usage as CSV",
)
def export_usage(call: AnyCall, query: Annotated[UsageRange, Query()]) -> Response:
    """All of it, in order of days; a text that a spreadsheet would take for a formula begins with an apostrophe."""
    found = _range(select(UsageDay, User.name).join(User, User.id == UsageDay.user_id), call, query)
    headers = {"Content-Disposition": 'attachment; filename="usage.csv"'}
    return StreamingResponse(_csv(call, found), 200, headers, "text/csv; charset=utf-8")


def _range(found: Any, call: Call, query: UsageRange) -> Any:
    owner = call.scope_user(query.user_id)
    if owner is not None:
        found = found.where(UsageDay.user_id == owner)
    if query.day_from is not None and query.day_to is not None and query.day_to < query.day_from:
        raise Invalid("query.day_to", "is before day_from")
    if query.day_from is not None:
        found = found.where(UsageDay.day >= query.day_from)
    if query.day_to is not None:
        found = found.where(UsageDay.day <= query.day_to)
    return found


def _csv(call: Call, found: Any) -> Iterator[str]:
    yield _lines([COLUMNS])
    part = ordered = found.order_by(UsageDay.day, UsageDay.user_id).limit(CHUNK)
    while True:
        with call.services.database.read() as session:
            rows = session.execute(part).all()
        yield _lines(
            (row.day, row.user_id, _harmless(name), row.bytes_up, row.bytes_down, row.tokens, row.sessions)
            for row, name in rows
        )
        if len(rows) < CHUNK:
            return
        last = rows[-1][0]
        part = ordered.where(tuple_(UsageDay.day, UsageDay.user_id) > tuple_(last.day, last.user_id))


def _lines(rows: Any) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def _harmless(text: str) -> str:
    return "'" + text if text[:1] in "=+-@\t\r" else text

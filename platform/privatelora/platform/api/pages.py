"""Lists in pages: `{"items": [...], "next": cursor}`, each page a range of an index (keyset pagination).

A cursor is the sort order and the place of the page's last item in it, so that a page is as quick in the middle of a
million rows as at the start, and rows that come or go meanwhile are neither missed nor told twice. It is checked like
any other input: whoever makes one up sees another part of the list that is theirs to see.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Select, literal, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session
from sqlalchemy.types import TypeEngine

from privatelora.platform.api.fields import FIRST_YEAR, LARGEST, LAST_YEAR, PLAIN
from privatelora.platform.api.problems import Invalid
from privatelora.platform.tables import Utc

MOST = 200
CURSOR_CHARS = 1000

Item = TypeVar("Item")
Orders = Mapping[str, Sequence[InstrumentedAttribute[Any]]]
"""Name of an order -> its columns, of which the last one or all together are unique."""


class Page(BaseModel, Generic[Item]):
    """A part of a list."""

    items: list[Item]
    next: str | None = Field(description="`cursor` of the next page; null on the last one.", examples=[None])


class Paging(BaseModel):
    """Which part of a list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(default=50, ge=1, le=MOST, description="Items of a page.")
    cursor: str | None = Field(default=None, max_length=CURSOR_CHARS, description="`next` of the page before.")


class Sorted(Protocol):
    """A list's query: paging, and the order; a leading `-` turns it around."""

    limit: int
    cursor: str | None

    @property
    def sort(self) -> str: ...


def fetch(session: Session, found: Select[Any], orders: Orders, query: Sorted) -> tuple[Sequence[Any], str | None]:
    """The page of `found` that `query` asks for, and the cursor of the next one."""
    columns, descending = orders[query.sort.removeprefix("-")], query.sort.startswith("-")
    if query.cursor is not None:
        place = _decoded(query.cursor, query.sort, columns)
        left = tuple_(*columns)
        right = tuple_(*(literal(value, column.type) for value, column in zip(place, columns, strict=True)))
        found = found.where(left < right if descending else left > right)
    found = found.order_by(*(column.desc() if descending else column for column in columns))
    rows = session.scalars(found.limit(query.limit + 1)).all()
    if len(rows) <= query.limit:
        return rows, None
    rows = rows[: query.limit]
    return rows, _encoded(query.sort, [getattr(rows[-1], column.key) for column in columns])


def _encoded(sort: str, place: Sequence[object]) -> str:
    values = [value.isoformat() if isinstance(value, date) else value for value in place]
    return base64.urlsafe_b64encode(json.dumps([sort, *values]).encode()).decode().rstrip("=")


def _decoded(cursor: str, sort: str, columns: Sequence[InstrumentedAttribute[Any]]) -> list[Any]:
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        told = json.loads(text)
        if not isinstance(told, list) or len(told) != len(columns) + 1:
            raise ValueError("is no cursor")
        if told[0] != sort:
            raise ValueError("is of another order")
        return [_typed(value, column.type) for value, column in zip(told[1:], columns, strict=True)]
    except (ValueError, binascii.Error, RecursionError, OverflowError):
        raise Invalid("query.cursor", f"is not one that a page of sort={sort} gave; leave it out to start") from None


def _typed(value: Any, of: TypeEngine[Any]) -> Any:
    kind = datetime if isinstance(of, Utc) else of.python_type
    if kind is int:
        if type(value) is int and abs(value) <= LARGEST:
            return value
    elif isinstance(value, str):
        if kind is datetime:
            moment = datetime.fromisoformat(value)
            if moment.tzinfo is not None and FIRST_YEAR <= moment.year <= LAST_YEAR:
                return moment
        elif kind is date:
            return date.fromisoformat(value)
        elif re.match(PLAIN, value) and value.isprintable():  # no lone surrogate either
            return value
    raise ValueError("is of the wrong type")

"""What sessions used: written by their backbones into sessions, hours of a key and days of a user, all at once.

A backbone says what a session has used since it began, and the difference to what its row says is added to the hour
and the day in the same transaction. So a flush that is repeated, because nobody knows whether it was committed, adds
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import cache
from typing import Any

from sqlalchemy import Insert, bindparam, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from privatelora.platform.tables import SessionRow, SessionState, UsageDay, UsageHour

COUNTS = ("bytes_up", "bytes_down", "tokens")
COUNTED = (*COUNTS, "sessions")
CHUNK = 500  # rows of one statement


@dataclass(frozen=True)
class Reading:
    """What a session has used since it began.

    Parameters
    ----------
    id, user_id, key_id : of its row.
    view : what the layer scheduler has of it now.
    closed_at, end_reason : set once it is over.
    """

    id: str
    user_id: str
    key_id: str
    bytes_up: int
    bytes_down: int
    tokens: int
    view: dict[str, Any]
    closed_at: datetime | None = None
    end_reason: str | None = None


def flush(session: Session, readings: Sequence[Reading], now: datetime) -> None:
    """Write what sessions have used, and add what is new of it to their keys' hours and their users' days."""
    hours: dict[tuple[str, str], list[int]] = {}
    for chunk in (readings[at : at + CHUNK] for at in range(0, len(readings), CHUNK)):
        known = {row.id: row for row in session.execute(_KNOWN, {"ids": [one.id for one in chunk]})}
        written = []
        for one in chunk:
            row = known.get(one.id)
            if row is None:
                continue
            added = hours.setdefault((one.key_id, one.user_id), [0, 0, 0])
            for at, name in enumerate(COUNTS):
                added[at] += getattr(one, name) - getattr(row, name)
            written.append(_row_of(one))
        if written:
            session.connection().execute(_UPDATE, written)
    changed = {owner: added for owner, added in hours.items() if any(added)}
    add(session, now, [(key, user, up, down, tokens, 0) for (key, user), (up, down, tokens) in changed.items()])


def add(session: Session, now: datetime, used: Iterable[tuple[str, str, int, int, int, int]]) -> None:
    """Add (key, user, bytes up, bytes down, tokens, sessions) to hours and days."""
    rows = sorted(used)  # all backbones take their locks in one order
    hour = now.replace(minute=0, second=0, microsecond=0)
    by_user: dict[str, list[int]] = {}
    for _, user, *counts in rows:
        total = by_user.setdefault(user, [0] * len(COUNTED))
        for at, count in enumerate(counts):
            total[at] += count
    hours = [
        {"key_id": key, "user_id": user, "hour": hour, **dict(zip(COUNTED, counts, strict=True))}
        for key, user, *counts in rows
    ]
    days = [
        {"user_id": user, "day": now.date(), **dict(zip(COUNTED, counts, strict=True))}
        for user, counts in sorted(by_user.items())
    ]
    if rows:
        into_hours, into_days = _upserts(session.get_bind().dialect.name)
        session.connection().execute(into_hours, hours)
        session.connection().execute(into_days, days)


def mend(session: Session, since: date) -> int:
    """Set each day from `since` on to the sum of its hours where the two differ; returns how many days did.

    Days before the oldest hour that is kept are left alone.
    """
    start = datetime.combine(since, time(), UTC)
    oldest = session.scalar(select(func.min(UsageHour.hour)))
    if oldest is None:
        return 0
    start = max(start, datetime.combine(oldest.date() + timedelta(days=1 if oldest.hour else 0), time(), UTC))
    sums: dict[tuple[str, date], list[int]] = {}
    for row in session.scalars(select(UsageHour).where(UsageHour.hour >= start).with_for_update()):
        total = sums.setdefault((row.user_id, row.hour.date()), [0] * len(COUNTED))
        for at, name in enumerate(COUNTED):
            total[at] += getattr(row, name)
    days = session.scalars(select(UsageDay).where(UsageDay.day >= start.date()).with_for_update())
    known = {(row.user_id, row.day): row for row in days}
    changed = 0
    for (user, day), total in sums.items():
        found = known.get((user, day))
        if found is None:
            session.add(UsageDay(user_id=user, day=day, **dict(zip(COUNTED, total, strict=True))))
            changed += 1
        elif [getattr(found, name) for name in COUNTED] != total:
            for name, count in zip(COUNTED, total, strict=True):
                setattr(found, name, count)
            changed += 1
    return changed


_KNOWN = (
    select(SessionRow.id, SessionRow.bytes_up, SessionRow.bytes_down, SessionRow.tokens)
    .where(SessionRow.id.in_(bindparam("ids", expanding=True)))
    .order_by(SessionRow.id)
    .with_for_update()
)
_UPDATE = (
    update(SessionRow.__table__)  # type: ignore[arg-type]  # a declarative class's table is a Table
    .where(SessionRow.__table__.c.id == bindparam("of_session"))
    .values({name: bindparam(f"new_{name}") for name in (*COUNTS, "view", "state", "closed_at", "end_reason")})
)


def _row_of(one: Reading) -> dict[str, Any]:
    state = SessionState.OPEN if one.closed_at is None else SessionState.CLOSED
    if one.closed_at is None and one.view.get("leaving"):
        state = SessionState.DRAINING
    return {
        "of_session": one.id,
        "new_bytes_up": one.bytes_up,
        "new_bytes_down": one.bytes_down,
        "new_tokens": one.tokens,
        "new_view": one.view,
        "new_state": state,
        "new_closed_at": one.closed_at,
        "new_end_reason": one.end_reason,
    }


@cache
def _upserts(dialect: str) -> tuple[Insert, Insert]:
    """The statements that add a row's counts to its hour, and to its day."""
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert

    def adding(table: type[UsageHour | UsageDay], by: Sequence[str]) -> Insert:
        made = insert(table.__table__)  # type: ignore[arg-type]  # a declarative class's table is a Table
        grown = {name: getattr(table, name) + made.excluded[name] for name in COUNTED}
        return made.on_conflict_do_update(index_elements=list(by), set_=grown)

    return adding(UsageHour, ("key_id", "hour")), adding(UsageDay, ("user_id", "day"))

"""`retention`: deletes what is older than need be: ended sessions, jobs and metrics, and idempotency keys.

The audit log stays, and so does what users used on each day; hours are kept until no quota's window can reach them.
"""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta
from typing import Annotated, Any

import msgspec
from sqlalchemy import ColumnElement, delete, exists, func, select, tuple_

from privatelora.platform.jobs.runner import WorkerContext
from privatelora.platform.tables import (
    FINAL,
    IdempotentRequest,
    Job,
    MetricPoint,
    SessionRow,
    UsageDay,
    UsageHour,
    utc_now,
)
from privatelora.protocol.jobs import JobKind

BATCH = 1000  # rows of one transaction, so that nobody waits for long
HOURS_KEPT = timedelta(days=3)
REPLAYS_KEPT = timedelta(hours=24)

Count = Annotated[int, msgspec.Meta(ge=0)]


class Params(msgspec.Struct, forbid_unknown_fields=True):
    days: Annotated[int, msgspec.Meta(ge=1, le=36_500)] | None = None  # the setting retention_days, unless given


class Report(msgspec.Struct, forbid_unknown_fields=True):
    sessions: Count
    jobs: Count
    metric_points: Count
    usage_hours: Count
    idempotent_requests: Count


KIND = JobKind("retention", Params, Report)


def run(context: WorkerContext) -> dict[str, int | float]:
    now = utc_now()
    old = now - timedelta(days=context.params["days"] or context.settings.retention_days)
    return {
        "sessions": _delete(context, SessionRow, SessionRow.closed_at < old),
        "jobs": _delete(context, Job, Job.state.in_(FINAL) & (Job.finished_at < old)),
        "metric_points": _delete(context, MetricPoint, MetricPoint.at < old),
        "usage_hours": _delete_hours(context, now - HOURS_KEPT),
        "idempotent_requests": _delete(context, IdempotentRequest, IdempotentRequest.created_at < now - REPLAYS_KEPT),
    }


def _delete_hours(context: WorkerContext, before: datetime) -> int:
    """Whole days of hours, where the user's day is there to tell what they came to."""
    today = datetime.combine(before.date(), time(), UTC)
    deleted, start = 0, datetime.min.replace(tzinfo=UTC)
    while True:
        with context.database.read() as session:
            first = session.scalar(select(func.min(UsageHour.hour)).where(UsageHour.hour >= start))
        if first is None or first >= today:
            return deleted
        day = datetime.combine(first.date(), time(), UTC)
        start = day + timedelta(days=1)
        summed = exists().where(UsageDay.user_id == UsageHour.user_id, UsageDay.day == day.date())
        deleted += _delete(context, UsageHour, (UsageHour.hour >= day) & (UsageHour.hour < start) & summed)


def _delete(context: WorkerContext, table: Any, old: ColumnElement[bool]) -> int:
    """Delete in batches; returns how many rows."""
    keys = list(table.__table__.primary_key.columns)
    batch = select(*keys).where(old).limit(BATCH)
    deleted = 0
    while True:
        context.check()
        with context.database.write() as session:
            done = session.execute(delete(table.__table__).where(tuple_(*keys).in_(batch)))
        deleted += int(done.rowcount)  # type: ignore[attr-defined]  # a DELETE's result has it
        if done.rowcount < BATCH:  # type: ignore[attr-defined]  # as above
            return deleted

"""Which quotas hold for someone, when their windows begin and end, and what of one is used.

Quotas nest: those of a plan, a team, a user and a key all apply to a session of that key, and each must allow it. A
plan's quota is shared by all of the plan's users, a team's by the team.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, time, timedelta

from sqlalchemy import bindparam, func, or_, select, tuple_
from sqlalchemy.orm import Session

from privatelora.platform.tables import ApiKey, Level, Quota, Resource, UsageHour, User

DAY = timedelta(days=1)
MINUTE = timedelta(minutes=1)
WINDOWS = {
    Resource.BYTES_UP_PER_DAY: DAY,
    Resource.BYTES_DOWN_PER_DAY: DAY,
    Resource.TOKENS_PER_MINUTE: MINUTE,
}
"""Resources that are spent until a window ends; the others are limits at any time."""

_OF_SUBJECTS = (
    select(Quota).where(tuple_(Quota.level, Quota.subject).in_(bindparam("of", expanding=True))).order_by(Quota.id)
)
_COLUMN = {Resource.BYTES_UP_PER_DAY: UsageHour.bytes_up, Resource.BYTES_DOWN_PER_DAY: UsageHour.bytes_down}


@dataclass(frozen=True)
class Window:
    """From when to when what is spent counts together."""

    starts_at: datetime
    resets_at: datetime


def subjects(user: str, key: str | None, plan: str, team: str | None) -> list[tuple[str, str]]:
    """Level and subject of every quota that may hold for a key of a user."""
    found = [(Level.PLAN.value, plan), (Level.USER.value, user)]
    if team is not None:
        found.append((Level.TEAM.value, team))
    if key is not None:
        found.append((Level.KEY.value, key))
    return found


def applying(session: Session, *, user: str, key_id: str | None, plan: str, team: str | None) -> list[Quota]:
    """The quotas that hold for a key of a user; without a key, for the user."""
    return of_subjects(session, subjects(user, key_id, plan, team))


def of_subjects(session: Session, of: list[tuple[str, str]]) -> list[Quota]:
    """The quotas of these levels and subjects, by id."""
    return list(session.scalars(_OF_SUBJECTS, {"of": of})) if of else []


def window(quota: Quota, now: datetime) -> Window | None:
    """The window that `now` is in; None for a resource that has none."""
    length = WINDOWS.get(Resource(quota.resource))
    if length is None:
        return None
    if length == MINUTE:
        start = now.replace(second=0, microsecond=0)
    else:
        hour, minute = (int(part) for part in quota.resets_at.split(":"))
        start = datetime.combine(now.date(), time(hour, minute), now.tzinfo)
        if start > now:
            start -= DAY
    return Window(start, start + length)


def used(session: Session, quota: Quota, now: datetime) -> int:
    """What the database knows to be used of a daily quota in the window of `now`; 0 for other resources.

    Hours are added up, so where a window begins within an hour (`resets_at` 06:30) all of that hour counts.
    """
    column, span = _COLUMN.get(Resource(quota.resource)), window(quota, now)
    if column is None or span is None:
        return 0
    total = select(func.coalesce(func.sum(column), 0)).where(
        UsageHour.hour >= span.starts_at.replace(minute=0), UsageHour.hour < span.resets_at
    )
    if quota.level == Level.KEY:
        total = total.where(UsageHour.key_id == quota.subject)
    elif quota.level == Level.USER:
        total = total.where(UsageHour.user_id == quota.subject)
    else:
        of = User.plan if quota.level == Level.PLAN else User.team
        total = total.where(UsageHour.user_id.in_(select(User.id).where(of == quota.subject)))
    return int(session.scalar(total) or 0)


def exists(session: Session, level: Level, subject: str) -> bool:
    """Whether a user or key of this id is there; plans and teams are names, which may come before their users."""
    if level is Level.USER:
        return session.get(User, subject) is not None
    if level is Level.KEY:
        return session.get(ApiKey, subject) is not None
    return True


def visible(user: str, key_ids: list[str], plan: str, team: str | None) -> object:
    """SQL condition: the quotas that hold for a user or one of their keys."""
    pairs = [*subjects(user, None, plan, team), *((Level.KEY.value, key) for key in key_ids)]
    return or_(*(((Quota.level == level) & (Quota.subject == subject)) for level, subject in pairs))

"""Jobs by the clock: a row of ours says what, Celery beat's own row, named `schedule:<id>`, says when.

    create, change, delete     keep both in step, in the caller's transaction
    fire                       queues the job, one for each device of the target, if the schedule's time has come
    due                        those whose time has come: what beat's tick was lost for, which a sweep finds

The database knows when a schedule fired last, so a tick that comes twice or late, from a beat that was killed or from
two of them, queues nothing the second time, and one that never comes is made up for. What was missed while everything
was down is done once.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from celery.schedules import ParseException, crontab
from sqlalchemy import Select, literal, select, update
from sqlalchemy.orm import Session
from sqlalchemy_celery_beat.models import CrontabSchedule, IntervalSchedule, Period, PeriodicTask

from privatelora.platform.audit import SERVICE, Actor, record
from privatelora.platform.jobs import machine
from privatelora.platform.jobs.kinds import kind_of
from privatelora.platform.tables import Device, Job, Schedule, User, new_id, utc_now
from privatelora.protocol.errors import ConfigurationError
from privatelora.protocol.jobs import checked_params

FIRE, SWEEP = "privatelora.fire", "privatelora.sweep"  # names of Celery's tasks
SWEEP_S = 2
STALE_S = 60  # a message that no worker took by then is thrown away; a sweep makes up for it
SWEEP_ROW = "service:sweep"  # beat's row that is the service's own
TARGETS = ("all", "plan", "team", "user", "device")
FIELDS = ("minute", "hour", "day_of_month", "month_of_year", "day_of_week")  # of a line of cron, in order
DEFAULTS = (("usage-rollup", "* * * * *"), ("session-reaper", "* * * * *"), ("retention", "30 3 * * *"))
"""What every service does by itself: kind and cron."""
FURTHEST_DAYS = 5 * 366  # within which a line of cron must come


def create(
    session: Session,
    actor: Actor,
    *,
    name: str,
    kind: str,
    cron: str,
    params: Mapping[str, Any],
    target: Mapping[str, Any],
    timezone: str = "UTC",
    enabled: bool = True,
    priority: int = 0,
    deadline_s: int | None = None,
) -> Schedule:
    """A new schedule; raises `ConfigurationError` that names what is not valid."""
    row = Schedule(
        id=new_id("sch"),
        name=name,
        kind=kind,
        params=checked_params(kind_of(kind).kind, params),
        target=checked_target(kind, target),
        cron=cron,
        timezone=timezone,
        enabled=enabled,
        priority=priority,
        deadline_s=deadline_s,
        created_at=utc_now(),
    )
    session.add(row)
    _keep_in_step(session, row)
    if actor is not SERVICE:
        record(session, actor, "schedule.created", row.id, name=name, kind=kind, cron=cron)
    return row


def change(session: Session, actor: Actor, row: Schedule, changes: Mapping[str, Any]) -> Schedule:
    """Change fields of a schedule, any but its kind; raises `ConfigurationError` that names what is not valid."""
    for name, value in changes.items():
        if name == "params":
            value = checked_params(kind_of(row.kind).kind, value)
        elif name == "target":
            value = checked_target(row.kind, value)
        setattr(row, name, value)
    _keep_in_step(session, row)
    record(session, actor, "schedule.changed", row.id, fields=sorted(changes))
    return row


def delete(session: Session, actor: Actor, row: Schedule) -> None:
    """End a schedule; jobs that it has queued stay."""
    for task in _beat_rows(session, row.id):
        session.delete(task)
    session.delete(row)
    record(session, actor, "schedule.deleted", row.id, name=row.name)


def ensure_defaults(session: Session) -> None:
    """At a service's first start: its own sweep, and what it does by itself; the latter may be changed or deleted."""
    if session.scalar(select(PeriodicTask.id).where(PeriodicTask.name == SWEEP_ROW)) is not None:
        return
    every = IntervalSchedule(every=SWEEP_S, period=Period.SECONDS)
    session.add(every)
    session.flush()
    sweep = PeriodicTask(name=SWEEP_ROW, task=SWEEP, schedule_model=every, description="the service's own")
    sweep.expire_seconds = 2 * SWEEP_S
    session.add(sweep)
    for kind, cron in DEFAULTS:
        create(session, SERVICE, name=kind, kind=kind, cron=cron, params={}, target={})


def fire(session: Session, schedule_id: str, now: datetime) -> list[Job]:
    """Queue what a schedule is for, if its time has come since it fired last."""
    found = session.execute(_enabled.where(Schedule.id == schedule_id)).one_or_none()
    if found is None:
        return []
    row, since = found
    time = _time(row, since)
    if time is None or time > now:
        return []
    # whoever fires it notes that in the same transaction; of two at once the second finds it noted
    noted = session.execute(
        update(Schedule)
        .where(Schedule.id == row.id, Schedule.enabled, Schedule.last_fired_at.is_not_distinct_from(row.last_fired_at))
        .values(last_fired_at=now)
        .execution_options(synchronize_session=False)
    )
    if not noted.rowcount:  # type: ignore[attr-defined]  # an UPDATE's result has it
        return []
    devices: list[Device | None] = [None]
    if kind_of(row.kind).on_device:
        devices = [device for device in session.scalars(_devices(row.target)) if row.kind in device.allows]
    queued = (
        machine.queue(
            session,
            SERVICE,
            row.kind,
            row.params,
            device=device,
            priority=row.priority,
            run_at=now,
            deadline=None if row.deadline_s is None else now + timedelta(seconds=row.deadline_s),
            dedupe=f"{row.id}:{time.astimezone(UTC):%Y%m%d%H%M}:{'service' if device is None else device.id}",
            schedule_id=row.id,
        )
        for device in devices
    )
    return [job for job in queued if job is not None]


def due(session: Session, now: datetime) -> list[str]:
    """Ids of schedules whose time has come since they fired last."""
    times = ((row.id, _time(row, since)) for row, since in session.execute(_enabled))
    return [schedule_id for schedule_id, time in times if time is not None and time <= now]


def next_time(cron: str, timezone: str, after: datetime) -> datetime | None:
    """When a line of cron comes next, as Celery reads it: day of month and day of week must both fit. None: never."""
    fields: Any = crontab(**checked_fields(cron))  # its type has not the sets that it is made of
    zone = ZoneInfo(timezone)
    local = after.astimezone(zone)
    for day in (local.date() + timedelta(days=days) for days in range(FURTHEST_DAYS)):
        if (
            day.month not in fields.month_of_year
            or day.day not in fields.day_of_month
            or day.isoweekday() % 7 not in fields.day_of_week
        ):
            continue
        for hour in sorted(fields.hour):
            for minute in sorted(fields.minute):
                if day == local.date() and (hour, minute) <= (local.hour, local.minute):
                    continue
                time = datetime(day.year, day.month, day.day, hour, minute, tzinfo=zone).astimezone(UTC)
                if time > after:  # as it is not in the hour that comes twice
                    return time
    return None


def checked_target(kind: str, target: Mapping[str, Any]) -> dict[str, Any]:
    """Which devices; nothing for a kind that runs on a worker. Raises `ConfigurationError`."""
    if not kind_of(kind).on_device:
        if target:
            raise ConfigurationError(
                f"target is for kinds that run on devices, and {kind} runs on a worker; leave it out"
            )
        return {}
    if len(target) != 1 or next(iter(target)) not in TARGETS:
        raise ConfigurationError(f"target must have one of {', '.join(TARGETS)}, such as {{'plan': 'free'}}")
    ((of, value),) = target.items()
    if (of == "all" and value is not True) or (of != "all" and not (isinstance(value, str) and value)):
        raise ConfigurationError(f"target {of} must be {'true' if of == 'all' else 'a name or an id'}, not {value!r}")
    return {of: value}


def checked_fields(cron: str) -> dict[str, str]:
    """The five fields of a line of cron; raises `ConfigurationError` that says what is wrong with it."""
    parts = cron.split()
    if len(parts) != len(FIELDS):
        raise ConfigurationError(
            f"cron {cron!r} has {len(parts)} fields; write five: minute, hour, day of month, month, day of week"
        )
    fields = dict(zip(FIELDS, parts, strict=True))
    try:
        crontab(**fields)
    except (ParseException, ValueError, KeyError) as error:
        raise ConfigurationError(f"cron {cron!r} cannot be read ({error})") from None
    return fields


def _checked_when(cron: str, timezone: str, now: datetime) -> dict[str, str]:
    """Fields of beat's row; raises `ConfigurationError`."""
    fields = checked_fields(cron)
    try:
        never = next_time(cron, timezone, now) is None
    except (LookupError, ValueError, OSError):  # no such file of the time zones' folder, or none that is one
        raise ConfigurationError(
            f"timezone {timezone!r} is not known; write a name such as Europe/Zurich or UTC"
        ) from None
    if never:
        raise ConfigurationError(f"cron {cron!r} does not come within five years; write a day that there is")
    return fields | {"timezone": timezone}


def _devices(target: Mapping[str, Any]) -> Select[Device]:
    ((of, value),) = target.items()
    found = select(Device).join(User, User.id == Device.user_id).where(User.disabled_at.is_(None)).order_by(Device.id)
    if of == "all":
        return found
    column = {"plan": User.plan, "team": User.team, "user": User.id, "device": Device.id}[of]
    return found.where(column == value)


def _time(row: Schedule, since: datetime | None) -> datetime | None:
    """When a schedule is to fire next; what was before it was made, enabled or given its time does not count."""
    start = row.created_at if since is None else since.replace(tzinfo=since.tzinfo or UTC)  # SQLite keeps no zone
    return next_time(row.cron, row.timezone, max(start, row.last_fired_at or start))


def _keep_in_step(session: Session, row: Schedule) -> None:
    """Celery beat's row for a schedule, as the schedule is now."""
    now = utc_now()
    fields = _checked_when(row.cron, row.timezone, now)
    when = session.scalar(select(CrontabSchedule).filter_by(**fields)) or CrontabSchedule(**fields)
    session.add(when)
    session.flush()
    found = _beat_rows(session, row.id)
    task = found[0] if found else PeriodicTask(name=_beat_name(row.id), task=FIRE, args=f'["{row.id}"]')
    task.expire_seconds = STALE_S
    if not found or (task.schedule_id, task.enabled) != (when.id, row.enabled):
        task.start_time = task.last_run_at = now  # else beat would make up for all the time before
    task.schedule_model, task.enabled = when, row.enabled
    session.add(task)
    session.flush()


def _beat_rows(session: Session, schedule_id: str) -> list[PeriodicTask]:
    return list(session.scalars(select(PeriodicTask).where(PeriodicTask.name == _beat_name(schedule_id))))


_enabled = (
    select(Schedule, PeriodicTask.start_time)
    .outerjoin(PeriodicTask, PeriodicTask.name == literal("schedule:") + Schedule.id)
    .where(Schedule.enabled)
    .execution_options(populate_existing=True)
)


def _beat_name(schedule_id: str) -> str:
    return f"schedule:{schedule_id}"

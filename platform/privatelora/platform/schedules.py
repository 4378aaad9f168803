"""Jobs by the clock: a row of ours says what, Celery beat's own row, named `schedule:<id>`, says when.

    create, change, delete     keep both in step, in the caller's transaction
    fire                       called by the beat's task: queues the job, one for each device of the target

A tick that comes twice, from a beat that was killed or from two of them, queues nothing the second time: the job's
`dedupe` is the schedule, the minute and the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import available_timezones

from celery.schedules import ParseException, crontab
from sqlalchemy import Select, select
from sqlalchemy.orm import Session
from sqlalchemy_celery_beat.models import CrontabSchedule, PeriodicTask

from privatelora.platform.audit import SERVICE, Actor, record
from privatelora.platform.jobs import machine
from privatelora.platform.jobs.kinds import kind_of
from privatelora.platform.tables import Device, Job, Schedule, User, new_id, utc_now
from privatelora.protocol.errors import ConfigurationError
from privatelora.protocol.jobs import checked_params

FIRE = "privatelora.fire"  # name of the Celery task
TARGETS = ("all", "plan", "team", "user", "device")
FIELDS = ("minute", "hour", "day_of_month", "month_of_year", "day_of_week")  # of a line of cron, in order
DEFAULTS = (("usage-rollup", "* * * * *"), ("session-reaper", "* * * * *"), ("retention", "30 3 * * *"))
"""What every service does by itself: kind and cron."""


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
    """What every service does by itself, unless it is there; an operator may change it like any other schedule."""
    known = set(session.scalars(select(Schedule.name)))
    for kind, cron in DEFAULTS:
        if kind not in known:
            create(session, SERVICE, name=kind, kind=kind, cron=cron, params={}, target={})


def fire(session: Session, schedule_id: str, now: datetime) -> list[Job]:
    """Queue what a schedule is for, as of this minute; what was queued for it already is not queued again."""
    row = session.get(Schedule, schedule_id)
    if row is None or not row.enabled:
        return []
    row.last_fired_at = now
    minute = now.replace(second=0, microsecond=0)
    deadline = now + timedelta(seconds=row.deadline_s) if row.deadline_s is not None else None
    devices: list[Device | None] = [None]
    if kind_of(row.kind).on_device:
        devices = [device for device in session.scalars(_devices(row.target)) if row.kind in device.allows]
    queued = []
    for device in devices:
        of = device.id if device is not None else "service"
        job = machine.queue(
            session,
            SERVICE,
            row.kind,
            row.params,
            device=device,
            priority=row.priority,
            run_at=now,
            deadline=deadline,
            dedupe=f"{row.id}:{minute:%Y%m%d%H%M}:{of}",
            schedule_id=row.id,
        )
        if job is not None:
            queued.append(job)
    return queued


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


def checked_cron(text: str) -> dict[str, str]:
    """The five fields of a line of cron; raises `ConfigurationError` that says which is not valid."""
    parts = text.split()
    if len(parts) != len(FIELDS):
        raise ConfigurationError(
            f"cron {text!r} has {len(parts)} fields; write five: minute, hour, day of month, month, day of week"
        )
    fields = dict(zip(FIELDS, parts, strict=True))
    try:
        crontab(**fields)
    except (ParseException, ValueError, KeyError) as error:
        raise ConfigurationError(f"cron {text!r} cannot be read ({error})") from None
    return fields


def _devices(target: Mapping[str, Any]) -> Select[Device]:
    ((of, value),) = target.items()
    found = select(Device).join(User, User.id == Device.user_id).where(User.disabled_at.is_(None)).order_by(Device.id)
    if of == "all":
        return found
    column = {"plan": User.plan, "team": User.team, "user": User.id, "device": Device.id}[of]
    return found.where(column == value)


def _keep_in_step(session: Session, row: Schedule) -> None:
    """Celery beat's row for a schedule, as the schedule is now."""
    if row.timezone not in available_timezones():
        raise ConfigurationError(f"timezone {row.timezone!r} is not known; write a name such as Europe/Zurich or UTC")
    fields = checked_cron(row.cron) | {"timezone": row.timezone}
    when = session.scalar(select(CrontabSchedule).filter_by(**fields)) or CrontabSchedule(**fields)
    session.add(when)
    session.flush()
    found = _beat_rows(session, row.id)
    task = found[0] if found else PeriodicTask(name=_beat_name(row.id), task=FIRE)
    task.schedule_model = when
    task.args, task.enabled = f'["{row.id}"]', row.enabled
    session.add(task)
    session.flush()


def _beat_rows(session: Session, schedule_id: str) -> list[PeriodicTask]:
    return list(session.scalars(select(PeriodicTask).where(PeriodicTask.name == _beat_name(schedule_id))))


def _beat_name(schedule_id: str) -> str:
    return f"schedule:{schedule_id}"

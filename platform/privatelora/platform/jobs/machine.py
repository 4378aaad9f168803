"""The states of a job, and every way from one to another: each a conditional UPDATE, so that it happens once.

    queued -> offered -> accepted -> running -> done      on a device whose owner agrees
    queued ------------------------> running -> done      on a worker
    and at any time before the end: refused, failed, expired, cancelled

Whoever holds a job has a lease on it, with a fence that counts the holders. A lease that lapses puts the job back, and
the next holder has the next fence; what a late holder reports is refused. The database is the truth: a worker, a device
or the broker may die at any point, and each function here may be called again.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from privatelora.platform.audit import SERVICE, Actor, record
from privatelora.platform.jobs.kinds import kind_of
from privatelora.platform.tables import FINAL, Device, Job, JobState, new_id, utc_now
from privatelora.protocol.errors import ConfigurationError, PrivateLoraError
from privatelora.protocol.jobs import checked_params, checked_report

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 5.0, 3600.0  # before a job is tried again, doubling
HELD = (JobState.OFFERED, JobState.ACCEPTED, JobState.RUNNING)
LIVE = (JobState.QUEUED, *HELD)
REASON_CHARS = 500


class JobConflictError(PrivateLoraError):
    """The job is not in a state for this, or another holder has it."""

    code = "job_conflict"


class NoSuchJobError(PrivateLoraError):
    """There is no such job for this caller."""

    code = "no_such_job"


@dataclass
class Swept:
    """What `sweep` found: ids of jobs for workers that are due, of those put back, and of those that ended."""

    due: list[str] = field(default_factory=list)
    put_back: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)


def queue(
    session: Session,
    actor: Actor,
    kind: str,
    params: Mapping[str, Any],
    *,
    device: Device | None = None,
    user_id: str | None = None,
    priority: int = 0,
    run_at: datetime | None = None,
    deadline: datetime | None = None,
    max_attempts: int = 3,
    dedupe: str | None = None,
    schedule_id: str | None = None,
) -> Job | None:
    """Queue a job; None if one with the same `dedupe` was queued before.

    Raises `ConfigurationError` for an unknown kind, parameters that are not valid, or a device that is missing or not
    wanted.
    """
    found = kind_of(kind)
    if found.on_device != (device is not None):
        needed = "runs on a device; name one" if found.on_device else "runs on a worker; name no device"
        raise ConfigurationError(f"{kind} {needed}")
    values = {
        "id": new_id("job"),
        "kind": kind,
        "params": checked_params(found.kind, params),
        "user_id": device.user_id if device is not None else user_id,
        "device_id": device.id if device is not None else None,
        "schedule_id": schedule_id,
        "dedupe": dedupe,
        "state": JobState.QUEUED,
        "priority": priority,
        "attempts": 0,
        "max_attempts": max_attempts,
        "run_at": run_at or utc_now(),
        "deadline": deadline,
        "fence": 0,
        "created_by": actor.user,
        "created_at": utc_now(),
    }
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    job: Job | None = session.scalar(
        dialect.insert(Job).values(values).on_conflict_do_nothing(index_elements=["dedupe"]).returning(Job)
    )
    if job is not None and actor is not SERVICE:
        record(session, actor, "job.queued", job.id, kind=kind, device=job.device_id)
    return job


def offers(session: Session, device: Device, now: datetime, lease_s: float, limit: int = 10) -> list[Job]:
    """Jobs that are offered to a device now, the most urgent first: those whose kind its owner's policy allows.

    What was offered before and not answered is offered again under the same fence, while its lease holds.
    """
    allowed = and_(
        Job.device_id == device.id, Job.kind.in_(device.allows), or_(Job.deadline.is_(None), Job.deadline > now)
    )
    fresh = and_(Job.state == JobState.QUEUED, Job.run_at <= now)
    lapsed = and_(Job.state == JobState.OFFERED, Job.lease_until <= now)
    still = and_(Job.state == JobState.OFFERED, Job.lease_until > now)
    urgent = (Job.priority.desc(), Job.id)
    for job_id in list(session.scalars(select(Job.id).where(allowed, fresh | lapsed).order_by(*urgent).limit(limit))):
        _change(
            session,
            job_id,
            or_(fresh, lapsed),
            state=JobState.OFFERED,
            fence=Job.fence + 1,
            holder=device.id,
            lease_until=now + timedelta(seconds=lease_s),
        )
    offered = select(Job).where(allowed, still).order_by(*urgent).limit(limit)
    return list(session.scalars(offered.execution_options(populate_existing=True)))


def accept(session: Session, job_id: str, device_id: str, fence: int, now: datetime, lease_s: float) -> Job:
    """The device's owner agrees; may be said again."""
    until = now + timedelta(seconds=lease_s)
    return _step(
        session, job_id, device_id, fence, (JobState.OFFERED,), JobState.ACCEPTED, again=True, lease_until=until
    )


def start(session: Session, job_id: str, holder: str, fence: int, now: datetime, lease_s: float) -> Job:
    """The holder begins; may be said again."""
    job = _held(session, job_id, holder, fence)
    if job.state == JobState.RUNNING:
        return job
    return _step(
        session,
        job_id,
        holder,
        fence,
        (JobState.ACCEPTED,),
        JobState.RUNNING,
        attempts=Job.attempts + 1,
        started_at=now,
        lease_until=now + timedelta(seconds=lease_s),
    )


def beat(session: Session, job_id: str, holder: str, fence: int, now: datetime, lease_s: float) -> Job:
    """The holder still works on it: its lease goes on. Raises `JobConflictError` if it is no longer its holder."""
    states = (JobState.ACCEPTED, JobState.RUNNING)
    return _step(session, job_id, holder, fence, states, None, lease_until=now + timedelta(seconds=lease_s))


def refuse(session: Session, job_id: str, device_id: str, fence: int, reason: str) -> Job:
    """The device's owner, or the policy, does not agree: that is the end of it."""
    states = (JobState.OFFERED, JobState.ACCEPTED)
    return _step(
        session,
        job_id,
        device_id,
        fence,
        states,
        JobState.REFUSED,
        again=True,
        error=reason[:REASON_CHARS],
        finished_at=utc_now(),
        lease_until=None,
    )


def finish(session: Session, job_id: str, holder: str, fence: int, report: Mapping[str, Any]) -> Job:
    """Keep the report of a job that is done: once, from its present holder; the same again changes nothing.

    Raises `ProtocolError` for a report that is none, and `JobConflictError` for a late holder or another report.
    """
    numbers = checked_report(kind_of(_held(session, job_id, holder, fence).kind).kind, report)
    job = _step(
        session,
        job_id,
        holder,
        fence,
        (JobState.RUNNING,),
        JobState.DONE,
        again=True,
        result=numbers,
        error=None,
        finished_at=utc_now(),
        lease_until=None,
    )
    if job.result != numbers:
        raise JobConflictError(f"job {job_id} is done already, with another report; this one is not kept")
    return job


def fail(session: Session, job_id: str, holder: str, fence: int, error: str, retry: bool) -> Job:
    """The holder could not do it: it is queued again with a backoff if that may help, and attempts are left."""
    job = _held(session, job_id, holder, fence)
    text = error[:REASON_CHARS]
    if job.state == JobState.FAILED:
        return job
    if retry and job.attempts < job.max_attempts:
        return _step(
            session,
            job_id,
            holder,
            fence,
            (JobState.ACCEPTED, JobState.RUNNING),
            JobState.QUEUED,
            run_at=utc_now() + backoff(job.attempts),
            error=text,
            holder=None,
            lease_until=None,
        )
    return _step(
        session,
        job_id,
        holder,
        fence,
        (JobState.ACCEPTED, JobState.RUNNING),
        JobState.FAILED,
        error=text,
        finished_at=utc_now(),
        lease_until=None,
    )


def give_back(session: Session, job_id: str, holder: str, fence: int) -> Job:
    """A worker that is told to stop puts a job back as it was: the attempt does not count."""
    return _step(
        session,
        job_id,
        holder,
        fence,
        (JobState.RUNNING,),
        JobState.QUEUED,
        attempts=Job.attempts - 1,
        run_at=utc_now(),
        holder=None,
        lease_until=None,
    )


def take(session: Session, holder: str, now: datetime, lease_s: float) -> Job | None:
    """A worker takes the most urgent job that is due; None if there is none."""
    due = select(Job.id).where(_due(now)).order_by(Job.priority.desc(), Job.id).limit(1)
    job_id = session.scalar(due.with_for_update(skip_locked=True))  # two workers that look at once take two jobs
    return None if job_id is None else claim(session, job_id, holder, now, lease_s)


def claim(session: Session, job_id: str, holder: str, now: datetime, lease_s: float) -> Job | None:
    """A worker takes a job that is due; None if another has it, or it is not due."""
    taken = _change(
        session,
        job_id,
        _due(now),
        state=JobState.RUNNING,
        fence=Job.fence + 1,
        attempts=Job.attempts + 1,
        holder=holder,
        started_at=now,
        lease_until=now + timedelta(seconds=lease_s),
    )
    return session.get_one(Job, job_id, populate_existing=True) if taken else None


def cancel(session: Session, actor: Actor, job_id: str) -> Job:
    """End a job that has not ended; its holder hears of it with its next word."""
    changed = _change(
        session, job_id, Job.state.not_in(FINAL), state=JobState.CANCELLED, finished_at=utc_now(), lease_until=None
    )
    job = session.get(Job, job_id, populate_existing=True)
    if job is None:
        raise NoSuchJobError(f"there is no job {job_id}")
    if changed:
        record(session, actor, "job.cancelled", job_id, kind=job.kind)
    elif job.state != JobState.CANCELLED:
        raise JobConflictError(f"job {job_id} is {job.state} already")
    return job


def sweep(session: Session, now: datetime, limit: int = 500) -> Swept:
    """Put back what lapsed, end what is too late, and say which jobs of workers are due."""
    swept = Swept()
    late = and_(Job.state.not_in(FINAL), Job.deadline <= now)
    ended = {"state": JobState.EXPIRED, "finished_at": now, "lease_until": None, "error": "its deadline passed"}
    for job in _locked(session, and_(Job.state.in_(LIVE), late), limit):
        if _change(session, job.id, late, **ended):
            swept.ended.append(job.id)
    lapsed = and_(Job.state.in_(HELD), Job.lease_until <= now)
    for job in _locked(session, lapsed, limit):
        # what was accepted and never begun has cost an attempt as well: it may be what ends its holder
        attempts = job.attempts + (job.state == JobState.ACCEPTED)
        spent = job.state != JobState.OFFERED and attempts >= job.max_attempts
        changes: dict[str, Any] = {"state": JobState.FAILED, "finished_at": now, "attempts": attempts}
        if not spent:
            # an offer that nobody took has cost nothing
            wait = timedelta() if job.state == JobState.OFFERED else backoff(attempts)
            changes = {"state": JobState.QUEUED, "run_at": now + wait, "holder": None, "attempts": attempts}
        error = job.error if job.state == JobState.OFFERED else "its holder fell silent"
        same = and_(lapsed, Job.state == job.state, Job.fence == job.fence)
        if _change(session, job.id, same, lease_until=None, error=error, **changes):
            (swept.ended if spent else swept.put_back).append(job.id)
    due = select(Job.id).where(_due(now)).order_by(Job.priority.desc(), Job.id).limit(limit)
    swept.due = list(session.scalars(due))
    return swept


def backoff(attempts: int) -> timedelta:
    """How long to wait before the next attempt: doubling, with jitter, so that failures do not come back together."""
    longest = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** max(0, attempts - 1))
    return timedelta(seconds=longest * random.uniform(0.5, 1.0))


def _due(now: datetime) -> ColumnElement[bool]:
    """Jobs for workers that may begin now."""
    return and_(
        Job.state == JobState.QUEUED,
        Job.device_id.is_(None),
        Job.run_at <= now,
        or_(Job.deadline.is_(None), Job.deadline > now),
    )


def _locked(session: Session, condition: ColumnElement[bool], limit: int) -> list[Job]:
    """Jobs to be changed; those that another sweep, or a holder, is at just now are left to it."""
    found = select(Job).where(condition).order_by(Job.id).limit(limit).with_for_update(skip_locked=True)
    return list(session.scalars(found.execution_options(populate_existing=True)))


def _held(session: Session, job_id: str, holder: str, fence: int) -> Job:
    job = session.get(Job, job_id, populate_existing=True)
    if job is None or (job.device_id is not None and job.device_id != holder):
        raise NoSuchJobError(f"there is no job {job_id} for {holder}")
    if job.fence != fence or job.holder != holder:
        raise JobConflictError(
            f"job {job_id} has another holder by now (fence {job.fence}, yours is {fence}); stop, and report nothing"
        )
    return job


def _step(
    session: Session,
    job_id: str,
    by: str,
    fence: int,
    before: tuple[JobState, ...],
    after: JobState | None,
    *,
    again: bool = False,
    **changes: Any,
) -> Job:
    """From a state in `before` to `after` (None: stay), for the present holder; `again`: or it is there already."""
    if after is not None:
        changes["state"] = after
    condition = and_(Job.state.in_(before), Job.fence == fence, Job.holder == by)
    if _change(session, job_id, condition, **changes):
        return session.get_one(Job, job_id, populate_existing=True)
    job = _held(session, job_id, by, fence)
    if again and job.state == after:
        return job
    raise JobConflictError(f"job {job_id} is {job.state}; that cannot be done with it now")


def _change(session: Session, job_id: str, condition: Any, **changes: Any) -> bool:
    done = session.execute(
        update(Job).where(Job.id == job_id, condition).values(**changes).execution_options(synchronize_session=False)
    )
    return bool(done.rowcount)  # type: ignore[attr-defined]  # an UPDATE's result has it

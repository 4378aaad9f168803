"""/api/v1/jobs: queued by operators, run by workers and by devices whose owners agree; /api/v1/job-kinds."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query
from pydantic import BaseModel, Field, StringConstraints
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.responses import Response

from privatelora.platform.api.answers import IfNoneMatch, answer, one
from privatelora.platform.api.auth import AnyCall, Call, ChangingCall, OperatorCall, not_found
from privatelora.platform.api.fields import DeviceId, JobId, JsonObject, ScheduleId, Shown, Strict, UserId, When
from privatelora.platform.api.idempotency import Made, OnceOnly, make
from privatelora.platform.api.pages import Page, Paging, fetch
from privatelora.platform.api.problems import Conflict, Invalid
from privatelora.platform.events import Event
from privatelora.platform.jobs import machine
from privatelora.platform.jobs.kinds import kinds
from privatelora.platform.tables import Device, Job, JobState, utc_now
from privatelora.protocol.errors import ConfigurationError

PATH = "/api/v1/jobs"
router = APIRouter(prefix="/api/v1", tags=["jobs"])

LONGEST_DEADLINE_S = 90 * 24 * 3600
_ORDERS = {"id": (Job.id,)}
KindName = Annotated[str, StringConstraints(min_length=1, max_length=40, pattern="^[a-z0-9-]+$")]


class JobShown(Shown):
    """A job, and how it went."""

    id: JobId
    kind: str = Field(examples=["finetune-round"])
    params: dict[str, Any] = Field(examples=[{"epochs": 1}])
    user_id: UserId | None = Field(description="Whose device runs it; null for the service's own.")
    device_id: DeviceId | None
    schedule_id: ScheduleId | None = Field(examples=[None])
    state: JobState
    priority: int = Field(examples=[0])
    attempts: int = Field(examples=[1])
    max_attempts: int = Field(examples=[3])
    run_at: When
    deadline: When | None = Field(examples=[None])
    fence: int = Field(description="Counts the holders of its lease.", examples=[1])
    lease_until: When | None = Field(examples=[None])
    result: dict[str, float] | None = Field(description="Numbers only.", examples=[{"loss": 0.82, "steps": 12}])
    error: str | None = Field(examples=[None])
    created_at: When
    started_at: When | None = Field(examples=[None])
    finished_at: When | None = Field(examples=[None])


class NewJob(Strict):
    """A job to be queued."""

    kind: KindName = Field(examples=["evaluate"])
    params: JsonObject = Field(default_factory=dict, examples=[{}])
    device_id: DeviceId | None = Field(default=None, description="For kinds that run on a device.")
    priority: Annotated[int, Field(strict=True, ge=-100, le=100)] = Field(
        default=0, description="The highest first.", examples=[0]
    )
    run_at: When | None = Field(default=None, description="Not before then.")
    deadline_s: Annotated[int, Field(strict=True, ge=1, le=LONGEST_DEADLINE_S)] | None = Field(
        default=None, description="Expires if it has not ended so many seconds from now.", examples=[86_400]
    )
    max_attempts: Annotated[int, Field(strict=True, ge=1, le=20)] = Field(default=3, examples=[3])


class KindShown(BaseModel):
    """A kind of job."""

    name: str = Field(examples=["finetune-round"])
    on_device: bool = Field(description="Whether it runs on devices, if their owners allow it.")
    params: dict[str, Any] = Field(description="JSON schema of its parameters.", examples=[{"type": "object"}])
    report: dict[str, Any] = Field(description="JSON schema of what it reports.", examples=[{"type": "object"}])


class Kinds(BaseModel):
    items: list[KindShown]


class JobQuery(Paging):
    sort: Literal["id", "-id"] = "-id"
    state: JobState | None = Field(default=None, description="Jobs in this state.")
    kind: KindName | None = Field(default=None, description="Jobs of this kind.")
    user_id: UserId | None = Field(default=None, description="Jobs of this user's devices.")
    device_id: DeviceId | None = Field(default=None, description="Jobs of this device.")
    schedule_id: ScheduleId | None = Field(default=None, description="Jobs that this schedule queued.")


@router.get("/job-kinds", response_model=Kinds, summary="List kinds of job")
def list_kinds(call: AnyCall, if_none_match: IfNoneMatch = None) -> Response:
    """What may be queued, with the schemas of parameters and reports."""
    items = [
        KindShown(
            name=name,
            on_device=kind.on_device,
            params=msgspec.json.schema(kind.kind.params),
            report=msgspec.json.schema(kind.kind.report),
        )
        for name, kind in sorted(kinds().items())
    ]
    return one(Kinds(items=items), if_none_match)


@router.get("/jobs", response_model=Page[JobShown], summary="List jobs")
def list_jobs(call: AnyCall, query: Annotated[JobQuery, Query()]) -> Response:
    """Jobs, ended and not: those of one's own devices, or all for operators."""
    owner = call.scope_user(query.user_id)
    filters = (
        (Job.user_id, owner),
        (Job.state, query.state),
        (Job.kind, query.kind),
        (Job.device_id, query.device_id),
        (Job.schedule_id, query.schedule_id),
    )
    found = select(Job).where(*(column == value for column, value in filters if value is not None))
    with call.services.database.read() as session:
        rows, following = fetch(session, found, _ORDERS, query)
    return answer(Page(items=[JobShown.model_validate(row) for row in rows], next=following))


@router.post("/jobs", response_model=JobShown, status_code=201, summary="Queue a job")
def queue_job(call: OperatorCall, new: NewJob, once: OnceOnly) -> Response:
    """What runs on a device is offered to it; its owner's policy decides."""

    def work(session: Session) -> Made:
        device = None
        if new.device_id is not None:
            device = session.get(Device, new.device_id)
            if device is None:
                raise Invalid("body.device_id", "is no device's id")
        now = utc_now()
        try:
            job = machine.queue(
                session,
                call.actor,
                new.kind,
                new.params,
                device=device,
                priority=new.priority,
                run_at=new.run_at,
                deadline=now + timedelta(seconds=new.deadline_s) if new.deadline_s is not None else None,
                max_attempts=new.max_attempts,
            )
        except ConfigurationError as error:
            raise Invalid("body", error.message) from None
        if job is None:
            raise Conflict("the same job is queued already")
        event = Event("job.queued", job.user_id, {"job": job.id, "kind": job.kind})
        wake = None if job.device_id is not None else lambda: call.services.wake(job.id)
        return Made(JobShown.model_validate(job), 201, events=[event], then=wake)

    return make(call, once, work, PATH)


@router.get("/jobs/{job_id}", response_model=JobShown, summary="One job")
def get_job(call: AnyCall, job_id: JobId, if_none_match: IfNoneMatch = None) -> Response:
    """A job, and how it went."""
    with call.services.database.read() as session:
        row = session.get(Job, job_id)
    call.check_sees(row.user_id if row else None, "job")
    if row is None:
        raise not_found("job")
    return one(JobShown.model_validate(row), if_none_match)


@router.post("/jobs/{job_id}/cancel", response_model=JobShown, summary="Cancel a job")
def cancel_job(call: ChangingCall, job_id: JobId, once: OnceOnly) -> Response:
    """End a job that has not ended: operators any, others those of their own devices."""
    return make(call, once, lambda session: _cancelled(session, call, job_id))


def _cancelled(session: Session, call: Call, job_id: str) -> Made:
    row = session.get(Job, job_id)
    call.check_changes(row.user_id if row else None, "job")
    if row is None:
        raise not_found("job")
    job = machine.cancel(session, call.actor, job_id)
    return Made(
        JobShown.model_validate(job), events=[Event("job.cancelled", job.user_id, {"job": job.id, "kind": job.kind})]
    )

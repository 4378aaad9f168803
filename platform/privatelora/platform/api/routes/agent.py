"""What a device's agent says: it takes offers, answers them, keeps its lease, and reports numbers.

Each route names the device and the job's fence; a fence that is not the job's present one is answered with 409, and the
agent stops. Repeating a word whose answer was lost changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field, StrictFloat, StrictInt, StringConstraints
from sqlalchemy.orm import Session
from starlette.responses import Response

from privatelora.platform import events
from privatelora.platform.api.answers import answer
from privatelora.platform.api.auth import Call, ChangingCall, not_found
from privatelora.platform.api.fields import LARGEST_INT, PLAIN, DeviceId, JobId, Shown, Strict, When
from privatelora.platform.api.problems import Conflict, Forbidden, Invalid
from privatelora.platform.api.routes.jobs import JobShown
from privatelora.platform.events import Event
from privatelora.platform.jobs import machine
from privatelora.platform.jobs.machine import JobConflictError, NoSuchJobError
from privatelora.platform.tables import Device, Job, JobState, utc_now
from privatelora.protocol.errors import ProtocolError
from privatelora.protocol.jobs import MAX_REPORT_NUMBERS

router = APIRouter(prefix="/api/v1", tags=["agent"])

MOST_WAIT_S = 30.0
LONGEST_TEXT = 500


class Offer(Shown):
    """A job that is offered; it is the device's once it accepts, while its lease holds."""

    id: JobId
    kind: str = Field(examples=["finetune-round"])
    params: dict[str, Any] = Field(examples=[{"epochs": 1}])
    priority: int = Field(examples=[0])
    deadline: When | None = Field(examples=[None])
    fence: int = Field(description="Goes into everything that is said of the job.", examples=[1])
    state: JobState
    lease_until: When | None
    lease_s: float = Field(default=0.0, description="How long a lease holds after each word.", examples=[60.0])


class Offers(BaseModel):
    items: list[Offer]


class Held(Strict):
    """Who speaks, and of which lease."""

    device_id: DeviceId
    fence: Annotated[int, Field(strict=True, ge=0, le=LARGEST_INT)] = Field(examples=[1])


class Refused(Held):
    reason: Annotated[str, StringConstraints(max_length=LONGEST_TEXT, pattern=PLAIN)] = Field(
        examples=["the policy does not allow it"]
    )


class Failed(Held):
    error: Annotated[str, StringConstraints(max_length=LONGEST_TEXT, pattern=PLAIN)] = Field(
        examples=["the agent was stopped"]
    )
    retry: Annotated[bool, Field(strict=True)] = Field(default=True, description="Whether another attempt may do.")


class Result(Held):
    report: dict[str, StrictInt | StrictFloat] = Field(
        max_length=MAX_REPORT_NUMBERS,
        description="The numbers of the kind's schema, and nothing else.",
        examples=[{"loss": 0.82, "tokens": 512, "examples": 4, "seconds": 3.0, "bytes_up": 9, "bytes_down": 9}],
    )


@router.post("/devices/{device_id}/offers", response_model=Offers, summary="Take offers")
async def take_offers(
    call: ChangingCall,
    device_id: DeviceId,
    wait_s: Annotated[float, Query(ge=0, le=MOST_WAIT_S, description="Wait so long for a job.")] = 0.0,
) -> Response:
    """Jobs for this device whose kind its owner allows, the most urgent first; waits for one if there is none."""
    found = await run_in_threadpool(_offers, call, device_id)
    if not found and wait_s > 0:
        await call.services.offers.wait(device_id, wait_s)
        found = await run_in_threadpool(_offers, call, device_id)
    return answer(Offers(items=found))


@router.post("/jobs/{job_id}/accept", response_model=JobShown, summary="Accept an offer")
def accept_job(call: ChangingCall, job_id: JobId, held: Held) -> Response:
    """The device's owner agrees."""
    return _say(call, job_id, held, machine.accept, *_lease(call))


@router.post("/jobs/{job_id}/start", response_model=JobShown, summary="Start a job")
def start_job(call: ChangingCall, job_id: JobId, held: Held) -> Response:
    """The device begins."""
    return _say(call, job_id, held, machine.start, *_lease(call))


@router.post("/jobs/{job_id}/heartbeat", response_model=JobShown, summary="Keep a job's lease")
def keep_lease(call: ChangingCall, job_id: JobId, held: Held) -> Response:
    """The device still works on it; 409 says to stop."""
    return _say(call, job_id, held, machine.beat, *_lease(call))


@router.post("/jobs/{job_id}/refuse", response_model=JobShown, summary="Refuse an offer")
def refuse_job(call: ChangingCall, job_id: JobId, told: Refused) -> Response:
    """The device's owner, or their policy, does not agree."""
    return _say(call, job_id, told, machine.refuse, told.reason)


@router.post("/jobs/{job_id}/fail", response_model=JobShown, summary="Report a failure")
def fail_job(call: ChangingCall, job_id: JobId, told: Failed) -> Response:
    """The job could not be done; it is queued again if that may help and attempts are left."""
    return _say(call, job_id, told, machine.fail, told.error, told.retry)


@router.post("/jobs/{job_id}/result", response_model=JobShown, summary="Report a result")
def report_result(call: ChangingCall, job_id: JobId, told: Result) -> Response:
    """The numbers of a job that is done; kept once, from the present holder."""
    return _say(call, job_id, told, machine.finish, told.report)


def _lease(call: Call) -> tuple[datetime, float]:
    """Now, and how long a lease holds from now on."""
    return utc_now(), call.services.settings.job_lease_s


def _offers(call: Call, device_id: str) -> list[Offer]:
    lease_s = call.services.settings.job_lease_s
    with call.services.database.write() as session:
        device = _own_device(session, call, device_id)
        device.agent_seen_at = device.last_seen_at = now = utc_now()
        jobs = machine.offers(session, device, now, lease_s)
        return [Offer.model_validate(job).model_copy(update={"lease_s": lease_s}) for job in jobs]


def _say(call: Call, job_id: str, held: Held, step: Callable[..., Job], *more: Any) -> Response:
    """One word of an agent about a job of a device of its own: a function of `machine`, and what it is told besides."""
    try:
        with call.services.database.write() as session:
            _own_device(session, call, held.device_id)
            before = session.get(Job, job_id)
            if before is None or before.device_id != held.device_id:
                raise not_found("job")
            state = before.state
            job = step(session, job_id, held.device_id, held.fence, *more)
    except JobConflictError as error:
        raise Conflict(error.message) from None
    except NoSuchJobError:
        raise not_found("job") from None
    except ProtocolError as error:
        raise Invalid("body.report", error.message) from None
    if job.state != state:
        data = {"job": job.id, "kind": job.kind, "device": job.device_id}
        events.emit(call.services.valkey, Event(f"job.{job.state}", job.user_id, data))
    return answer(JobShown.model_validate(job))


def _own_device(session: Session, call: Call, device_id: str) -> Device:
    """The caller's own: an operator speaks for nobody else's device either."""
    device = session.get(Device, device_id)
    call.check_sees(device.user_id if device else None, "device")
    if device is None:
        raise not_found("device")
    if device.user_id != call.caller.user:
        raise Forbidden("only a device's own user may speak for it")
    return device

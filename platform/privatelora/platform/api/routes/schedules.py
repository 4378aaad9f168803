"""/api/v1/schedules: jobs by the clock. Operators make them; those that overlook may read them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field, StringConstraints
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.responses import Response

from privatelora.platform import schedules
from privatelora.platform.api.answers import IfMatch, IfNoneMatch, answer, check_match, one
from privatelora.platform.api.auth import OperatorCall, OverseerCall, not_found
from privatelora.platform.api.fields import Flag, JsonObject, Name, ScheduleId, Shown, Strict, When
from privatelora.platform.api.idempotency import Made, OnceOnly, make
from privatelora.platform.api.pages import Page, Paging, fetch
from privatelora.platform.api.problems import Invalid
from privatelora.platform.api.routes.jobs import LONGEST_DEADLINE_S, KindName
from privatelora.platform.tables import Schedule
from privatelora.protocol.errors import ConfigurationError

PATH = "/api/v1/schedules"
router = APIRouter(prefix=PATH, tags=["schedules"])

_ORDERS = {"id": (Schedule.id,)}
Cron = Annotated[str, StringConstraints(min_length=9, max_length=100, pattern=r"^[0-9A-Za-z*/, -]+$")]
Zone = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern="^[A-Za-z0-9_+/-]+$")]
Urgency = Annotated[int, Field(strict=True, ge=-100, le=100)]
Deadline = Annotated[int, Field(strict=True, ge=1, le=LONGEST_DEADLINE_S)]


class ScheduleShown(Shown):
    """A job that is queued by the clock."""

    id: ScheduleId
    name: str = Field(examples=["nightly round of plan free"])
    kind: str = Field(examples=["finetune-round"])
    params: dict[str, Any] = Field(examples=[{"epochs": 1}])
    target: dict[str, Any] = Field(description="Which devices.", examples=[{"plan": "free"}])
    cron: str = Field(examples=["0 2 * * *"])
    timezone: str = Field(examples=["Europe/Zurich"])
    enabled: bool
    priority: int = Field(examples=[0])
    deadline_s: int | None = Field(examples=[28_800])
    last_fired_at: When | None = Field(examples=[None])
    created_at: When
    version: int = Field(examples=[1])


class NewSchedule(Strict):
    """A schedule to be made."""

    name: Name = Field(examples=["nightly round of plan free"])
    kind: KindName = Field(examples=["finetune-round"])
    params: JsonObject = Field(default_factory=dict, examples=[{"epochs": 1}])
    target: JsonObject = Field(
        default_factory=dict,
        max_length=1,
        description="For kinds of devices: {'all': true}, or plan, team, user or device with its name or id.",
        examples=[{"plan": "free"}],
    )
    cron: Cron = Field(description="Minute, hour, day of month, month, day of week.", examples=["0 2 * * *"])
    timezone: Zone = Field(default="UTC", examples=["Europe/Zurich"])
    enabled: Flag = True
    priority: Urgency = 0
    deadline_s: Deadline | None = Field(default=None, description="Its jobs expire so long after they are queued.")


class ScheduleChange(Strict):
    """What to change of a schedule; what is left out stays."""

    name: Name = Field(default="", examples=["nightly round of plan free"])
    params: JsonObject = Field(default_factory=dict, examples=[{"epochs": 2}])
    target: JsonObject = Field(default_factory=dict, max_length=1, examples=[{"plan": "free"}])
    cron: Cron = Field(default="", examples=["30 2 * * *"])
    timezone: Zone = "UTC"
    enabled: Flag = True
    priority: Urgency = 0
    deadline_s: Deadline | None = None


class ScheduleQuery(Paging):
    sort: Literal["id", "-id"] = "id"


@router.get("", response_model=Page[ScheduleShown], summary="List schedules")
def list_schedules(call: OverseerCall, query: Annotated[ScheduleQuery, Query()]) -> Response:
    """Every schedule, also what the service does by itself."""
    with call.services.database.read() as session:
        rows, following = fetch(session, select(Schedule), _ORDERS, query)
    return answer(Page(items=[ScheduleShown.model_validate(row) for row in rows], next=following))


@router.post("", response_model=ScheduleShown, status_code=201, summary="Make a schedule")
def create_schedule(call: OperatorCall, new: NewSchedule, once: OnceOnly) -> Response:
    """It is fired from its next time on."""

    def work(session: Session) -> Made:
        with _named_fields():
            row = schedules.create(session, call.actor, **new.model_dump())
        return Made(ScheduleShown.model_validate(row), 201)

    return make(call, once, work, PATH)


@router.get("/{schedule_id}", response_model=ScheduleShown, summary="One schedule")
def get_schedule(call: OverseerCall, schedule_id: ScheduleId, if_none_match: IfNoneMatch = None) -> Response:
    """A job that is queued by the clock."""
    with call.services.database.read() as session:
        row = session.get(Schedule, schedule_id)
    if row is None:
        raise not_found("schedule")
    return one(ScheduleShown.model_validate(row), if_none_match, row.version)


@router.patch("/{schedule_id}", response_model=ScheduleShown, summary="Change a schedule")
def change_schedule(
    call: OperatorCall, schedule_id: ScheduleId, change: ScheduleChange, if_match: IfMatch = None
) -> Response:
    """Any field but its kind; beat notices within seconds."""
    with call.services.database.write() as session:
        row = session.get(Schedule, schedule_id, with_for_update=True)
        if row is None:
            raise not_found("schedule")
        check_match(if_match, row.version)
        with _named_fields():
            schedules.change(session, call.actor, row, change.model_dump(exclude_unset=True))
        session.flush()
        shown = ScheduleShown.model_validate(row)
    return one(shown, None, shown.version)


@router.delete("/{schedule_id}", status_code=204, summary="Delete a schedule")
def delete_schedule(call: OperatorCall, schedule_id: ScheduleId, if_match: IfMatch = None) -> Response:
    """Jobs that it has queued stay."""
    with call.services.database.write() as session:
        row = session.get(Schedule, schedule_id, with_for_update=True)
        if row is None:
            raise not_found("schedule")
        check_match(if_match, row.version)
        schedules.delete(session, call.actor, row)
    return Response(None, 204)


class _named_fields:
    """What `schedules` finds wrong is a field of the body."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, ConfigurationError):
            first = error.message.partition(" ")[0]
            field = f"body.{first}" if first in ("cron", "timezone", "target") else "body"
            raise Invalid(field, error.message) from None

"""/api/v1/devices: installations of the SDK that have connected; /api/v1/installations: where agents register."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import Field, StringConstraints
from sqlalchemy import select, update
from starlette.responses import Response

from privatelora.platform import audit, registry
from privatelora.platform.api.answers import IfNoneMatch, answer, one
from privatelora.platform.api.auth import AnyCall, ChangingCall, not_found
from privatelora.platform.api.fields import PLAIN, DeviceId, Shown, Strict, UserId, When
from privatelora.platform.api.pages import Page, Paging, fetch
from privatelora.platform.api.problems import Forbidden, Invalid
from privatelora.platform.jobs.kinds import kinds
from privatelora.platform.tables import FINAL, NAME_CHARS, Device, Job, JobState, SessionRow, utc_now

router = APIRouter(prefix="/api/v1", tags=["devices"])

MOST_KINDS = 50
_ORDERS = {"id": (Device.id,)}
Installation = Annotated[str, StringConstraints(pattern="^[0-9a-f]{32}$"), Field(examples=["5f" * 16])]
Kind = Annotated[str, StringConstraints(min_length=1, max_length=40, pattern="^[a-z0-9-]+$")]


class DeviceShown(Shown):
    """An installation of the SDK, as its user's sessions and its agent have shown it."""

    id: DeviceId
    user_id: UserId
    installation: str = Field(description="Its own random number.", examples=["5f" * 16])
    name: str = Field(examples=["laptop"])
    allows: list[str] = Field(
        description="Kinds of job that its owner's policy allows.", examples=[["finetune-round", "evaluate"]]
    )
    first_seen_at: When
    last_seen_at: When
    agent_seen_at: When | None = Field(description="When its agent last asked for jobs.", examples=[None])


class Registration(Strict):
    """What an agent says of its device."""

    name: Annotated[str, StringConstraints(max_length=NAME_CHARS, pattern=PLAIN)] = Field(
        default="", examples=["laptop"]
    )
    allows: list[Kind] = Field(default_factory=list, max_length=MOST_KINDS, examples=[["finetune-round", "evaluate"]])


class DeviceQuery(Paging):
    sort: Literal["id", "-id"] = "-id"
    user_id: UserId | None = Field(default=None, description="Devices of this user.")


@router.get("/devices", response_model=Page[DeviceShown], summary="List devices")
def list_devices(call: AnyCall, query: Annotated[DeviceQuery, Query()]) -> Response:
    """Devices that have connected: one's own, or everyone's for operators."""
    owner = call.scope_user(query.user_id)
    found = select(Device) if owner is None else select(Device).where(Device.user_id == owner)
    with call.services.database.read() as session:
        rows, following = fetch(session, found, _ORDERS, query)
    return answer(Page(items=[DeviceShown.model_validate(row) for row in rows], next=following))


@router.get("/devices/{device_id}", response_model=DeviceShown, summary="One device")
def get_device(call: AnyCall, device_id: DeviceId, if_none_match: IfNoneMatch = None) -> Response:
    """A device that has connected."""
    with call.services.database.read() as session:
        row = session.get(Device, device_id)
    call.check_sees(row.user_id if row else None, "device")
    if row is None:
        raise not_found("device")
    return one(DeviceShown.model_validate(row), if_none_match)


@router.delete("/devices/{device_id}", status_code=204, summary="Forget a device")
def delete_device(call: ChangingCall, device_id: DeviceId) -> Response:
    """Its jobs that have not ended are cancelled; sessions and usage stay. It may come back as a new device."""
    now = utc_now()
    with call.services.database.write() as session:
        row = session.get(Device, device_id, with_for_update=True)
        call.check_changes(row.user_id if row else None, "device")
        if row is None:
            raise not_found("device")
        of_device = Job.device_id == device_id
        cancelled = {"state": JobState.CANCELLED, "finished_at": now, "lease_until": None}
        session.execute(update(Job).where(of_device, Job.state.not_in(FINAL)).values(**cancelled))
        session.execute(update(Job).where(of_device).values(device_id=None))
        session.execute(update(SessionRow).where(SessionRow.device_id == device_id).values(device_id=None))
        session.delete(row)
        audit.record(session, call.actor, "device.deleted", device_id, user=row.user_id)
    return Response(None, 204)


@router.put("/installations/{installation}", response_model=DeviceShown, summary="Register a device")
def register(call: ChangingCall, installation: Installation, told: Registration) -> Response:
    """What a device's agent says of it, first and whenever its owner's policy changes."""
    if not call.caller.computes:
        raise Forbidden("this key may only look; an agent needs one of scope device")
    known = {name for name, kind in kinds().items() if kind.on_device}
    for at, name in enumerate(told.allows):
        if name not in known:
            raise Invalid(f"body.allows.{at}", f"is no kind that runs on devices; those are {', '.join(sorted(known))}")
    with call.services.database.write() as session:
        row = registry.seen(session, call.caller.user, installation, utc_now())
        row.name, row.allows = told.name, sorted(set(told.allows))
        session.flush()
    return answer(DeviceShown.model_validate(row))

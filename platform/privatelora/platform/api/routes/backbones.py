"""/api/v1/backbones: the processes that hold the frozen layers, for operators. They write their own rows."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field
from sqlalchemy import select
from starlette.responses import Response

from privatelora.platform.api.answers import IfNoneMatch, answer, one
from privatelora.platform.api.auth import OverseerCall, not_found
from privatelora.platform.api.fields import BackboneId, Sha256, Shown, When
from privatelora.platform.api.pages import Page, Paging, fetch
from privatelora.platform.tables import BackboneNode, utc_now

router = APIRouter(prefix="/api/v1/backbones", tags=["backbones"])

ALIVE_S = 5.0  # a heartbeat that is older is of a backbone that is gone
_ORDERS = {"id": (BackboneNode.id,)}


class BackboneShown(Shown):
    """A backbone process."""

    id: BackboneId
    url: str = Field(examples=["http://10.0.0.7:8765"])
    model_hash: Sha256
    state: str = Field(description="serving, draining or gone.", examples=["serving"])
    alive: bool = Field(default=False, description=f"Whether its heartbeat is younger than {ALIVE_S:g} s.")
    sessions: int = Field(examples=[12])
    started_at: When
    heartbeat_at: When


class BackboneDetails(BackboneShown):
    """A backbone process with what it announces to devices."""

    info: dict[str, Any] = Field(description="ServiceInfo, as `/v1/info` gives it.", examples=[{"protocol_version": 1}])


class BackboneQuery(Paging):
    sort: Literal["id", "-id"] = "-id"
    state: Literal["serving", "draining", "gone"] | None = Field(default=None, description="Backbones in this state.")


@router.get("", response_model=Page[BackboneShown], summary="List backbones")
def list_backbones(call: OverseerCall, query: Annotated[BackboneQuery, Query()]) -> Response:
    """Backbones, live and past."""
    found = select(BackboneNode)
    if query.state is not None:
        found = found.where(BackboneNode.state == query.state)
    with call.services.database.read() as session:
        rows, following = fetch(session, found, _ORDERS, query)
    return answer(Page(items=[_shown(BackboneShown, row) for row in rows], next=following))


@router.get("/{backbone_id}", response_model=BackboneDetails, summary="One backbone")
def get_backbone(call: OverseerCall, backbone_id: BackboneId, if_none_match: IfNoneMatch = None) -> Response:
    """A backbone with what it announces."""
    with call.services.database.read() as session:
        row = session.get(BackboneNode, backbone_id)
    if row is None:
        raise not_found("backbone")
    return one(_shown(BackboneDetails, row), if_none_match)


def _shown(kind: type[BackboneShown], row: BackboneNode) -> BackboneShown:
    alive = row.state != "gone" and row.heartbeat_at > utc_now() - timedelta(seconds=ALIVE_S)
    return kind.model_validate(row).model_copy(update={"alive": alive})

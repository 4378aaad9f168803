"""/v1/info: where a device goes on, in the devices' own words: `ServiceInfo`, or `ErrorInfo`."""

from __future__ import annotations

import json
from datetime import timedelta

from fastapi import APIRouter
from sqlalchemy import select
from starlette.responses import Response

from privatelora.platform.api.auth import AnyCall
from privatelora.platform.api.problems import Away
from privatelora.platform.registry import ALIVE_S
from privatelora.platform.tables import BackboneNode, utc_now
from privatelora.protocol.messages import INFO_PATH

router = APIRouter(tags=["devices"])


@router.get(
    INFO_PATH,
    response_class=Response,
    responses={200: {"content": {"application/json": {"schema": {"type": "object"}}}}},
    summary="Where a device goes on",
)
def get_info(call: AnyCall) -> Response:
    """The announcement of the backbone that lives and has the fewest sessions, with its addresses in it."""
    alive = (BackboneNode.state == "serving", BackboneNode.heartbeat_at > utc_now() - timedelta(seconds=ALIVE_S))
    least = select(BackboneNode.info).where(*alive).order_by(BackboneNode.sessions, BackboneNode.id).limit(1)
    with call.services.database.read() as session:
        info = session.scalar(least)
    if info is None:
        raise Away("no backbone serves now; try again")
    return Response(json.dumps(info), media_type="application/json")

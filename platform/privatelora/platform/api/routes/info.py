"""/v1/info: where a device goes on, in the devices' own words: `ServiceInfo`, or `ErrorInfo`."""

from __future__ import annotations

import json
import random
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
    """The announcement of a backbone that lives, with its addresses in it: the fewer sessions it has, the likelier.

    Not simply the one with the fewest: what they have is some seconds old, and devices that come together would all go
    to the same one.
    """
    alive = (BackboneNode.state == "serving", BackboneNode.heartbeat_at > utc_now() - timedelta(seconds=ALIVE_S))
    with call.services.database.read() as session:
        nodes = session.execute(select(BackboneNode.id, BackboneNode.sessions).where(*alive)).all()
        if not nodes:
            raise Away("no backbone serves now; try again")
        (chosen,) = random.choices(nodes, [1 / (1 + node.sessions) for node in nodes])
        info = session.scalar(select(BackboneNode.info).where(BackboneNode.id == chosen.id))
    return Response(json.dumps(info), media_type="application/json")

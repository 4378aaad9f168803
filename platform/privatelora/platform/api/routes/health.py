"""/healthz: this process lives. /readyz: it can do its work, since database and Valkey answer."""

from __future__ import annotations

import structlog
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from redis.exceptions import RedisError
from starlette.responses import Response

from privatelora.platform.api.answers import answer
from privatelora.platform.api.problems import Away
from privatelora.platform.api.services import services_of
from privatelora.protocol.errors import ConfigurationError

router = APIRouter(tags=["health"])
log = structlog.get_logger("privatelora.api")


class Health(BaseModel):
    status: str = Field(examples=["ok"])


@router.get("/healthz", response_model=Health, summary="Whether this process lives")
async def healthz() -> Response:
    """200 as long as requests are answered at all."""
    return answer(Health(status="ok"))


@router.get("/readyz", response_model=Health, summary="Whether it can do its work")
def readyz(request: Request) -> Response:
    """503 with the reason while the database or Valkey does not answer, or the schema is of another release."""
    services = services_of(request)
    try:
        services.database.check()
        services.valkey.ping()
    except ConfigurationError as error:  # whose message names an address, and anyone may ask here
        log.warning("not ready", reason=error.message)
        raise Away("the database cannot be reached, or has another release's schema; the log says which") from None
    except RedisError as error:
        log.warning("not ready", reason=f"Valkey: {type(error).__name__}")
        raise Away("Valkey does not answer") from None
    return answer(Health(status="ready"))

"""The control plane's REST API: `create_app` builds it, `server.serve` runs it.

    uvicorn -> Edge (ids, sizes, log) -> routes/<resource>.py -> database, Valkey
               errors become RFC 9457 problems (problems.py), lists are pages of an index (pages.py)

The process imports no torch: what computes is a backbone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from privatelora.platform import valkey
from privatelora.platform.api.counts import HttpCounts
from privatelora.platform.api.edge import Edge
from privatelora.platform.api.limits import Limits
from privatelora.platform.api.offers import OfferBoard
from privatelora.platform.api.openapi import document
from privatelora.platform.api.problems import refusal_of, render
from privatelora.platform.api.routes import ROUTERS
from privatelora.platform.api.services import Services
from privatelora.platform.database import Database
from privatelora.platform.queue import waker
from privatelora.platform.settings import Settings, load_settings
from privatelora.protocol.errors import ConfigurationError, PrivateLoraError
from privatelora.protocol.messages import INFO_PATH

CONNECTIONS = 10  # to the database that are kept open


def create_app(settings: Settings | None = None) -> FastAPI:
    """The ASGI app; its settings come from `PRIVATELORA_*` variables unless given.

    Raises `ConfigurationError` where database_url or valkey_url is not set, or cannot be read.
    """
    settings = settings or load_settings()
    if settings.database_url is None or settings.valkey_url is None:
        raise ConfigurationError("the API needs PRIVATELORA_DATABASE_URL and PRIVATELORA_VALKEY_URL")
    database = Database(settings.database_url, CONNECTIONS)
    services = Services(
        settings,
        database,
        valkey.connect(settings.valkey_url),
        Limits(settings.requests_per_minute, settings.wrong_keys_per_minute),
        HttpCounts(),
        OfferBoard(database),
        waker(settings),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        looks = asyncio.create_task(services.offers.run())
        yield
        looks.cancel()
        await asyncio.gather(looks, return_exceptions=True)
        services.valkey.close()
        database.close()

    app = _App(title="privatelora", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.state.services = services
    app.edge = lambda inner: Edge(inner, services.counts)
    for router in ROUTERS:
        app.include_router(router)
    for kind in (RequestValidationError, HTTPException, PrivateLoraError):
        app.add_exception_handler(kind, _told)
    return app


class _App(FastAPI):
    """FastAPI with our own OpenAPI document, and `Edge` around everything, its own error pages too."""

    edge: Callable[[ASGIApp], ASGIApp]

    def openapi(self) -> dict[str, object]:
        if not self.openapi_schema:
            self.openapi_schema = document(self)
        return cast(dict[str, object], self.openapi_schema)

    def build_middleware_stack(self) -> ASGIApp:
        return self.edge(super().build_middleware_stack())


async def _told(request: Request, error: Exception) -> Response:
    return render(refusal_of(error), for_device=request.url.path == INFO_PATH)

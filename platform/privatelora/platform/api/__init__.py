"""The control plane's REST API: `create_app` builds it, `server.serve` runs it.

    uvicorn -> Edge (ids, sizes, log) -> routes/<resource>.py -> database, Valkey
               errors become RFC 9457 problems (problems.py), lists are pages of an index (pages.py)

The process imports no torch: what computes is a backbone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from privatelora.platform import valkey
from privatelora.platform.api.counts import HttpCounts
from privatelora.platform.api.edge import Edge
from privatelora.platform.api.offers import OfferBoard
from privatelora.platform.api.openapi import document
from privatelora.platform.api.problems import refusal_of, render
from privatelora.platform.api.routes import ROUTERS
from privatelora.platform.api.services import Services
from privatelora.platform.database import Database
from privatelora.platform.limits import Limits
from privatelora.platform.queue import waker
from privatelora.platform.settings import Settings, load_settings
from privatelora.protocol.errors import ConfigurationError, PrivateLoraError
from privatelora.protocol.messages import INFO_PATH

CONNECTIONS = 10  # to the database that are kept open, and as many again at need
THREADS = 2 * CONNECTIONS  # that work on requests, so that none waits for a connection


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
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        looks = asyncio.create_task(services.offers.run())
        yield
        looks.cancel()
        await asyncio.gather(looks, return_exceptions=True)
        services.valkey.close()
        database.close()

    app = _App(title="privatelora", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.services = services
    app.add_middleware(Edge, counts=services.counts)
    for router in ROUTERS:
        app.include_router(router)
    for kind in (RequestValidationError, HTTPException, PrivateLoraError):
        app.add_exception_handler(kind, _told)
    return app


class _App(FastAPI):
    """FastAPI with our own OpenAPI document."""

    def openapi(self) -> dict[str, object]:
        if not self.openapi_schema:
            self.openapi_schema = document(self)
        return cast(dict[str, object], self.openapi_schema)


async def _told(request: Request, error: Exception) -> Response:
    refusal = refusal_of(error)
    if refusal.status == 405:
        refusal.headers["Allow"] = ", ".join(_methods(request))
    return render(refusal, for_device=request.url.path == INFO_PATH)


def _methods(request: Request) -> list[str]:
    """Every method of the request's path; Starlette names those of its first route only."""
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    return sorted({method for route in routes if _fits(route, request) for method in route.methods or ()})


def _fits(route: APIRoute, request: Request) -> bool:
    return route.matches(request.scope)[0] is not Match.NONE

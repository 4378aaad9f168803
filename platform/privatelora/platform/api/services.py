"""What the routes of one API process share: database, Valkey, settings, limits and counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastapi import Request
from redis import Redis

from privatelora.platform.api.counts import HttpCounts
from privatelora.platform.api.offers import OfferBoard
from privatelora.platform.database import Database
from privatelora.platform.limits import Limits
from privatelora.platform.settings import Settings


@dataclass(frozen=True)
class Services:
    settings: Settings
    database: Database
    valkey: Redis
    limits: Limits
    counts: HttpCounts
    offers: OfferBoard
    wake: Callable[[str], None]  # has a worker look at a job now


def services_of(request: Request) -> Services:
    """The services of the app that a request came to."""
    found: Services = request.app.state.services
    return found

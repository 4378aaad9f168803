"""What happens, as it happens: a Valkey stream that the API hands on as server-sent events.

Events are for watching. Nothing depends on one: they are lost with Valkey, and the tables have what counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from redis import Redis
from redis.exceptions import RedisError

STREAM = "privatelora:events"
KEPT = 10_000  # events, about

log = structlog.get_logger("privatelora.platform")


@dataclass(frozen=True)
class Event:
    """One event.

    kind : such as session.opened, job.done, quota.soft_limit, key.revoked.
    user : whose it is; None is for operators only.
    """

    kind: str
    user: str | None
    data: Mapping[str, Any]


def emit(valkey: Redis, event: Event) -> None:
    """Add an event; where Valkey is away it is only logged."""
    fields: dict[Any, Any] = {"kind": event.kind, "user": event.user or "", "data": json.dumps(event.data, default=str)}
    try:
        valkey.xadd(STREAM, fields, maxlen=KEPT, approximate=True)
    except RedisError as error:
        log.warning("event lost", kind=event.kind, reason=type(error).__name__)


def read_event(fields: Mapping[bytes, bytes]) -> Event:
    """The event of a stream's entry."""
    text = {name.decode(): value.decode() for name, value in fields.items()}
    return Event(text["kind"], text["user"] or None, json.loads(text["data"]))

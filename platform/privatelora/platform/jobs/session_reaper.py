"""`session-reaper`: closes sessions whose backbone has not been heard of for a while, as after a power cut."""

from __future__ import annotations

from typing import Annotated

import msgspec

from privatelora.platform import registry
from privatelora.platform.jobs.runner import WorkerContext
from privatelora.platform.tables import utc_now
from privatelora.protocol.jobs import JobKind


class Params(msgspec.Struct, forbid_unknown_fields=True):
    gone_after_s: Annotated[float, msgspec.Meta(ge=5, le=86_400)] = 60.0


class Report(msgspec.Struct, forbid_unknown_fields=True):
    sessions_closed: Annotated[int, msgspec.Meta(ge=0)]


KIND = JobKind("session-reaper", Params, Report)


def run(context: WorkerContext) -> dict[str, int | float]:
    with context.database.write() as session:
        return {"sessions_closed": registry.reap(session, utc_now(), context.params["gone_after_s"])}

"""`usage-rollup`: sets the last days of every user to the sum of their hours, where the two differ."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import msgspec

from privatelora.platform import usage
from privatelora.platform.jobs.runner import WorkerContext
from privatelora.platform.tables import utc_now
from privatelora.protocol.jobs import JobKind


class Params(msgspec.Struct, forbid_unknown_fields=True):
    days: Annotated[int, msgspec.Meta(ge=1, le=2)] = 2  # today and yesterday: older hours may be deleted already


class Report(msgspec.Struct, forbid_unknown_fields=True):
    days_changed: Annotated[int, msgspec.Meta(ge=0)]


KIND = JobKind("usage-rollup", Params, Report)


def run(context: WorkerContext) -> dict[str, int | float]:
    with context.database.write() as session:
        since = utc_now().date() - timedelta(days=context.params["days"] - 1)
        return {"days_changed": usage.mend(session, since)}

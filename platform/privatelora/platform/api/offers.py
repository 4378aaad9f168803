"""Agents that wait for jobs: one look at the database a second for all of them, whoever waits in this process.

OfferBoard.wait(device, seconds)    returns when there may be a job for the device, or the time is over
OfferBoard.run                      the looks, until it is cancelled; the app's lifespan owns it
OfferBoard.close                    lets everyone go, since the process ends
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import structlog
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import or_, select
from sqlalchemy.exc import SQLAlchemyError

from privatelora.platform.database import Database
from privatelora.platform.tables import Device, Job, JobState, utc_now

log = structlog.get_logger("privatelora.api")

LOOK_S = 1.0  # between two looks
CHUNK = 500  # devices of one statement


class OfferBoard:
    """Who waits, by device."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self.closed = False

    async def wait(self, device_id: str, seconds: float) -> None:
        """Until a job may be there for this device, the time is over, or the process ends."""
        if self.closed:
            return
        came = asyncio.Event()
        self._waiting.setdefault(device_id, set()).add(came)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await came.wait()
        finally:
            others = self._waiting[device_id]
            others.discard(came)
            if not others:
                del self._waiting[device_id]

    @property
    def waiting(self) -> frozenset[str]:
        """Devices whose agents wait."""
        return frozenset(self._waiting)

    def close(self) -> None:
        """Let everyone go."""
        self.closed = True
        for waiting in self._waiting.values():
            for came in waiting:
                came.set()

    async def run(self) -> None:
        """Look again and again, while anyone waits."""
        while True:
            await asyncio.sleep(LOOK_S)
            devices = list(self._waiting)
            try:
                for at in range(0, len(devices), CHUNK):
                    found = await run_in_threadpool(self._with_jobs, devices[at : at + CHUNK])
                    for device_id in found:
                        for came in self._waiting.get(device_id, ()):
                            came.set()
            except SQLAlchemyError as error:
                log.warning("no look for jobs", reason=type(error).__name__)

    def _with_jobs(self, devices: list[str]) -> set[str]:
        now = utc_now()
        due = (
            select(Device.id, Device.allows, Job.kind)
            .join(Device, Device.id == Job.device_id)
            .where(
                Job.device_id.in_(devices),
                Job.state.in_((JobState.QUEUED, JobState.OFFERED)),
                Job.run_at <= now,
                or_(Job.deadline.is_(None), Job.deadline > now),
            )
        )
        with self._database.read() as session:
            return {row.id for row in session.execute(due) if row.kind in row.allows}

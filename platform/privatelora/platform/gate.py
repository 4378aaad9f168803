"""A backbone's side of the control plane: what it asks before a session, and what it does beside sessions.

    Gate.authenticate, .open    `Admission` and `Quota` of the data plane: the database and Valkey, once a session
    Gate.run                    beside them, until it is cancelled: renews slots, writes usage, looks for revoked keys,
                                ended sessions and changed quotas, says that this backbone lives, samples its metrics

No call of a token's path comes here: sessions spend from memory (`meter.py`), and what they spend is fetched ahead
(`bank.py`). Each database or Valkey call runs in a thread, and its answer is used on the event loop. Either may be
away: sessions go on with what they hold, usage is written when the database is back, and a device that wants to begin
is asked to come again soon.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import structlog
from redis import Redis

from privatelora.cloud.admission import Meter, Principal
from privatelora.cloud.plane import COME_BACK_S, DataPlane
from privatelora.platform import keys, registry
from privatelora.platform.background import AWAY, Background, every
from privatelora.platform.bank import LeaseBank
from privatelora.platform.database import Database
from privatelora.platform.events import Event, emit
from privatelora.platform.keys import Caller
from privatelora.platform.limits import Limits
from privatelora.platform.meter import SessionMeter, Unwritten
from privatelora.platform.samples import Sampler
from privatelora.platform.settings import Settings
from privatelora.platform.tables import Command, new_id, utc_now
from privatelora.platform.usage import Reading
from privatelora.protocol.errors import AdmissionError, AuthenticationError, SessionEndedError
from privatelora.protocol.messages import OpenRequest, ServiceInfo

log = structlog.get_logger("privatelora.platform")

REFRESH_S = 2.0  # between two looks at changed quotas
LAST_WRITE_S = 10.0  # for the last usage to be written at a stop
WRITE_S = 0.1  # between two writings, at least
WRITE_AGAIN_S = 0.5  # after one that failed, at a stop


@dataclass(frozen=True)
class Tenant(Principal):
    """The holder of a key."""

    caller: Caller | None = None


class Gate:
    """The control plane as one backbone process has it: the data plane's `Admission` and `Quota`."""

    def __init__(self, database: Database, valkey: Redis, settings: Settings) -> None:
        self.id = new_id("bbn")
        self._database, self._valkey, self._settings = database, valkey, settings
        self._meters: dict[str, SessionMeter] = {}  # by row; closed ones until they are written
        self._background = Background()
        self._bank = LeaseBank(database, valkey, settings, self._background, self._write_soon)
        self._limits = Limits(settings.requests_per_minute, settings.wrong_keys_per_minute)
        self._much = asyncio.Event()  # so much has moved that it is to be written now
        self._unwritten = Unwritten(settings.lease_bytes // 2, self._write_soon)
        self._plane: DataPlane | None = None
        self._url = ""
        self._info: ServiceInfo | None = None

    @property
    def _announced(self) -> ServiceInfo:
        return self._info or self.plane.info

    @property
    def plane(self) -> DataPlane:
        if self._plane is None:
            raise RuntimeError("the gate has not been entered")
        return self._plane

    # -- once a request or a session -----------------------------------------------------------------------------------

    async def authenticate(self, token: str | None, address: str) -> Principal:
        digest = keys.digest_of(token or "")
        self._limits.check_address(address, digest)
        try:
            caller = await self._background.answer(lambda: self._find(token))
        except AuthenticationError:
            self._limits.count_wrong(address)
            raise
        self._limits.count_right(address, digest)
        return Tenant(caller.user, caller.sees_all, caller)

    async def open(self, owner: Principal, number: int, request: OpenRequest) -> Meter:
        caller = owner.caller if isinstance(owner, Tenant) else None
        if caller is None or not caller.computes:
            raise AuthenticationError("this key may only look; a session needs a key of scope device")
        meter = SessionMeter(new_id("ses"), number, caller, self._unwritten)
        found = await self._background.answer(lambda: registry.quotas_of(self._database, [caller]))
        shared = self._bank.shared(found[caller.key])
        opening: asyncio.Future[None] | None = None
        try:
            meter.share(shared)
            await self._bank.take_slots(meter, shared)
            await self._bank.first_blocks(meter)
            placement = request.placement.describe(self.plane.backbone.config.num_layers)
            opening = asyncio.ensure_future(
                self._background.answer(
                    lambda: registry.open_session(
                        self._database, self.id, meter.id, number, caller, placement, request.device
                    ),
                    timeout_s=None,
                )
            )
            await asyncio.shield(opening)
        except BaseException:
            meter.close("left")
            self._bank.leave_slots(meter, shared)
            self._bank.forget_unused(shared)
            if opening is not None:
                self._background.later(self._abandon(opening, meter))
            raise
        meter.on_close = self._closed
        self._meters[meter.id] = meter
        self._background.later(self._emit("session.opened", meter, {"placement": placement, "backbone": self.id}))
        return meter

    def _find(self, token: str | None) -> Caller:
        with self._database.read() as session:
            return keys.find(session, token)

    # -- the life of the process ---------------------------------------------------------------------------------------

    async def enter(self, plane: DataPlane, url: str) -> None:
        """Register this backbone, which listens at `url`; raises `ConfigurationError` if that cannot be."""
        self._plane, self._url, self._info = plane, url, plane.info
        await self._background.call(self._register)

    async def run(self) -> None:
        """Do what is done beside sessions, until it is cancelled."""
        settings = self._settings
        sampler = Sampler(self.plane.metrics, settings.sample_s)

        async def sample() -> None:
            self._info = await self._background.call(lambda: self.plane.info)  # it lists files
            point = sampler.next()
            await self._background.call(lambda: registry.add_point(self._database, self.id, point))

        async with asyncio.TaskGroup() as group:
            group.create_task(every(settings.slot_s / 3, self._renew, "slots not renewed"))
            group.create_task(every(WRITE_S, self._write_in_time, "usage not written"))
            group.create_task(every(settings.watch_s, self._watch, "keys not watched"))
            group.create_task(every(REFRESH_S, self._refresh, "quotas not read"))
            group.create_task(every(settings.sample_s, sample, "metrics not kept"))

    async def leave(self) -> None:
        """Write what was used last, give back what is held, and say that this backbone is gone."""
        await self._background.settle()
        await self._bank.close()
        deadline = asyncio.get_running_loop().time() + LAST_WRITE_S
        while True:
            try:
                await self._write()
                await self._background.call(lambda: registry.left(self._database, self.id))
                break
            except AWAY as error:
                if asyncio.get_running_loop().time() > deadline:
                    lost = sum(meter.bytes_up + meter.bytes_down for meter in self._meters.values())
                    log.error("usage lost", sessions=len(self._meters), bytes=lost, reason=type(error).__name__)
                    break
                await asyncio.sleep(WRITE_AGAIN_S)
        await self._background.settle()
        self._background.close()

    def _register(self) -> None:
        registry.enter(self._database, self.id, self._url, self._announced)

    async def _renew(self) -> None:
        await self._bank.renew_slots([meter for meter in self._meters.values() if not meter.closed])

    def _write_soon(self) -> None:
        self._much.set()

    async def _write_in_time(self) -> None:
        """Write every `flush_s`, or as soon as half a lease has moved since."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.flush_s):
                await self._much.wait()
        self._much.clear()
        await self._write()

    async def _write(self) -> None:
        """Usage and views of the sessions that are here, and that this backbone lives."""
        now = utc_now()
        readings = [self._reading(meter) for meter in self._meters.values()]
        info, draining = self._announced, self.plane.draining
        spent = [(one, one.span, one.spent) for one in self._bank.allowances]
        await self._background.call(
            lambda: registry.write(self._database, self.id, self._url, info, draining, readings, now)
        )
        for allowance, span, amount in spent:
            if allowance.span == span:
                allowance.written = amount
        for one in readings:
            meter = self._meters[one.id]
            moved = one.bytes_up + one.bytes_down
            self._unwritten.total -= moved - meter.written
            meter.written = moved
            if one.closed_at is not None:
                del self._meters[one.id]
                data = {"reason": one.end_reason, "bytes_up": one.bytes_up, "bytes_down": one.bytes_down}
                self._background.later(self._emit("session.closed", meter, data | {"tokens": one.tokens}))

    def _reading(self, meter: SessionMeter) -> Reading:
        session, view = meter.session, {}
        if session is not None and not meter.closed:
            view = {
                "passes": session.view(),
                "held_bytes": session.held_bytes,
                "parked": session.parked,
                "leaving": session.leaving is not None,
            }
        caller = meter.caller
        return Reading(
            meter.id, caller.user, caller.key, meter.bytes_up, meter.bytes_down, meter.tokens, view, meter.closed_at,
            meter.end_reason,
        )  # fmt: skip

    async def _watch(self) -> None:
        """End sessions whose key is no longer good, or whose operator says so."""
        live = {meter.id: meter for meter in self._meters.values() if not meter.closed}
        if not live:
            return
        used = sorted({meter.caller.key for meter in live.values()})
        bad, commands = await self._background.call(lambda: registry.watch(self._database, self.id, used))
        for meter in live.values():
            if meter.caller.key in bad:
                meter.end(AuthenticationError("the key of this session was revoked, or its user disabled"))
            command = commands.get(meter.id)
            if command == Command.END:
                meter.end(SessionEndedError("the operator ended this session; what was finished is kept"))
            elif command == Command.DRAIN and meter.session is not None and meter.session.leaving is None:
                meter.session.drain(
                    AdmissionError("the operator moves this session; connect again", retry_after_s=COME_BACK_S)
                )

    async def _refresh(self) -> None:
        """Quotas that were made, changed or deleted hold for the sessions that are here."""
        live = [meter for meter in self._meters.values() if not meter.closed]
        if not live:
            return
        callers = list({meter.caller.key: meter.caller for meter in live}.values())
        found = await self._background.call(lambda: registry.quotas_of(self._database, callers))
        await self._bank.count_again()
        for meter in live:
            if not meter.closed:
                before = meter.shared
                meter.share(self._bank.shared(found[meter.caller.key]))
                self._bank.forget_unused(before)

    def _closed(self, meter: SessionMeter) -> None:
        self._bank.leave_slots(meter, meter.shared)
        self._bank.forget_unused(meter.shared)

    async def _abandon(self, opening: asyncio.Future[None], meter: SessionMeter) -> None:
        """The device left while its row was written: the row is closed with the next writing."""
        await asyncio.wait([opening])
        if not opening.cancelled() and opening.exception() is None:
            self._meters[meter.id] = meter

    async def _emit(self, kind: str, meter: SessionMeter, data: dict[str, Any]) -> None:
        event = Event(kind, meter.caller.user, {"session": meter.id} | data)
        await self._background.attempt_valkey(lambda: emit(self._valkey, event))

"""Where a backbone's blocks come from: what sessions of one quota share here, and its share of what is in Valkey.

    Bank.shared(quotas)        what sessions of these quotas share on this backbone, made at the first of them
    Bank.ask, .pace            called on a token's path; a task fetches the block and hands it over
    Bank.first_blocks          before a session begins: is anything left?

A counter that Valkey does not have is begun with what the database knows to be used; and every backbone adds what it
holds and has not written yet, once it sees that Valkey's memory is a new one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import structlog
from redis import Redis

from privatelora.platform import registry
from privatelora.platform.background import AWAY, AWAY_S, Background
from privatelora.platform.database import Database
from privatelora.platform.events import Event, emit
from privatelora.platform.leases import Grant, Leases
from privatelora.platform.meter import SessionMeter
from privatelora.platform.quotas import Window
from privatelora.platform.settings import Settings
from privatelora.platform.shared import Allowance, Rate, Shared, Slots, shared_for
from privatelora.platform.tables import Quota, utc_now
from privatelora.protocol.errors import AdmissionError

log = structlog.get_logger("privatelora.platform")

ASK_AGAIN_S = 0.5  # after which a block is asked for again where Valkey or the database is away


class LeaseBank:
    """The bank of one backbone.

    write : has what was spent written to the database soon.
    """

    def __init__(
        self,
        database: Database,
        valkey: Redis,
        settings: Settings,
        background: Background,
        write: Callable[[], None],
    ) -> None:
        self._database, self._valkey, self._settings = database, valkey, settings
        self._background, self._leases = background, Leases(valkey)
        self.write = write
        self._shared: dict[str, Shared] = {}  # by quota

    @property
    def allowances(self) -> list[Allowance]:
        """Windowed quotas that sessions here have."""
        return [one for one in self._shared.values() if isinstance(one, Allowance)]

    def shared(self, quotas: Sequence[Quota]) -> dict[str, Shared]:
        """What sessions of these quotas share here, by quota; changed limits hold from now on."""
        found = {}
        for quota in quotas:
            one = self._shared.get(quota.id)
            if one is None:
                settings = self._settings
                one = self._shared[quota.id] = shared_for(quota, self, settings.lease_bytes, settings.lease_tokens)
            elif one.quota.version != quota.version:
                one.change(quota)
            found[quota.id] = one
        return found

    def forget_unused(self, shared: Mapping[str, Shared]) -> None:
        """Of these, give back what no session holds any more."""
        for one in list(shared.values()):
            if not one.meters and self._shared.get(one.quota.id) is one:
                del self._shared[one.quota.id]
                if isinstance(one, Allowance):
                    self._background.later(self._give_back(one))

    async def close(self) -> None:
        """Give back everything."""
        for one in self.allowances:
            await self._give_back(one)

    # -- slots ---------------------------------------------------------------------------------------------------------

    async def take_slots(self, meter: SessionMeter, shared: Mapping[str, Shared]) -> None:
        """A slot of each quota that counts sessions; raises `AdmissionError` where one is full."""
        slots = _slots(shared)
        if slots:
            wanted = [(one.name, one.quota.limit) for one in slots]
            full = await self._background.answer_of_valkey(
                lambda: self._leases.hold(meter.id, wanted, self._settings.slot_s)
            )
            if full is not None:
                quota = slots[full].quota
                raise AdmissionError(
                    f"the {quota.level} has its {quota.limit} concurrent_sessions already; end one, or try again later",
                    retry_after_s=min(5.0, self._settings.slot_s),
                )

    def leave_slots(self, meter: SessionMeter, shared: Mapping[str, Shared]) -> None:
        """Give up the slots of a session."""
        names = [one.name for one in _slots(shared)]
        if names:
            self._background.later(self._background.attempt_valkey(lambda: self._leases.leave(meter.id, names)))

    async def renew_slots(self, meters: Sequence[SessionMeter]) -> None:
        """Keep the slots of these sessions."""
        held = [(one.name, meter.id) for meter in meters for one in _slots(meter.shared)]
        await self._background.ask_valkey(lambda: self._leases.renew(held, self._settings.slot_s))

    # -- blocks --------------------------------------------------------------------------------------------------------

    async def first_blocks(self, meter: SessionMeter) -> None:
        """Raise `QuotaError` where nothing is left; what another backbone gave back may be there again."""
        for one in meter.shared.values():
            if isinstance(one, Allowance) and not one.enough(1):
                one.spent_out = False
                came = meter.opening = asyncio.get_running_loop().create_future()
                one.waiting.append((meter, 1, partial(_settle, came)))
                one.ask(1)
                try:
                    async with asyncio.timeout(AWAY_S):
                        await came
                except TimeoutError:
                    raise AdmissionError(
                        "the service cannot count what is left of a quota now; try again", retry_after_s=AWAY_S
                    ) from None
                finally:
                    one.waiting = [entry for entry in one.waiting if entry[0] is not meter]

    def ask(self, allowance: Allowance, want: int) -> None:
        self._background.later(self._fetch(allowance, want))

    def pace(self, rate: Rate, nbytes: int) -> None:
        self._background.later(self._fetch_pace(rate, nbytes))

    async def count_again(self) -> None:
        """Where Valkey has lost its counters and others have begun them anew, add what is held here."""
        if not self.allowances:
            return
        epoch = await self._background.ask_valkey(self._leases.epoch)
        for one in self.allowances:
            if None not in (one.epoch, epoch) and one.epoch != epoch:
                amount, one.epoch = one.unknown, epoch
                await self._background.ask_valkey(partial(self._leases.add, _counter(one.quota, one.span), amount))

    async def _fetch(self, allowance: Allowance, want: int) -> None:
        span, quota = allowance.span, allowance.quota
        known, held = allowance.epoch, allowance.unknown
        try:
            grant = await self._background.ask_valkey(lambda: self._take(quota, span, want, known, held))
        except Exception as error:  # noqa: BLE001 (whatever it was: who waits for the block must not wait for ever)
            log.warning("quota not reached", quota=quota.id, reason=type(error).__name__)
            await asyncio.sleep(ASK_AGAIN_S)
            allowance.asking = False
            if allowance.meters or allowance.waiting:
                allowance.ask(0)
            return
        allowance.granted(quota, span, want, grant)
        if self._shared.get(quota.id) is not allowance:  # its last session ended meanwhile
            await self._give_back(allowance)
        for kind, limit in (("quota.soft_limit", quota.soft_limit), ("quota.spent", quota.limit)):
            if limit is not None and grant.total >= limit:
                data = {
                    "quota": quota.id, "level": quota.level, "subject": quota.subject, "resource": quota.resource,
                    "limit": limit, "used": grant.total, "resets_at": span.resets_at.isoformat(),
                }  # fmt: skip
                await self._background.attempt(partial(self._warn, quota, span, kind, data))

    def _take(self, quota: Quota, span: Window, want: int, known: bytes | None, held: int) -> Grant:
        """A block; where Valkey has lost its counters, with what the database and this backbone know of them."""
        counter = _counter(quota, span)
        live_s = int((span.resets_at - utc_now()).total_seconds()) + 60
        grant = self._leases.take(counter, quota.limit, want, None, live_s)
        if grant.amount < 0:
            used = registry.used(self._database, quota)
            grant = self._leases.take(counter, quota.limit, want, used, live_s)
        if known is not None and known != grant.epoch and held:
            self._leases.add(counter, held)
        return grant

    def _warn(self, quota: Quota, span: Window, kind: str, data: dict[str, Any]) -> None:
        """Once a window: an event, and a webhook if the quota has one."""
        name = f"privatelora:warned:{quota.id}:{kind}:{int(span.starts_at.timestamp())}"
        registry.warn(self._database, quota, f"{kind}:{quota.id}:{span.starts_at.isoformat()}", kind, data)
        if self._valkey.set(name, 1, nx=True, exat=int(span.resets_at.timestamp()) + 60):
            emit(self._valkey, Event(kind, registry.user_of(self._database, quota), data))

    async def _give_back(self, allowance: Allowance) -> None:
        """What is left of the block goes to other backbones."""
        amount, allowance.left = allowance.left, min(0, allowance.left)
        counter = _counter(allowance.quota, allowance.span)
        if amount > 0 and utc_now() < allowance.span.resets_at:
            await self._background.attempt_valkey(lambda: self._leases.add(counter, -amount))

    async def _fetch_pace(self, rate: Rate, nbytes: int) -> None:
        name, limit = f"rate:{rate.quota.id}", max(1, rate.quota.limit)
        try:
            wait_s = await self._background.ask_valkey(lambda: self._leases.pace(name, limit, nbytes))
        except AWAY:
            wait_s = nbytes / limit  # by this backbone's own clock
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        rate.granted(nbytes)


def _settle(came: asyncio.Future[None]) -> None:
    if not came.done():
        came.set_result(None)


def _slots(shared: Mapping[str, Shared]) -> list[Slots]:
    return [one for one in shared.values() if isinstance(one, Slots)]


def _counter(quota: Quota, span: Window) -> str:
    return f"used:{quota.id}:{int(span.starts_at.timestamp())}"

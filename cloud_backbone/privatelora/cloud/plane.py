"""What the connections of one backbone process share: model, compute, memory, sessions, and who may have one.

    Connection -> DataPlane.admit -> Session    at once, or after a wait in a bounded line
    DataPlane.keep_house                        parks silent devices, tells waiting ones their place
    DataPlane.drain                             lets running passes finish, and tells every device to come back

`endpoint.py` has the connections; here is nothing of HTTP or frames.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from privatelora.cloud.admission import Admission, Meter, Principal, Quota, Unmetered
from privatelora.cloud.backbone import Backbone
from privatelora.cloud.cost import row_bytes
from privatelora.cloud.engine import Engine
from privatelora.cloud.layers import LayerRunner
from privatelora.cloud.memory import SHARE, Memory, available_bytes
from privatelora.cloud.metrics import Metrics
from privatelora.cloud.resources import Resources
from privatelora.cloud.session import Session
from privatelora.cloud.sockets import Socket, Sockets
from privatelora.cloud.waiting import RETRY_S, Line, Waiter
from privatelora.decoder.kv import KVPool
from privatelora.protocol.errors import AdmissionError, ConfigurationError
from privatelora.protocol.frames import HEADER, VERSION
from privatelora.protocol.messages import DATA_PLANE_PATH, Limits, OpenRequest, ServiceInfo
from privatelora.protocol.placement import NAMES, Placement

log = structlog.get_logger("privatelora.cloud")

HOUSE_S = 1.0  # between two looks at who is silent
REMIND_S = 10.0  # after which who waits is told again; a device takes 60 s of silence for a lost connection
DRAIN_LOOK_S = 0.02  # between two looks at which passes are over
COME_BACK_S = 2.0  # after which a device may ask again that was sent away, by a drain or for its memory


@dataclass(frozen=True)
class DataPlaneSettings:
    """What one backbone process allows.

    Parameters
    ----------
    max_waiting : devices that may wait for a session, and passes that may wait for memory.
    memory_bytes : budget of KV blocks and training activations; None: half of what is free once the model is loaded.
    kept_layers : layers of the model, from its last, whose activations a training pass keeps; None: all. The others
        are computed again on the way back, which takes longer and keeps less than a third.
    park_after_s : silence after which a device is no longer waited for, and its memory may go to others.
    drain_s : what running passes get to finish in when the process is to stop.
    """

    placements: tuple[str, ...] = (*NAMES, "custom")
    default_placement: str = "paper"
    max_sessions: int = 64
    max_waiting: int = 64
    max_tokens_per_step: int = 8192
    max_sequences: int = 64
    max_streams: int = 16
    memory_bytes: int | None = None
    kept_layers: int | None = None
    idle_timeout_s: float = 600.0
    park_after_s: float = 30.0
    drain_s: float = 10.0
    torch_threads: int | None = None
    busy_poll_ms: float = 1.0


class Peer(Protocol):
    """The connection of a session, as the data plane sees it."""

    owner: Principal

    @property
    def socket(self) -> Socket: ...

    def write(self, header: bytes, payload: memoryview | bytes) -> None: ...

    def fail(self, error: BaseException) -> None: ...

    def tell_place(self, place: int, waiting: int) -> None: ...


@dataclass
class DataPlane:
    """One backbone process."""

    backbone: Backbone
    admission: Admission
    settings: DataPlaneSettings
    quota: Quota = field(default_factory=Unmetered)
    sessions: dict[int, Session] = field(default_factory=dict)
    connections: int = 0
    draining: bool = False

    def __post_init__(self) -> None:
        backbone, settings = self.backbone, self.settings
        config = backbone.config
        self.limits = message_limits(backbone, settings)
        self.memory = Memory(
            int(SHARE * available_bytes(backbone.device)) if settings.memory_bytes is None else settings.memory_bytes,
            settings.max_waiting,
        )
        one = KVPool(config, range(config.num_layers), 1, backbone.dtype)
        blocks = max(1, self.memory.total_bytes // one.block_bytes)
        self.pool = KVPool(config, one.layers, blocks, backbone.dtype, backbone.device)
        runner = LayerRunner(
            config, backbone.layers, backbone.tables, backbone.device, backbone.dtype, settings.kept_layers
        )
        self.sockets = Sockets.create(self.limits.max_message_bytes)
        self.metrics = Metrics(self)
        self.engine = Engine(
            runner, self.metrics.counted, settings.torch_threads, settings.busy_poll_ms / 1e3,
            self.sockets,
        )  # fmt: skip
        kept, lean = row_bytes(runner)
        self.resources = Resources(
            backbone, self.limits, self.engine, self.pool, self.memory, self.reclaim, self.check_serving, kept, lean
        )  # fmt: skip
        self.line = Line("another session", settings.max_waiting)

    @property
    def info(self) -> ServiceInfo:
        return ServiceInfo(
            protocol_version=VERSION,
            data_plane=DATA_PLANE_PATH,
            model=self.backbone.model_info,
            sets=self.backbone.set_infos(),
            default_sets=self.backbone.default_sets,
            placements=list(self.settings.placements),
            default_placement=self.settings.default_placement,
            limits=self.limits,
        )

    # -- sessions ------------------------------------------------------------------------------------------------------

    async def admit(self, peer: Peer, request: OpenRequest) -> Session:
        """A session for `peer`, once there is room; raises what makes it impossible, or that the line is full."""
        self.check_serving()
        self._check_placement(request.placement)
        number = secrets.randbits(63) | 1
        meter = await self.quota.open(peer.owner, number, request)
        try:
            return await self._room_for(peer, request, number, meter)
        except BaseException as error:
            meter.close(getattr(error, "code", "left"))
            raise

    async def _room_for(self, peer: Peer, request: OpenRequest, number: int, meter: Meter) -> Session:
        if self._has_room() and not len(self.line):
            return self._open(peer, request, number, meter)
        opened: asyncio.Future[Session] = asyncio.get_running_loop().create_future()

        def enter() -> None:
            try:
                opened.set_result(self._open(peer, request, number, meter))
            except Exception as error:  # noqa: BLE001 (it is the waiting connection's, which raises it)
                opened.set_exception(error)

        waiter = Waiter(self._has_room, enter, opened.set_exception, peer.tell_place)
        self.line.join(waiter)
        started = time.perf_counter()
        try:
            return await asyncio.shield(opened)
        except asyncio.CancelledError:
            self.line.leave(waiter)
            if opened.done() and not opened.cancelled() and opened.exception() is None:
                self.close(opened.result(), "left")  # it came too late
            raise
        finally:
            self.metrics.counted.admission_seconds["session"].observe(time.perf_counter() - started)

    def _open(self, peer: Peer, request: OpenRequest, number: int, meter: Meter) -> Session:
        self.check_serving()
        session = Session(
            number,
            peer.owner.user,
            request,
            self.resources,
            peer.write,
            meter,
            peer.fail,
            peer.socket,
        )
        self.sessions[session.id] = session
        meter.begin(session)
        return session

    def _has_room(self) -> bool:
        return len(self.sessions) < self.settings.max_sessions

    def close(self, session: Session, reason: str = "closed") -> None:
        """End a session, for a reason that its meter is told; the next in the line has its place."""
        if not session.closed:
            session.end_reason = reason
        session.close()
        if self.sessions.pop(session.id, None) is not None:
            self.line.advance()

    def check_room(self, used: int, room: int) -> None:
        """Raise `AdmissionError` if as many connections that may become a session are open as may be."""
        if used >= room:
            raise AdmissionError(
                f"all {self.settings.max_sessions} sessions of this service are in use, and more connections wait than "
                "may; try again later",
                retry_after_s=RETRY_S,
            )

    def check_serving(self) -> None:
        """Raise `AdmissionError` while the process is about to stop."""
        if self.draining:
            raise stopping()

    def _check_placement(self, placement: Placement) -> None:
        allowed = self.settings.placements
        name = placement.check(self.backbone.config.num_layers).describe(self.backbone.config.num_layers)
        if "custom" not in allowed and name not in allowed:
            raise ConfigurationError(f"placement {name} is not allowed here; use one of {', '.join(allowed)}")

    # -- memory --------------------------------------------------------------------------------------------------------

    def reclaim(self, nbytes: int) -> None:
        """Make room for `nbytes` from devices that have been silent, the longest first."""
        parked = [session for session in self.sessions.values() if session.parked and session.held_bytes]
        for session in sorted(parked, key=lambda session: session.heard_at):
            if self.memory.fits(nbytes):
                return
            self._give_up(session, "nothing came for a while, and others needed the memory; connect again and replay")

    def untie(self) -> None:
        """Where all who hold memory wait for more of it, the one that came last gives way."""
        holding = [session for session in self.sessions.values() if session.held_bytes]
        if len(holding) > 1 and all(session.waits for session in holding):
            last = max(holding, key=lambda session: session.heard_at)
            self._give_up(last, "others wait for the memory that this session holds; connect again and replay")

    def _give_up(self, session: Session, why: str) -> None:
        log.info("session given up", session=session.id, parked=session.parked, held_bytes=session.held_bytes)
        self.metrics.counted.evicted += 1
        session.ended(AdmissionError(why, retry_after_s=COME_BACK_S))
        self.close(session, "memory")

    # -- the life of the process ---------------------------------------------------------------------------------------

    async def keep_house(self) -> None:
        """Park the silent, tell the waiting their places, make room for the first of them; until it is cancelled."""
        while True:
            await asyncio.sleep(HOUSE_S)
            now = time.perf_counter()
            for session in list(self.sessions.values()):
                if now - session.heard_at > self.settings.park_after_s and session.awaits_device:
                    session.park()
            self.reclaim(self.memory.line.first_bytes())
            self.untie()
            for line in (self.line, self.memory.line):
                line.remind(REMIND_S)

    async def drain(self) -> None:
        """Take no new pass, let those that run finish, and send every device away with a time to come back."""
        self.draining = True
        log.info("draining", sessions=len(self.sessions))
        deadline = time.perf_counter() + self.settings.drain_s
        for line in (self.line, self.memory.line):
            line.dismiss(stopping())
        while self.sessions:
            late = time.perf_counter() > deadline
            for session in list(self.sessions.values()):
                if late or not session.passes:
                    session.ended(stopping())
                    self.close(session, "stopped")
            await asyncio.sleep(DRAIN_LOOK_S)
        log.info("drained")


def stopping() -> AdmissionError:
    """What a device is told by a process that is about to stop."""
    return AdmissionError(
        "this service is about to stop, and may be back soon; connect again", retry_after_s=COME_BACK_S
    )


def message_limits(backbone: Backbone, settings: DataPlaneSettings) -> Limits:
    """Limits to announce; the longest message is a step of the most tokens in float32, at the set's largest ranks."""
    widest = max(backbone.config.hidden_size, *(3 * max(s.max_rank_down, s.max_rank_up) for s in backbone.set_infos()))
    tables = 4 * settings.max_tokens_per_step + 12 * settings.max_sequences
    return Limits(
        max_tokens_per_step=settings.max_tokens_per_step,
        max_sequences=settings.max_sequences,
        max_streams=settings.max_streams,
        max_message_bytes=HEADER.size + tables + 4 * settings.max_tokens_per_step * widest,
        idle_timeout_s=settings.idle_timeout_s,
    )

"""One device's session: checks that each frame is the exchange that is due, and hands its pass on to the engine.

    message -> Session.receive -> Engine.submit ... Session.reply -> message

A frame that is due is known by its header: every byte of it follows from what was sent before, so the 48 bytes are
looked up as they are. Whatever else comes is read in full, and begins a pass or breaks a rule. A session holds KV
caches by sequence number and passes by (step, stream); nothing of it outlives the connection. Every refusal is a
`ProtocolError` (or another of the tree) that ends this session only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from privatelora.cloud.active import ActivePass, Key
from privatelora.cloud.admission import Meter
from privatelora.cloud.checks import check_spans, check_tensor, selected_rows, way_of
from privatelora.cloud.passes import PHASES, Account, Due, Pass, Way
from privatelora.cloud.resources import Resources
from privatelora.cloud.sockets import Socket
from privatelora.cloud.waiting import RETRY_S, Waiter
from privatelora.decoder.kv import KVCache
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.errors import (
    AdmissionError,
    ConfigurationError,
    IncompatibleError,
    PrivateLoraError,
    ProtocolError,
)
from privatelora.protocol.frames import ADDRESS, HEADER, NO_LAYER, VERSION, Frame, Kind, Phase, Selection
from privatelora.protocol.messages import OpenRequest, Queued, control_frame


@dataclass(eq=False)
class Session:
    """What the service knows of one connected device.

    send : writes one message (header, payload) to the device.
    meter : counts payload bytes and tokens, and says whether a pass may begin.
    ended : is told the error that ends the session.
    socket : stops and goes on reading from the device.
    """

    id: int
    user: str
    request: OpenRequest
    resources: Resources
    send: Callable[[bytes, memoryview | bytes], None]
    meter: Meter
    ended: Callable[[BaseException], None]
    socket: Socket
    account: Account = field(default_factory=Account)
    caches: dict[int, KVCache] = field(default_factory=dict)
    passes: dict[Key, ActivePass] = field(default_factory=dict)
    tokens: int = 0  # that went through the service's layers
    heard_at: float = field(default_factory=time.perf_counter)
    closed: bool = False
    end_reason: str = "closed"
    parked: bool = False
    held: bool = False
    leaving: PrivateLoraError | None = None  # why it takes no new step, and ends with the last pass
    _due: dict[bytes, ActivePass] = field(default_factory=dict)  # by the header of the frame that is due
    _of: dict[Pass, ActivePass] = field(default_factory=dict)
    _with_us: int = 0  # passes that wait for nothing from the device
    _step: int = 0
    _begun: set[int] = field(default_factory=set)  # streams of the current step

    def __post_init__(self) -> None:
        resources = self.resources
        self.backbone, self.limits, self.engine = resources.backbone, resources.limits, resources.engine
        request, model = self.request, self.backbone.parts
        if request.protocol_version != VERSION:
            raise IncompatibleError(
                f"the device speaks protocol version {request.protocol_version}, this service {VERSION}; "
                "install the same release on both"
            )
        if request.model_hash != model.model_hash:
            raise IncompatibleError(
                f"the device's adapter belongs to model {request.model_hash[:12]}, this service hosts "
                f"{model.model_hash[:12]} ({model.name}); connect to the other service, or start a new adapter"
            )
        self.placement = request.placement.check(self.backbone.config.num_layers)
        self.spec = request.spec
        self.dtype = WireDtype.named(request.wire_dtype)
        self.inline = {}
        if self.placement.inline:
            if request.set_hash is None:
                raise IncompatibleError("inline layers need an adapter set; name one of those at /v1/info")
            weights = self.backbone.inline_weights(request.set_hash, self.spec)
            self.inline = {l: weights[l] for l in self.placement.inline}

    @property
    def held_bytes(self) -> int:
        """Bytes that the session has taken of the memory."""
        return sum(cache.nbytes for cache in self.caches.values()) + sum(a.held_bytes for a in self.passes.values())

    @property
    def awaits_device(self) -> bool:
        """Whether nothing goes on before the device says something; other passes of its own may wait for memory."""
        passes = self.passes.values()
        return (
            not self.held
            and not self.waits
            and all(active.work.due is not None or active.waiter is not None for active in passes)
        )

    @property
    def waits(self) -> bool:
        """Whether it has passes, and all of them wait for memory."""
        return bool(self.passes) and all(active.waiter is not None for active in self.passes.values())

    def park(self) -> None:
        """Wait for the device no longer: what it holds is kept, but others may have it if they need it."""
        if not self.parked:
            self.parked = True
            self._forget()

    def close(self) -> None:
        """Give up every pass, and everything that the session holds as soon as no thread uses it."""
        if not self.closed:
            self.closed = True
            self._forget()
            self._due.clear()
            self.resources.memory.line.leave(*(a.waiter for a in self.passes.values() if a.waiter is not None))
            self.settle()

    def settle(self) -> None:
        """A unit of one of the passes is over: a closed session lets go of what it held."""
        if self.closed and not any(active.work.running for active in self.passes.values()):
            held = self.held_bytes
            for work in self._of:
                self.meter.spend(work.moved_up, work.moved_down)
            for active in self.passes.values():
                active.work.forget()
            for cache in self.caches.values():
                cache.release()
            self.passes.clear()
            self._of.clear()
            self.caches.clear()
            self.resources.memory.give(held)
            self.meter.close(self.end_reason)

    def drain(self, error: PrivateLoraError) -> None:
        """Take no new step, and end with this error once the running passes are over."""
        self.leaving = error
        if not self.passes:
            self.ended(error)

    def hold(self) -> None:
        """Its device is held back for a while: nobody waits for it, and its silence is not its own."""
        self.held = True
        self._forget()

    def let_go(self) -> None:
        """Its device is held back no longer."""
        self.held, self.heard_at = False, time.perf_counter()

    def view(self) -> list[dict[str, str | int]]:
        """Its passes as the layer scheduler has them: phase, step, stream, tokens, layer, and what each waits for."""
        return [active.view() for active in self.passes.values()]

    def _forget(self) -> None:
        """The scheduler does not count on this session any more."""
        self.engine.scheduler.leave(self.account)
        for active in self.passes.values():
            self.engine.scheduler.leave(active.work)

    # -- frames that come ----------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Take one message; raises what ends the session."""
        self.heard_at, self.parked = time.perf_counter(), False
        active = self._due.pop(data[: HEADER.size], None)
        due = active.work.due if active is not None else None
        if active is None or due is None or len(data) != HEADER.size + due.nbytes:
            self._other(Frame.unpack(data))  # or says what is wrong with it
        else:
            self._answer(active, due, memoryview(data)[HEADER.size :])

    def _answer(self, active: ActivePass, due: Due, payload: memoryview | bytes) -> None:
        """What was due of a pass has come."""
        work = active.work
        work.due, work.answer, work.answer_shape = None, payload, due.shape
        self.meter.spend(due.nbytes, 0)
        self.engine.counted.device_seconds[due.point.way].observe(self.heard_at - work.told_at)
        if not work.direct:
            self._computing(1)
        self.engine.submit(work, due.point)

    def _computing(self, more: int) -> None:
        """As many passes as may be under way are with the service: who sends more is not read until one is answered."""
        before, most = self._with_us, self.limits.max_streams
        self._with_us = before + more
        if self._with_us >= most:
            self.socket.pause("streams")
        elif before >= most:
            self.socket.resume("streams")

    def _other(self, frame: Frame) -> None:
        """A frame that is not due: it begins a pass, drops caches, or breaks a rule."""
        if frame.session != self.id:
            raise ProtocolError(
                f"the frame names session {frame.session}, which is not this connection's; open a session of your own"
            )
        if frame.kind is Kind.RELEASE:
            self._release(frame)
            return
        key = (frame.step, frame.stream)
        active = self.passes.get(key)
        if frame.kind is Kind.HIDDEN and frame.phase is not Phase.BACKWARD and active is None:
            self.meter.spend(frame.payload_bytes, 0)
            self._begin(key, frame)
            return
        due = active.work.due if active else None
        if active is not None and due is not None and _is_due(frame, due):
            check_tensor(frame, self.dtype, due.shape)
            self.socket.answered()  # its header is the one that is due, of a volley, and it came in pieces
            self._answer(active, due, frame.payload)
            return
        wanted = "nothing"
        if active is not None and due is not None:
            phase, layer = _phase_and_layer(due)
            wanted = f"{due.kind.name} of layer {layer} in {phase.name}"
        raise ProtocolError(
            f"{frame.kind.name} of layer {frame.layer} in {frame.phase.name} came for step {frame.step}, stream "
            f"{frame.stream}, where {wanted} is due; frames must not be repeated or reordered"
        )

    def _begin(self, key: Key, frame: Frame) -> None:
        """Start a pass with h_first; checks spans, selection and limits."""
        step, stream = key
        if step < self._step or (step == self._step and stream in self._begun):
            raise ProtocolError(
                f"step {step}, stream {stream} was begun before (now at step {self._step}); count upwards"
            )
        if stream >= self.limits.max_streams or len(self.passes) >= self.limits.max_streams:
            raise ProtocolError(f"more than {self.limits.max_streams} streams are under way; finish or release some")
        if frame.phase not in (Phase.GENERATE, Phase.SCORE, Phase.TRAIN) or frame.layer != NO_LAYER:
            raise ProtocolError(f"a pass cannot begin in phase {frame.phase.name} at layer {frame.layer}")
        if frame.phase is Phase.TRAIN and not self.placement.sends_gradient:
            raise ProtocolError("this placement trains nothing below the device's last layers; use phase SCORE")
        spans = frame.spans.astype(np.int64)
        sequences, starts, lengths = (tuple(column.tolist()) for column in spans.T) if len(spans) else ((), (), ())
        n = sum(lengths)
        busy = {sequence for active in self.passes.values() for sequence in active.sequences}
        held = {sequence: cache.length for sequence, cache in self.caches.items()}
        if frame.phase is not Phase.GENERATE:
            busy, held = set(), {}
        check_spans(sequences, starts, lengths, held, busy, self.backbone.config.context_length)
        if n > self.limits.max_tokens_per_step:
            raise ProtocolError(
                f"{n} tokens in a step are over the limit of {self.limits.max_tokens_per_step}; send fewer"
            )
        check_tensor(frame, self.dtype, (n, self.backbone.config.hidden_size))
        rows = selected_rows(frame, lengths, self.placement)
        if frame.phase is Phase.TRAIN:
            saved = sum(p.work.n for p in self.passes.values() if p.phase is Phase.TRAIN)
            if saved + n > self.limits.max_tokens_per_step:
                raise ProtocolError(
                    f"activations of {saved} tokens are kept for backward passes and {n} more would go over the limit "
                    f"of {self.limits.max_tokens_per_step}; use smaller batches, or send the gradients first"
                )
        if step != self._step or not self.passes:
            self.resources.check_serving()  # a step that has begun may be finished
            if self.leaving is not None:
                raise self.leaving
        caches = self._caches_for(sequences) if frame.phase is Phase.GENERATE else None
        if step != self._step:
            self._step, self._begun = step, set()
        self._begun.add(stream)
        end = self.placement.cloud_layers(self.backbone.config.num_layers).stop
        way = way_of(frame.phase, single=n == len(lengths))
        direct = way is Way.DECODE and not any(active.work.direct for active in self.passes.values())
        work = Pass(
            self, self.placement, self.inline, way, lengths, starts, caches, rows, end, self.dtype,
            ADDRESS.pack(self.id, step, stream), direct, answer=frame.payload, answer_shape=frame.shape,
        )  # fmt: skip
        if not direct:
            self._computing(1)
        active = self.passes[key] = self._of[work] = ActivePass(key, frame.phase, sequences, work, self.heard_at)
        self._admit(active)

    def _admit(self, active: ActivePass) -> None:
        """Take what the pass must keep, and go on; or wait for it."""
        work, pool = active.work, self.resources.pool
        ends = [start + length for start, length in zip(work.starts, work.lengths, strict=True)]
        blocks = sum(cache.missing(end) for cache, end in zip(work.caches or (), ends, strict=False))
        own = self.resources.pass_bytes(work.way, work.n, self.placement)
        needed = own + blocks * pool.block_bytes

        def enter() -> None:
            if active.waiter is not None:
                waited = time.perf_counter() - active.began_at
                self.engine.counted.admission_seconds["memory"].observe(waited)
            self.resources.memory.take(needed)
            active.held_bytes, active.waiter = own, None
            for cache, end in zip(work.caches or (), ends, strict=False):
                cache.reserve(end)
            self.engine.submit(work, work.first_point)

        self.meter.admit(work.n, needed, lambda: self._find_room(active, needed, enter))

    def _find_room(self, active: ActivePass, needed: int, enter: Callable[[], None]) -> None:
        """`enter` once there are `needed` bytes of memory."""
        if self.closed:  # while the pass waited for a quota
            return
        work, memory = active.work, self.resources.memory
        self.tokens += work.n
        if needed > memory.total_bytes:
            raise ConfigurationError(
                f"this pass of {work.n} tokens must keep {needed / 2**20:.3g} MiB, and the service has "
                f"{memory.total_bytes / 2**20:.3g} MiB for everybody; use smaller batches, more "
                "micro_batches or shorter texts"
            )
        cached = sum(cache.nbytes for cache in self.caches.values())
        if needed + cached > memory.total_bytes:  # it would wait for itself
            raise AdmissionError(
                f"this pass of {work.n} tokens must keep {needed / 2**20:.3g} MiB beside {cached / 2**20:.3g} MiB of "
                "this session's texts, and the service has not so much; connect again and replay"
            )
        if not memory.fits(needed):
            self.resources.reclaim(needed)
        if memory.fits(needed) and (work.way is Way.DECODE or not len(memory.line)):
            enter()
        elif work.way is Way.DECODE:
            raise AdmissionError(  # it holds memory: were it to wait with it, all could wait for one another
                "the service has no memory for another token of yours now; connect again and replay",
                retry_after_s=RETRY_S,
            )
        else:
            waiter = active.waiter = Waiter(
                lambda: memory.fits(needed), enter, self.ended, lambda *place: self._tell(active.key, *place), needed
            )
            memory.line.join(waiter)

    def tell_waiting(self) -> None:
        """QUEUED: the device is held back, and not forgotten."""
        self._tell((0, 0), 1, 1)

    def _tell(self, key: Key, place: int, waiting: int) -> None:
        """QUEUED: a pass has no memory yet, or may not go on yet."""
        frame = control_frame(Kind.QUEUED, Queued(place=place, waiting=waiting), self.id)
        frame.step, frame.stream = key
        self.send(frame.pack(), b"")

    # -- frames that go ------------------------------------------------------------------------------------------------

    def reply(self, one: Pass, header: bytes, data: memoryview | bytes, due: Due | None, due_header: bytes) -> None:
        """The engine has something for the device."""
        active, way = self._of[one], one.way
        one.told_at = time.perf_counter()
        if not one.direct:
            self._computing(-1)
        if due is None:
            del self.passes[active.key], self._of[one]
            one.forget()
            self.resources.memory.give(active.held_bytes)
        else:
            one.due = due
            self._due[due_header] = active
            one.way = due.point.way if due.point.way is Way.BACKWARD else way
        if due is None or one.way is not way:  # this way through the layers is over
            counted = self.engine.counted
            counted.pass_seconds[way].observe(one.told_at - active.began_at)
            counted.tokens[way] += one.n
            active.began_at = one.told_at
        up, down = one.moved_up, one.moved_down
        one.moved_up = one.moved_down = 0
        self.meter.spend(up, down + len(data))
        self.send(header, data)
        if self.leaving is not None and not self.passes:
            self.ended(self.leaving)

    def fail(self, error: BaseException) -> None:
        """One of the passes cannot go on, and with it the session."""
        if not self.closed:
            self.ended(error)

    # -- KV caches -----------------------------------------------------------------------------------------------------

    def _release(self, frame: Frame) -> None:
        """Drop KV caches by sequence number."""
        for sequence in frame.spans[:, 0].tolist():
            if any(sequence in active.sequences for active in self.passes.values()):
                raise ProtocolError(f"sequence {sequence} is under way in a pass; wait for its result, then release it")
            cache = self.caches.pop(sequence, None)
            if cache is not None:
                held = cache.nbytes
                cache.release()
                self.resources.memory.give(held)
        self.engine.scheduler.leave(self.account)  # no next token is awaited

    def _caches_for(self, sequences: tuple[int, ...]) -> tuple[KVCache, ...]:
        fresh = [sequence for sequence in sequences if sequence not in self.caches]
        if len(self.caches) + len(fresh) > self.limits.max_sequences:
            raise ProtocolError(
                f"{len(self.caches) + len(fresh)} sequences are over the limit of {self.limits.max_sequences}; "
                "release some"
            )
        for sequence in fresh:
            self.caches[sequence] = KVCache(self.resources.pool)
        return tuple(self.caches[sequence] for sequence in sequences)


def _phase_and_layer(due: Due) -> tuple[Phase, int]:
    return PHASES[due.point.way], NO_LAYER if due.kind is Kind.GRAD_HIDDEN else due.point.layer


def _is_due(frame: Frame, due: Due) -> bool:
    plain = frame.selection is Selection.ALL and not len(frame.spans) and not len(frame.outputs)
    return plain and (frame.kind, frame.phase, frame.layer) == (due.kind, *_phase_and_layer(due))

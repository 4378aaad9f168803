"""One device's session: checks that each frame is the exchange that is due, and turns it into a unit of work.

    frame -> Session.accept -> Work (run by the engine) -> frames back to the device

A session holds KV caches by sequence number and passes by (step, stream); nothing of it outlives the connection. Every
refusal is a `ProtocolError` (or another of the tree) that ends this session only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from privatelora.cloud.backbone import Backbone
from privatelora.cloud.passes import Encoded, Finished, GradDelta, GradInput, Outcome, SplitPass
from privatelora.decoder.ragged import KVCache, Ragged
from privatelora.decoder.tensors import to_array, to_tensor
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.errors import IncompatibleError, ProtocolError
from privatelora.protocol.frames import NO_LAYER, VERSION, Frame, Kind, Phase, Selection
from privatelora.protocol.messages import Limits, OpenRequest

Key = tuple[int, int]
"""(step, stream)"""


@dataclass(frozen=True)
class Work:
    """A unit of work over `rows` rows: `run` gives the frame that it leads to.

    If that frame is to be answered (`waits`), `ahead` may run once it is on its way: it computes what the answer does
    not change.
    """

    rows: int
    run: Callable[[], Frame | None]
    ahead: Callable[[], None]
    waits: Callable[[], bool]


@dataclass(frozen=True)
class Due:
    """The frame that a pass waits for."""

    kind: Kind
    phase: Phase
    layer: int
    shape: tuple[int, ...]


@dataclass
class ActivePass:
    """A pass between two frames; `due` is None while the engine works on it."""

    split: SplitPass
    phase: Phase
    sequences: tuple[int, ...]
    due: Due | None = None


@dataclass
class Session:
    """What the service knows of one connected device."""

    id: int
    user: str
    request: OpenRequest
    backbone: Backbone
    limits: Limits
    caches: dict[int, KVCache] = field(default_factory=dict)
    passes: dict[Key, ActivePass] = field(default_factory=dict)
    tokens: int = 0  # that went through the service's layers
    closed: bool = False
    _step: int = 0
    _begun: set[int] = field(default_factory=set)  # streams of the current step

    def __post_init__(self) -> None:
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
    def saved_bytes(self) -> int:
        """Bytes of KV caches held."""
        return sum(cache.nbytes for cache in self.caches.values())

    def close(self) -> None:
        """Drop everything that the session holds; work still queued for it does nothing."""
        self.closed = True
        self.passes.clear()
        self.caches.clear()

    def accept(self, frame: Frame) -> Work | None:
        """Check a frame and return the work that it asks for; None where there is nothing to compute."""
        if frame.session != self.id:
            raise ProtocolError(
                f"the frame names session {frame.session}, which is not this connection's; open a session of your own"
            )
        if frame.kind is Kind.RELEASE:
            self._release(frame)
            return None
        key = (frame.step, frame.stream)
        if frame.kind is Kind.HIDDEN and frame.phase is not Phase.BACKWARD and key not in self.passes:
            return self._begin(key, frame)
        active = self.passes.get(key)
        due = active.due if active else None
        if active is None or due is None or (frame.kind, frame.phase, frame.layer) != (due.kind, due.phase, due.layer):
            wanted = f"{due.kind.name} of layer {due.layer} in {due.phase.name}" if due else "nothing"
            raise ProtocolError(
                f"{frame.kind.name} of layer {frame.layer} in {frame.phase.name} came for step {frame.step}, stream "
                f"{frame.stream}, where {wanted} is due; frames must not be repeated or reordered"
            )
        self._check_tensor(frame, due.shape)
        active.due = None
        tensor = self._tensor(frame)
        advance = {
            Kind.DELTA: active.split.resume,
            Kind.GRAD_HIDDEN: active.split.back,
            Kind.GRAD_ENCODED: active.split.back_resume,
        }[frame.kind]
        return self._work(key, active, lambda: advance(tensor))

    def _begin(self, key: Key, frame: Frame) -> Work:
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
        self._check_spans(sequences, starts, lengths, frame.phase)
        if n > self.limits.max_tokens_per_step:
            raise ProtocolError(
                f"{n} tokens in a step are over the limit of {self.limits.max_tokens_per_step}; send fewer"
            )
        self._check_tensor(frame, (n, self.backbone.config.hidden_size))
        rows = self._rows(frame, lengths)
        if frame.phase is Phase.TRAIN:
            saved = sum(p.split.ragged.n for p in self.passes.values() if p.phase is Phase.TRAIN)
            if saved + n > self.limits.max_tokens_per_step:
                raise ProtocolError(
                    f"activations of {saved} tokens are kept for backward passes and {n} more would go over the limit "
                    f"of {self.limits.max_tokens_per_step}; use smaller batches, or send the gradients first"
                )
        caches = self._caches_for(sequences) if frame.phase is Phase.GENERATE else None
        h = self._tensor(frame)
        if step != self._step:
            self._step, self._begun = step, set()
        self._begun.add(stream)
        self.tokens += n

        config = self.backbone.config
        ragged = Ragged(config, self.backbone.tables, lengths, starts, caches)
        split = SplitPass(
            config, self.backbone.layers, self.placement, self.inline, ragged, rows, keep=frame.phase is Phase.TRAIN
        )
        active = self.passes[key] = ActivePass(split, frame.phase, sequences)
        return self._work(key, active, lambda: split.start(h))

    def _work(self, key: Key, active: ActivePass, advance: Callable[[], Outcome]) -> Work:
        def ahead() -> None:
            if not self.closed:
                active.split.ahead()

        run = partial(self._reply, key, active, advance)
        return Work(active.split.ragged.n, run, ahead, waits=lambda: active.due is not None)

    def _reply(self, key: Key, active: ActivePass, advance: Callable[[], Outcome]) -> Frame | None:
        """Run one unit of work and write the frame that it leads to."""
        if self.closed:
            return None
        outcome = advance()
        n, (step, stream) = active.split.ragged.n, key
        backward = Phase.BACKWARD
        if isinstance(outcome, Encoded):
            frame = Frame(Kind.ENCODED, self.id, active.phase, step, stream, outcome.layer)
            active.due = Due(Kind.DELTA, active.phase, outcome.layer, self.spec.delta_shape(n))
            return frame.with_array(to_array(outcome.u, self.dtype), self.dtype)
        if isinstance(outcome, Finished):
            frame = Frame(Kind.HIDDEN, self.id, active.phase, step, stream)
            if active.phase is Phase.TRAIN:
                active.due = Due(Kind.GRAD_HIDDEN, backward, NO_LAYER, tuple(outcome.h.shape))
            else:
                self.passes.pop(key, None)
            return frame.with_array(to_array(outcome.h, self.dtype), self.dtype)
        if isinstance(outcome, GradDelta):
            frame = Frame(Kind.GRAD_DELTA, self.id, backward, step, stream, outcome.layer)
            if outcome.awaits_u:
                active.due = Due(Kind.GRAD_ENCODED, backward, outcome.layer, self.spec.encoded_shape(n))
            else:
                self.passes.pop(key, None)
            return frame.with_array(to_array(outcome.dv, self.dtype), self.dtype)
        assert isinstance(outcome, GradInput)
        self.passes.pop(key, None)
        frame = Frame(Kind.GRAD_HIDDEN, self.id, backward, step, stream)
        return frame.with_array(to_array(outcome.dh, self.dtype), self.dtype)

    def _release(self, frame: Frame) -> None:
        """Drop KV caches by sequence number."""
        for sequence in frame.spans[:, 0].tolist():
            self.caches.pop(sequence, None)

    def _check_spans(
        self, sequences: tuple[int, ...], starts: tuple[int, ...], lengths: tuple[int, ...], phase: Phase
    ) -> None:
        if not sequences or len(set(sequences)) != len(sequences) or min(lengths) < 1:
            raise ProtocolError("a pass needs one span or more, of different sequences and of one token or more each")
        context = self.backbone.config.context_length
        busy = {sequence for active in self.passes.values() for sequence in active.sequences}
        for sequence, start, length in zip(sequences, starts, lengths, strict=True):
            held = self.caches[sequence].length if phase is Phase.GENERATE and sequence in self.caches else 0
            if start != held:
                raise ProtocolError(f"sequence {sequence} starts at {start}, where {held} tokens are held")
            if start + length > context:
                raise ProtocolError(
                    f"sequence {sequence} would reach {start + length} tokens; the model's context is {context}"
                )
            if phase is Phase.GENERATE and sequence in busy:
                raise ProtocolError(f"sequence {sequence} is under way in another pass; wait for its result")

    def _caches_for(self, sequences: tuple[int, ...]) -> list[KVCache]:
        fresh = [sequence for sequence in sequences if sequence not in self.caches]
        if len(self.caches) + len(fresh) > self.limits.max_sequences:
            raise ProtocolError(
                f"{len(self.caches) + len(fresh)} sequences are over the limit of {self.limits.max_sequences}; "
                "release some"
            )
        layers = self.placement.cloud_layers(self.backbone.config.num_layers)
        for sequence in fresh:
            self.caches[sequence] = KVCache(self.backbone.config, layers, self.backbone.dtype, self.backbone.device)
        return [self.caches[sequence] for sequence in sequences]

    def _rows(self, frame: Frame, lengths: tuple[int, ...]) -> torch.Tensor | None:
        """Rows of the result that the device asked for; None for all of them."""
        if frame.selection is Selection.ALL and not len(frame.outputs):
            return None
        if self.placement.last:
            raise ProtocolError("the device holds the last layers, which need every row; use Selection.ALL")
        if frame.selection is Selection.LAST and not len(frame.outputs):
            return torch.tensor(lengths).cumsum(0) - 1
        outputs = frame.outputs.astype(np.int64)
        if not len(outputs) or outputs[-1] >= sum(lengths) or bool((np.diff(outputs) <= 0).any()):
            raise ProtocolError("listed outputs must be ascending row numbers of this batch, one or more")
        return torch.from_numpy(outputs)

    def _check_tensor(self, frame: Frame, shape: tuple[int, ...]) -> None:
        if frame.dtype is not self.dtype or frame.shape != shape:
            raise ProtocolError(
                f"{frame.kind.name} came as {frame.dtype.name} of shape {frame.shape}; "
                f"{self.dtype.name} of shape {shape} is due"
            )

    def _tensor(self, frame: Frame) -> torch.Tensor:
        return to_tensor(frame.array(), self.dtype, self.backbone.dtype, self.backbone.device)

"""The service's layers, used from the device: one pass at a time over one connection.

    forward:   h_first up; at every inline layer u down, v = M(u) up; h_{L-last} down
    backward:  dL/dh_{L-last} up; at every inline layer dL/dv down, dL/du up; dL/dh_first down

`RemoteLayers` knows the wire and the adapter, not tokens or losses. It opens its connection when it is first needed and
after it was lost; what to replay then is the caller's to know (`session.py` keeps the token history).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from privatelora.decoder.tensors import to_array, to_tensor
from privatelora.device.adapters import Adapter, AdapterSettings
from privatelora.device.connection import ByteCount, Connection
from privatelora.device.service import Service
from privatelora.device.threads import one_thread
from privatelora.protocol.accounting import Traffic, backward_traffic, forward_traffic
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.errors import ConnectionLostError, ProtocolError
from privatelora.protocol.frames import NO_LAYER, Frame, Kind, Phase, Selection
from privatelora.protocol.messages import Opened, OpenRequest, control_frame, parse
from privatelora.protocol.placement import Placement


@dataclass(frozen=True)
class Span:
    """New tokens of one sequence: its number, the position of the first, and how many."""

    sequence: int
    start: int
    length: int


@dataclass
class Trace:
    """What a training pass keeps for its way back: u and v of every inline layer, with v's graph."""

    step: int
    n: int
    n_out: int
    exchanged: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class RemoteLayers:
    """The layers that the service holds, adapted by this device's M."""

    def __init__(
        self,
        service: Service,
        placement: Placement,
        settings: AdapterSettings,
        set_hash: str | None,
        wire_dtype: WireDtype,
        dtype: torch.dtype,
    ) -> None:
        self.service, self.placement, self.spec = service, placement, settings.spec
        self.wire_dtype, self.dtype = wire_dtype, dtype
        self.count = ByteCount()  # what really crossed the socket
        self.expected = Traffic()  # what the formula says of the same passes, in bytes
        self._set_hash = set_hash
        self._connection: Connection | None = None
        self._session = 0
        self._step = 0
        self._sequence = 0

    @property
    def session(self) -> int:
        """Number of the session that holds this device's caches at the service; 0 while there is none."""
        return self._session if self._connection is not None else 0

    def connect(self) -> None:
        """Open the connection and the session on it, if there is none."""
        if self._connection is not None:
            return
        info = self.service.info
        connection = Connection(
            self.service.data_plane_url,
            self.service.token or "",
            self.count,
            self.service.timeout_s,
            info.limits.max_message_bytes,
            self.service.tls,
        )
        request = OpenRequest(
            model_hash=info.model.sha256,
            set_hash=self._set_hash,
            spec=self.spec,
            placement=self.placement,
            wire_dtype=self.wire_dtype.name.lower(),
        )
        try:
            connection.send(control_frame(Kind.OPEN, request))
            opened = connection.receive()
            if opened.kind is not Kind.OPENED:
                raise ProtocolError(f"the service answered OPEN with {opened.kind.name}; install one release on both")
            self._session = parse(opened.payload, Opened).session
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._step = 0

    def disconnect(self) -> None:
        """Close the connection; the service drops everything that it held for this session."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def forward(
        self, h: Tensor, spans: Sequence[Span], phase: Phase, adapter: Adapter, rows: Tensor | None = None
    ) -> tuple[Tensor, Trace]:
        """h_first (n, d) through the service's layers: h_{L-last} (n_o, d), and the trace for `backward`.

        `rows` (n_o,) are the rows whose result is needed, ascending; None for all. A placement with last layers always
        gets all of them.
        """
        self.connect()
        n = h.shape[0]
        self._step += 1
        begin = self._frame(Kind.HIDDEN, phase)
        begin.spans = np.array([(s.sequence, s.start, s.length) for s in spans], np.uint32)
        if rows is not None and not self.placement.last:
            begin.selection, begin.outputs = _selection(rows, spans)
        n_out = n if begin.selection is Selection.ALL else len(rows) if rows is not None else n
        trace = Trace(self._step, n, n_out)
        shape = self.service.info.model.shape
        self.expected += forward_traffic(shape, self.placement, self.spec, n, n_out, self.wire_dtype)
        self._send(begin, h)
        with torch.set_grad_enabled(phase is Phase.TRAIN), one_thread():
            for layer in self.placement.inline:
                u = self._receive(Kind.ENCODED, phase, layer, self.spec.encoded_shape(n))
                if phase is Phase.TRAIN:
                    u = u.float().requires_grad_(self._answers_gradient(layer))
                v = adapter.delta(layer, u)  # (n, 3, r_up)
                if phase is Phase.TRAIN:
                    trace.exchanged[layer] = u, v
                self._send(self._frame(Kind.DELTA, phase, layer), v)
        return self._receive(Kind.HIDDEN, phase, NO_LAYER, (n_out, h.shape[1])), trace

    def backward(self, trace: Trace, grad: Tensor, adapter: Adapter) -> tuple[Tensor | None, dict[str, Tensor]]:
        """dL/dh_{L-last} (n_o, d) back through the service: dL/dh_first (n, d) if trained there, and M's gradients."""
        shape = self.service.info.model.shape
        self.expected += backward_traffic(shape, self.placement, self.spec, trace.n, trace.n_out, self.wire_dtype)
        self._send(self._frame(Kind.GRAD_HIDDEN, Phase.BACKWARD), grad)
        gradients: dict[str, Tensor] = {}
        with one_thread():
            for layer in reversed(self.placement.inline):
                gradients |= self._back_through(layer, trace, adapter)
        if not self.placement.trains_first:
            return None, gradients
        return self._receive(Kind.GRAD_HIDDEN, Phase.BACKWARD, NO_LAYER, (trace.n, grad.shape[1])), gradients

    def new_sequence(self) -> int:
        """A number for a KV cache that was not used before."""
        self._sequence += 1
        return self._sequence

    def _back_through(self, layer: int, trace: Trace, adapter: Adapter) -> dict[str, Tensor]:
        """M's gradients at one inline layer; answers dL/dv with dL/du where that is needed."""
        u, v = trace.exchanged.pop(layer)
        dv = self._receive(Kind.GRAD_DELTA, Phase.BACKWARD, layer, self.spec.delta_shape(trace.n)).float()
        named = {f"m.{layer}.{name}": p for name, p in adapter.m[str(layer)].named_parameters()}
        leaves = [*named.values(), u] if u.requires_grad else [*named.values()]
        found = torch.autograd.grad(v, leaves, dv)
        if u.requires_grad:
            self._send(self._frame(Kind.GRAD_ENCODED, Phase.BACKWARD, layer), found[-1])
        return dict(zip(named, found, strict=False))

    def release(self, sequences: Sequence[int]) -> None:
        """Let the service drop the KV caches of sequences that are done."""
        if self._connection is None:
            return
        frame = self._frame(Kind.RELEASE, Phase.NONE)
        frame.spans = np.array([(s, 0, 0) for s in sequences], np.uint32)
        try:
            self._connection.send(frame)
        except ConnectionLostError:
            self.disconnect()  # the service drops everything with the connection

    def _answers_gradient(self, layer: int) -> bool:
        """Whether dL/du of this layer is needed: not at the lowest inline layer with nothing trained below."""
        return layer != self.placement.inline[0] or self.placement.trains_first

    def _frame(self, kind: Kind, phase: Phase, layer: int = NO_LAYER) -> Frame:
        return Frame(kind, self._session, phase, self._step, 0, layer)

    def _send(self, frame: Frame, tensor: Tensor) -> None:
        assert self._connection is not None
        self._connection.send(frame.with_array(to_array(tensor, self.wire_dtype), self.wire_dtype))

    def _receive(self, kind: Kind, phase: Phase, layer: int, shape: tuple[int, ...]) -> Tensor:
        assert self._connection is not None
        frame = self._connection.receive()
        due = (kind, phase, self._step, layer, self.wire_dtype, shape)
        came = (frame.kind, frame.phase, frame.step, frame.layer, frame.dtype, frame.shape)
        if came != due:
            raise ProtocolError(f"the service sent {came} where {due} is due; install the same release on both")
        return to_tensor(frame.array(), self.wire_dtype, self.dtype)


def _selection(rows: Tensor, spans: Sequence[Span]) -> tuple[Selection, np.ndarray[tuple[int], np.dtype[np.uint32]]]:
    """How to ask for `rows` in the fewest bytes."""
    outputs = rows.numpy().astype(np.uint32)
    lasts = np.cumsum([span.length for span in spans], dtype=np.uint32) - np.uint32(1)
    if np.array_equal(outputs, lasts):
        return Selection.LAST, np.empty(0, np.uint32)
    return Selection.LISTED, outputs

"""The service's layers, used from the device: one session over one connection, and several passes side by side on it.

    run(passes)    each pass (`stream.py`) says what to send and what is due; whichever's answer comes goes on

While one micro-batch's exchange is on the network, the service computes another and the device answers a third, with
one blocking socket and no threads. `RemoteLayers` knows the wire and the session, not tokens or losses. It opens its
connection when it is first needed and after it was lost; what to replay then is the caller's to know (`session.py`
keeps the token history).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from privatelora.decoder.tensors import to_tensor
from privatelora.device.adapters import Adapter, AdapterSettings
from privatelora.device.connection import ByteCount, Connection, OnWait
from privatelora.device.service import Service
from privatelora.device.stream import Exchange, Result, Span, Steps, Stream
from privatelora.protocol.accounting import Traffic
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.errors import ConnectionLostError, PrivateLoraError, ProtocolError
from privatelora.protocol.frames import Frame, Kind, Phase
from privatelora.protocol.messages import Opened, OpenRequest, control_frame, parse
from privatelora.protocol.placement import Placement


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
        on_wait: OnWait | None = None,
        installation: str | None = None,
    ) -> None:
        self._model_hash, self._installation, self._lost = service.info.model.sha256, installation, False
        self.service, self.placement, self.spec = service, placement, settings.spec
        self.wire_dtype, self.dtype, self.on_wait = wire_dtype, dtype, on_wait
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
        if self._lost and self.service.may_move:
            self.service.refresh()
        info, self._lost = self.service.info, True  # until the connection is open
        connection = Connection(
            self.service.data_plane_url,
            self.service.token or "",
            self.count,
            self.service.timeout_s,
            info.limits.max_message_bytes,
            self.service.tls,
            self.on_wait,
        )
        request = OpenRequest(
            model_hash=self._model_hash,
            set_hash=self._set_hash,
            spec=self.spec,
            placement=self.placement,
            wire_dtype=self.wire_dtype.name.lower(),
            device=self._installation,
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
        self._connection, self._lost = connection, False

    def lose(self) -> None:
        """Close a connection that has failed: where it led to may be elsewhere now."""
        self._lost = True
        self.disconnect()

    def disconnect(self) -> None:
        """Close the connection; the service drops everything that it held for this session."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def streams(self, count: int) -> list[Stream]:
        """Streams of a new step, at most `limits.max_streams`; nothing is sent yet."""
        self._step += 1
        return [Stream(self, self._step, number) for number in range(count)]

    def run(self, passes: Sequence[Steps[Result]]) -> list[Result]:
        """Take one pass of each stream, in order, to its end, a step further whenever its answer comes; their results.

        Answers may come in any order between streams. A service reads on while answers of its own are not taken, if no
        more streams than it allows are under way, so that both ends may write at the same time.
        """
        results: dict[int, Result] = {}
        waiting: dict[int, Exchange] = {}  # by stream

        def advance(stream: int, answer: Tensor | None) -> None:
            try:
                exchange = passes[stream].send(answer)  # type: ignore[arg-type]  # None starts a generator
            except StopIteration as end:
                results[stream] = end.value
                return
            if exchange.frame.kind is Kind.HIDDEN and not waiting:
                self.connect()
            self._send(exchange.frame)
            waiting[stream] = exchange

        try:
            for stream in range(len(passes)):
                advance(stream, None)
            while waiting:
                frame = self._open_connection().receive()
                advance(frame.stream, self._answer(waiting.pop(frame.stream, None), frame))
        finally:
            for steps in passes:
                steps.close()  # one that was broken off lets go of its activations now
        return [results[stream] for stream in range(len(passes))]

    def forward(
        self, h: Tensor, spans: Sequence[Span], phase: Phase, adapter: Adapter, rows: Tensor | None = None
    ) -> Tensor:
        """One forward pass on its own: see `Stream.forward`."""
        (stream,) = self.streams(1)
        (h_out,) = self.run([stream.forward(h, spans, phase, adapter, rows)])
        return h_out

    def new_sequence(self) -> int:
        """A number for a KV cache that was not used before."""
        self._sequence += 1
        return self._sequence

    def release(self, sequences: Sequence[int]) -> None:
        """Let the service drop the KV caches of sequences that are done."""
        if self._connection is None:
            return
        frame = Frame(Kind.RELEASE, self._session)
        frame.spans = np.array([(s, 0, 0) for s in sequences], np.uint32)
        try:
            self._connection.send(frame)
        except PrivateLoraError:  # or a reason to end the session, which is no trouble of what is done
            self.disconnect()  # the service drops everything with the connection

    def _open_connection(self) -> Connection:
        if self._connection is None:
            raise ConnectionLostError("the connection was lost in mid-pass")
        return self._connection

    def _send(self, frame: Frame) -> None:
        connection = self._open_connection()
        frame.session = self._session
        connection.send(frame)

    def _answer(self, exchange: Exchange | None, frame: Frame) -> Tensor:
        """The tensor of a frame that came, if it is the one that its stream waits for."""
        came = (frame.stream, frame.kind, frame.phase, frame.step, frame.layer, frame.dtype, frame.shape)
        if exchange is None:
            raise ProtocolError(f"the service sent {came}, which no stream waits for; install the same release on both")
        sent = exchange.frame
        due = (sent.stream, exchange.kind, sent.phase, sent.step, exchange.layer, self.wire_dtype, exchange.shape)
        if came != due:
            raise ProtocolError(f"the service sent {came} where {due} is due; install the same release on both")
        return to_tensor(frame.array(), self.wire_dtype, self.dtype)

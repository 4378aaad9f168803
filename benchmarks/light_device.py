"""A device as cheap as it can be: the real wire and a linear M, no layers, no LM head, its tokens known beforehand.

`loadgen.py` plays many of these on one epoll loop. The service has the same cores, so an exchange of one token takes a
short way (`LightDevice.on_readable`): the bytes that are due are compared whole, and the answer's header was written
beforehand. It takes 10 us of CPU, 6 of them in its two system calls; where the service's weights went through the
processor's caches before, 17 us if 32 devices are answered at once, 26 if 8 are, 112 if one is. Whatever is not exactly
one due frame, such as a prefill, a part of a message or an ERROR, takes the long way (`LightDevice._pump`).
"""

from __future__ import annotations

import itertools
import os
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from websockets.frames import apply_mask  # type: ignore[attr-defined]  # its C form where there is one

from privatelora.protocol.adapter import AdapterSpec
from privatelora.protocol.codec import WireDtype
from privatelora.protocol.errors import ConnectionLostError, ProtocolError
from privatelora.protocol.frames import HEADER, NO_LAYER, Frame, Kind, Phase, Selection
from privatelora.protocol.messages import ErrorInfo, ServiceInfo, parse
from privatelora.protocol.placement import Placement

if TYPE_CHECKING:
    from benchmarks.loadgen import Load

INBOX_BYTES = 1 << 18
SEQUENCE = 1  # number of a device's only sequence
STEP_AT, START_AT = 16, HEADER.size + 4  # where a frame holds its step, and the start of its first span
SHORT_HEAD = 4  # bytes before the payload of a server's WebSocket message of 126 to 65,535 bytes
HALF = np.array(0x8000, np.uint32)  # of a bfloat16's last place, in float32's bits

Bits = NDArray[np.uint16]
Floats = NDArray[np.float32]


class Masks:
    """WebSocket keys (RFC 6455 section 5.3): random ones drawn beforehand, in turn."""

    def __init__(self) -> None:
        self._keys = itertools.cycle([os.urandom(4) for _ in range(1024)])

    def message(self, frame: bytes | bytearray) -> bytes:
        """A client's whole WebSocket message around one frame."""
        key, n = next(self._keys), len(frame)
        if n < 126:
            return bytes((0x82, 0x80 | n)) + key + apply_mask(frame, key)
        if n < 1 << 16:
            return struct.pack(">BBH", 0x82, 0xFE, n) + key + apply_mask(frame, key)
        return struct.pack(">BBQ", 0x82, 0xFF, n) + key + apply_mask(frame, key)


class Script:
    """Every frame of a pass over n tokens but its numbers: headers of v to send, and of what is due (u, ..., h)."""

    def __init__(self, info: ServiceInfo, placement: Placement, spec: AdapterSpec, session: int, n: int) -> None:
        d, dtype = info.model.shape.hidden, WireDtype.BFLOAT16
        out = n if placement.last else 1
        encoded, delta, hidden = spec.encoded_shape(n), spec.delta_shape(n), (out, d)

        def header(kind: Kind, shape: tuple[int, ...], layer: int = NO_LAYER) -> bytes:
            return Frame(kind, session, Phase.GENERATE, layer=layer, dtype=dtype, shape=shape).pack()

        up = [header(Kind.DELTA, delta, layer) for layer in placement.inline]
        down = [header(Kind.ENCODED, encoded, layer) for layer in placement.inline]
        self._headers = np.frombuffer(b"".join((*up, *down, header(Kind.HIDDEN, hidden))), np.uint8).copy()
        self._steps = self._headers.reshape(-1, HEADER.size)[:, STEP_AT : STEP_AT + 4]
        self.inline = len(up)
        self.up: list[bytes] = []  # header of v, by inline layer
        self.due: list[bytes] = []  # header of u by inline layer, and of h
        # bytes of a due WebSocket message, where it is one that the short way reads
        self.due_bytes = [SHORT_HEAD + HEADER.size + dtype.nbytes(encoded)] * len(up)
        self.due_bytes.append(SHORT_HEAD + HEADER.size + dtype.nbytes(hidden))
        begin = Frame(Kind.HIDDEN, session, Phase.GENERATE, dtype=dtype, shape=(n, d))
        begin.selection = Selection.ALL if placement.last else Selection.LAST
        begin.spans = np.array([(SEQUENCE, 0, n)], np.uint32)
        self._begin = bytearray(begin.pack())

    def at(self, step: int, start: int) -> bytearray:
        """Write the pass's numbers; returns HIDDEN's bytes before its payload."""
        self._steps[:] = np.frombuffer(struct.pack("<I", step), np.uint8)
        block, size = self._headers.tobytes(), HEADER.size
        headers = [block[i : i + size] for i in range(0, len(block), size)]
        self.up, self.due = headers[: self.inline], headers[self.inline :]
        struct.pack_into("<I", self._begin, STEP_AT, step)
        struct.pack_into("<I", self._begin, START_AT, start)
        return self._begin


class Scratch:
    """What all devices of a process use in turn: the buffer to receive into, and u and v of one token."""

    def __init__(self, spec: AdapterSpec) -> None:
        self.inbox = bytearray(INBOX_BYTES)
        self.plain = bytearray(HEADER.size + 2 * 3 * spec.rank_up)
        self.u, self.v = np.zeros(spec.rank_down, np.float32), np.zeros(3 * spec.rank_up, np.float32)
        self.u_came = np.frombuffer(self.inbox, "<u2", spec.rank_down, SHORT_HEAD + HEADER.size)
        self.u_upper = self.u.view(np.uint16)[1::2]  # a bfloat16 is a float32's upper half; the lower stays zero
        self.v_bits, self.v_upper = self.v.view(np.uint32), self.v.view(np.uint16)[1::2]
        self.v_goes = np.frombuffer(self.plain, "<u2", offset=HEADER.size)
        self.masks = Masks()


class LightDevice:
    """One session: where it stands in its pass, and when each of its tokens was begun and done."""

    def __init__(
        self,
        load: Load,
        number: int,
        m: list[Floats],
        tokens: NDArray[np.int64],
    ) -> None:
        self.load, self.number, self.m, self.tokens = load, number, m, tokens
        self.scratch = load.scratch
        self.socket, self.session = load.open()
        self.recv_into, self.send_some = self.socket.recv_into, self.socket.send
        self.times: list[tuple[float, float]] = []  # seconds of the machine's monotonic clock
        self.sent = self.received = self.exchanges = 0  # bytes, bytes, round trips
        self.prompt = len(tokens) - load.decoded
        self.held = 0  # tokens in the service's cache
        self.unsent, self.partial = bytearray(), bytearray()
        self.begun_at = 0.0
        self._step = self._stage = 0
        self._one = Script(load.info, load.placement, load.spec, self.session, 1)
        self.script = self._one

    def prefill(self) -> None:
        self.script = Script(self.load.info, self.load.placement, self.load.spec, self.session, self.prompt)
        self._begin(self.prompt)

    def decode(self) -> None:
        """Send the next token."""
        self.script = self._one
        self.begun_at = time.monotonic()
        self._begin(1)

    def close(self) -> None:
        with suppress(OSError):  # the service is gone, which is as good
            self.socket.send(self.scratch.masks.message(Frame(Kind.CLOSE).pack()))
        self.socket.close()

    def on_readable(self) -> None:
        """Take what came: by the short way, if it is one due frame about one token."""
        scratch = self.scratch
        inbox = scratch.inbox
        try:
            n = self.recv_into(inbox)
        except BlockingIOError:
            return
        except OSError as error:
            raise ConnectionLostError(f"device {self.number}: the connection broke ({error})") from None
        script, stage = self.script, self._stage
        if script is not self._one or n != script.due_bytes[stage] or self.partial or inbox[4:52] != script.due[stage]:
            self._pump(n)
            return
        self.received += n
        if stage == script.inline:
            self._pass_done()
            return
        self._stage = stage + 1
        scratch.u_upper[:] = scratch.u_came
        np.dot(scratch.u, self.m[stage], scratch.v)
        np.add(scratch.v_bits, HALF, scratch.v_bits)  # rounds to the nearest bfloat16, halves away from zero
        scratch.v_goes[:] = scratch.v_upper
        plain = scratch.plain
        plain[: HEADER.size] = script.up[stage]
        self.write(scratch.masks.message(plain))

    def write(self, data: bytes | bytearray) -> None:
        """Send, and keep what the socket does not take for `on_writable`."""
        if self.unsent:
            self.unsent += data
            return
        try:
            n = self.send_some(data)
        except BlockingIOError:
            n = 0
        except OSError as error:
            raise ConnectionLostError(f"device {self.number}: the connection broke ({error})") from None
        self.sent += n
        if n != len(data):
            self.unsent += memoryview(data)[n:]
            self.load.watch(self, writable=True)

    def on_writable(self) -> None:
        rest, self.unsent = self.unsent, bytearray()
        self.load.watch(self, writable=False)
        self.write(rest)

    @property
    def waits_for(self) -> str:
        """What is due, in words."""
        inline = self.load.placement.inline
        return f"u of layer {inline[self._stage]}" if self._stage < len(inline) else "h"

    def _begin(self, n: int) -> None:
        self._step += 1
        self._stage = 0
        begin = self.script.at(self._step, self.held)
        h = self.load.embedding[self.tokens[self.held : self.held + n]]  # (n, d), bfloat16's bits
        self.held += n
        self.write(self.scratch.masks.message(begin + h.tobytes()))

    def _pass_done(self) -> None:
        if self.script is self._one:
            self.exchanges += len(self.m) + 1
            self.times.append((self.begun_at, time.monotonic()))
            if self.held < len(self.tokens):
                self.load.next_token(self)
            else:
                self.load.done(self)
        else:
            self.load.prefilled(self)

    def _pump(self, n: int) -> None:
        """The long way: collect what came, and take every message that is whole."""
        if n == 0:
            raise ConnectionLostError(f"device {self.number}: the service closed the connection")
        self.received += n
        self.partial += memoryview(self.scratch.inbox)[:n]
        while (frame := _next_frame(self.partial, self.number)) is not None:
            self._take(frame)

    def _take(self, frame: bytes) -> None:
        script, stage = self.script, self._stage
        if stage >= len(script.due) or frame[: HEADER.size] != script.due[stage]:
            self._refuse(frame)
        if stage == script.inline:
            self._pass_done()
            return
        self._stage = stage + 1
        u = np.frombuffer(frame, "<u2", offset=HEADER.size).astype(np.uint32) << 16
        v = u.view(np.float32).reshape(-1, self.m[stage].shape[0]) @ self.m[stage]  # (n, 3 r_up)
        bits: Bits = ((v.view(np.uint32) + HALF) >> 16).astype("<u2")
        self.write(self.scratch.masks.message(script.up[stage] + bits.tobytes()))

    def _refuse(self, data: bytes) -> None:
        """Raise what the frame says, or that it is not the one due."""
        frame = Frame.unpack(data)
        if frame.kind is Kind.ERROR:
            raise parse(frame.payload, ErrorInfo).to_error()
        raise ProtocolError(
            f"device {self.number}: {frame.kind.name} of step {frame.step}, layer {frame.layer} and shape "
            f"{frame.shape} came where {self.waits_for} of step {self._step} is due"
        )


def _next_frame(data: bytearray, number: int) -> bytes | None:
    """Take the first whole binary message off `data`; None until there is one."""
    if len(data) < 2:
        return None
    length, start = data[1], 2
    if length == 126:
        length, start = int.from_bytes(data[2:4]), 4
    elif length == 127:
        length, start = int.from_bytes(data[2:10]), 10
    if len(data) < start or len(data) < start + length:
        return None
    opcode, content = data[0], bytes(data[start : start + length])
    if opcode == 0x88:
        raise ConnectionLostError(
            f"device {number}: the service closed the connection, code {int.from_bytes(content[:2])} "
            f"{content[2:].decode(errors='replace')!r}"
        )
    if opcode != 0x82:
        raise ProtocolError(f"device {number}: a WebSocket frame {opcode:#x} came; whole binary messages are due")
    del data[: start + length]
    return content

"""A device as cheap as it can be: the real wire and a linear M, no layers, no LM head, its tokens known beforehand.

    Load -> Devices.serve -> LightDevice.came(data), .pass_done()        what is not one of a token's exchanges
                          -> light_device.c                              u came, v = M u goes

`loadgen.py` plays many of these on one epoll loop. The service has the same cores, which devices in the world do not
take, so a token's exchanges are answered by compiled code: the header that is due is compared whole, and the answer's
was written beforehand. In Python an exchange took 10 us of CPU where all was in the caches and 17 to 26 beside a
service. Whatever is not exactly one due frame, such as a prefill, a part of a message or an ERROR, takes the long way
(`LightDevice.came`), as everything does on a machine without a C compiler.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import select
import shlex
import struct
import subprocess
import tempfile
import time
from array import array
from contextlib import suppress
from functools import cache
from pathlib import Path
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

CODE = Path(__file__).with_name("light_device.c")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-shared", "-fPIC")
EVENTS = 256  # of one call, as light_device.c has it
CHUNK_BYTES = 1 << 16  # that are read of a socket at once
OTHER, BYTES, DONE, REST = range(4)
SHORT_HEAD = 4  # bytes before the payload of a server's WebSocket message of 126 to 65,535 bytes
MOST_COLUMNS = 3 * 1024  # of an M that the compiled code takes
NEVER_NS = 1 << 62  # of the monotonic clock

SEQUENCE = 1  # number of a device's only sequence
STEP_AT, START_AT = 16, HEADER.size + 4  # where a frame holds its step, and the start of its first span
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
    """Every frame of a pass over n tokens but its numbers.

    up, due : headers of v to send by inline layer (inline, 48), and of what is due: u by inline layer, then h.
    """

    def __init__(self, info: ServiceInfo, placement: Placement, spec: AdapterSpec, session: int, n: int) -> None:
        d, dtype = info.model.shape.hidden, WireDtype.BFLOAT16
        out = n if placement.last else 1
        encoded, delta, hidden = spec.encoded_shape(n), spec.delta_shape(n), (out, d)

        def header(kind: Kind, shape: tuple[int, ...], layer: int = NO_LAYER) -> bytes:
            return Frame(kind, session, Phase.GENERATE, layer=layer, dtype=dtype, shape=shape).pack()

        up = [header(Kind.DELTA, delta, layer) for layer in placement.inline]
        down = [header(Kind.ENCODED, encoded, layer) for layer in placement.inline]
        headers = np.frombuffer(b"".join((*up, *down, header(Kind.HIDDEN, hidden))), np.uint8).copy()
        headers = headers.reshape(-1, HEADER.size)
        self.inline, self.up, self.due = len(up), headers[: len(up)], headers[len(up) :]
        self._steps = headers[:, STEP_AT : STEP_AT + 4]
        self.u_bytes, self.v_bytes, self.h_bytes = dtype.nbytes(encoded), dtype.nbytes(delta), dtype.nbytes(hidden)
        begin = Frame(Kind.HIDDEN, session, Phase.GENERATE, dtype=dtype, shape=(n, d))
        begin.selection = Selection.ALL if placement.last else Selection.LAST
        begin.spans = np.array([(SEQUENCE, 0, n)], np.uint32)
        self._begin = bytearray(begin.pack())

    def at(self, step: int, start: int) -> bytearray:
        """Write the pass's numbers; returns HIDDEN's bytes before its payload."""
        self._steps[:] = np.frombuffer(struct.pack("<I", step), np.uint8)
        struct.pack_into("<I", self._begin, STEP_AT, step)
        struct.pack_into("<I", self._begin, START_AT, start)
        return self._begin


class State(ctypes.Structure):
    """`Device` of light_device.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("short_way", "stage", "inlined")),
        *((name, ctypes.c_void_p) for name in ("up", "due", "m")),
        *((name, ctypes.c_int64) for name in ("h_bytes", "received", "sent", "exchanges")),
    )


class Devices:
    """What the devices of a process share: the epoll loop, WebSocket keys, and the compiled code, if there is any."""

    def __init__(self, spec: AdapterSpec) -> None:
        self.masks = Masks()
        self.epoll = select.epoll()
        self._library = _library()
        self.compiled = self._library is not None
        self._ranks = spec.rank_down, 3 * spec.rank_up
        self._by_file: dict[int, LightDevice] = {}
        self._states = (ctypes.c_void_p * 0)()  # by file
        self._random = ctypes.c_uint64(int.from_bytes(os.urandom(8)) | 1)
        self._events = array("q", bytes(8 * 4 * EVENTS))
        self._space = bytearray(EVENTS * CHUNK_BYTES)
        self._view = memoryview(self._space)
        self._at = ctypes.addressof(ctypes.c_char.from_buffer(self._space))

    def add(self, device: LightDevice) -> None:
        file = device.socket.fileno()
        if file >= len(self._states):
            self._states = (ctypes.c_void_p * (file + 1))(*self._states)
        self._by_file[file], self._states[file] = device, ctypes.addressof(device.state)
        self.epoll.register(file, select.EPOLLIN)

    def takes(self, script: Script) -> bool:
        """Whether the compiled code can answer: messages have a two-byte length, and are whole WebSocket keys."""
        down, up = self._ranks
        lengths = [HEADER.size + size for size in (script.u_bytes, script.v_bytes, script.h_bytes)]
        fits = min(lengths) >= 126 and max(lengths) + SHORT_HEAD < CHUNK_BYTES and up <= MOST_COLUMNS
        return self.compiled and fits and down % 4 == 0 and up % 2 == 0

    def serve(self, silence_s: float, until: float | None = None) -> list[int]:
        """Serve the sockets until something is to be seen to, and see to it; returns the files that came.

        Those that are no device's are for the caller. None came if nothing did for `silence_s`, or once the monotonic
        clock says `until`, however many exchanges are answered meanwhile.
        """
        events = self._wait(silence_s, until)
        for file, what, at, length in events:
            device = self._by_file.get(file)
            if device is None:
                continue
            if what == DONE:
                device.pass_done()
            elif what == REST:
                device.write(self._view[at : at + length])
            elif what == BYTES:
                device.came(self._view[at : at + length] if length >= 0 else OSError(-length, os.strerror(-length)))
            else:
                device.on_event()
        return [file for file, *_ in events]

    def _wait(self, silence_s: float, until: float | None) -> list[tuple[int, int, int, int]]:
        """(file, what, at, length), as `Event` of light_device.c."""
        if self._library is None:
            left = silence_s if until is None else min(silence_s, until - time.monotonic())
            return [(file, OTHER, 0, 0) for file, _ in self.epoll.poll(max(0.0, left))]
        count = -errno.EINTR
        while count == -errno.EINTR:  # a signal: its handler has its turn between two calls
            count = self._library.serve(
                self.epoll.fileno(), self._states, len(self._states), *self._ranks, ctypes.byref(self._random),
                self._events.buffer_info()[0], self._at, CHUNK_BYTES, int(1e9 * silence_s),
                NEVER_NS if until is None else int(1e9 * until),
            )  # fmt: skip
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        numbers = iter(self._events[: 4 * count])
        return list(zip(numbers, numbers, numbers, numbers, strict=True))


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
        self.socket, self.session = load.open()
        self.times: list[tuple[float, float]] = []  # seconds of the machine's monotonic clock
        self.exchanges = 0  # round trips
        self.prompt = len(tokens) - load.decoded
        self.held = 0  # tokens in the service's cache
        self.unsent, self.partial = bytearray(), bytearray()
        self.begun_at = 0.0
        self._step = 0
        self._one = Script(load.info, load.placement, load.spec, self.session, 1)
        self.script = self._one
        self._matrices = (ctypes.c_void_p * len(m))(*(one.ctypes.data for one in m))
        self.state = State(
            inlined=self._one.inline, up=self._one.up.ctypes.data, due=self._one.due.ctypes.data,
            m=ctypes.addressof(self._matrices), h_bytes=self._one.h_bytes,
        )  # fmt: skip
        load.shared.add(self)

    def prefill(self) -> None:
        self.script = Script(self.load.info, self.load.placement, self.load.spec, self.session, self.prompt)
        self._begin(self.prompt)

    def decode(self, due: float | None = None) -> None:
        """Send the next token; `due` is when that should have been, if it has a pace: its time counts from then."""
        self.script = self._one
        self.begun_at = time.monotonic() if due is None else due
        self._begin(1)

    def close(self) -> None:
        with suppress(OSError):  # the service is gone, which is as good
            self.socket.send(self.load.shared.masks.message(Frame(Kind.CLOSE).pack()))
        self.socket.close()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send, and keep what the socket does not take for later."""
        if self.unsent:
            self.unsent += data
            return
        try:
            n = self.socket.send(data)
        except BlockingIOError:
            n = 0
        except OSError as error:
            raise self._broken(error) from None
        self.state.sent += n
        if n != len(data):
            self.unsent += memoryview(data)[n:]
            self.load.watch(self, writable=True)

    def on_event(self) -> None:
        """Its socket can be written, or read by the long way, or has broken."""
        if self.unsent:
            rest, self.unsent = self.unsent, bytearray()
            self.load.watch(self, writable=False)
            self.write(rest)
        try:
            data = self.socket.recv(CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            raise self._broken(error) from None
        self.came(data)

    def came(self, data: bytes | memoryview | OSError) -> None:
        """The long way: collect what came, and take every message that is whole."""
        if isinstance(data, OSError):
            raise self._broken(data)
        if not data:
            raise ConnectionLostError(f"device {self.number}: the service closed the connection")
        self.state.received += len(data)
        self.partial += data
        while (frame := _next_frame(self.partial, self.number)) is not None:
            self._take(frame)
        self._choose_way()

    def pass_done(self) -> None:
        """h has come."""
        if self.script is self._one:
            self.exchanges += len(self.m) + 1
            self.times.append((self.begun_at, time.monotonic()))
            if self.held < len(self.tokens):
                self.load.next_token(self)
            else:
                self.load.done(self)
        else:
            self.load.prefilled(self)

    @property
    def waits_for(self) -> str:
        """What is due, in words."""
        inline, stage = self.load.placement.inline, self.state.stage
        return f"u of layer {inline[stage]}" if stage < len(inline) else "h"

    def _begin(self, n: int) -> None:
        self._step += 1
        self.state.stage = 0
        begin = self.script.at(self._step, self.held)
        h = self.load.embedding[self.tokens[self.held : self.held + n]]  # (n, d), bfloat16's bits
        self.held += n
        self._choose_way()
        self.write(self.load.shared.masks.message(begin + h.tobytes()))

    def _choose_way(self) -> None:
        """The compiled code reads whole messages of one token's passes only."""
        self.state.short_way = self.script is self._one and not self.partial and self.load.shared.takes(self._one)

    def _take(self, frame: bytes) -> None:
        script, stage = self.script, self.state.stage
        if stage >= len(script.due) or frame[: HEADER.size] != script.due[stage].tobytes():
            self._refuse(frame)
        if stage == script.inline:
            self.pass_done()
            return
        self.state.stage = stage + 1
        u = np.frombuffer(frame, "<u2", offset=HEADER.size).astype(np.uint32) << 16
        v = u.view(np.float32).reshape(-1, self.m[stage].shape[0]) @ self.m[stage]  # (n, 3 r_up)
        bits: Bits = ((v.view(np.uint32) + HALF) >> 16).astype("<u2")
        self.write(self.load.shared.masks.message(script.up[stage].tobytes() + bits.tobytes()))

    def _refuse(self, data: bytes) -> None:
        """Raise what the frame says, or that it is not the one due."""
        frame = Frame.unpack(data)
        if frame.kind is Kind.ERROR:
            raise parse(frame.payload, ErrorInfo).to_error()
        raise ProtocolError(
            f"device {self.number}: {frame.kind.name} of step {frame.step}, layer {frame.layer} and shape "
            f"{frame.shape} came where {self.waits_for} of step {self._step} is due"
        )

    def _broken(self, error: OSError) -> ConnectionLostError:
        return ConnectionLostError(f"device {self.number}: the connection broke ({error})")


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


@cache
def _library() -> ctypes.CDLL | None:
    """light_device.c, compiled for this machine at the first use in a process; None without a compiler."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "light_device.so"
        try:
            subprocess.run(
                [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, str(CODE), "-o", str(made)],
                check=True, capture_output=True,
            )  # fmt: skip
            library = ctypes.CDLL(str(made))
        except (OSError, subprocess.SubprocessError):
            return None
    number, pointer = ctypes.c_int, ctypes.c_void_p
    library.serve.argtypes = (number, pointer, *(number,) * 3, *(pointer,) * 3, *(ctypes.c_int64,) * 3)
    return library

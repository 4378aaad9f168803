"""A TCP proxy between device and service that keeps every byte, and a search for private bytes in what was kept.

device -> RecordingProxy -> service         `up` and `down` of each connection, as they crossed the wire
unmasked(up)                                what the WebSocket messages say: a client's are masked (RFC 6455, 5.3)
tensor_needles, token_needles, text_needles     how a secret would look in memory, in pieces
search(haystack, needles)                   the pieces that occur, at any offset
"""

from __future__ import annotations

import socket
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

CHUNK_BYTES = 64
KEY_BYTES = 8  # of a piece that are looked up first
DISTINCT_BYTES = 6  # a piece with fewer says nothing: zeros, and floats too small for a half


@dataclass
class Recording:
    """What crossed one connection."""

    up: bytearray = field(default_factory=bytearray)
    down: bytearray = field(default_factory=bytearray)

    @property
    def is_websocket(self) -> bool:
        return b"upgrade: websocket" in bytes(self.up[:2000]).lower()


class RecordingProxy:
    """Listens on a free port of this machine and passes everything on to `port`, keeping it."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.recordings: list[Recording] = []
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the accept
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener was shut down
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                recording = Recording()
                self.recordings.append(recording)
                for source, sink, kept in ((near, far, recording.up), (far, near, recording.down)):
                    thread = threading.Thread(target=_pump, args=(source, sink, kept))
                    self._threads.append(thread)
                    thread.start()


def _pump(source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
    with suppress(OSError):  # either end may reset
        while data := source.recv(1 << 18):
            kept += data
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def unmasked(up: bytes) -> bytes:
    """The messages of a client's half of a WebSocket connection, one after the other."""
    messages, at = [], up.index(b"\r\n\r\n") + 4
    while at + 2 <= len(up):
        length, header = up[at + 1] & 0x7F, 2
        if length >= 126:
            header = 4 if length == 126 else 10
            length = int.from_bytes(up[at + 2 : at + header], "big")
        body = np.frombuffer(up, np.uint8, length, at + header + 4)
        mask = np.frombuffer(up, np.uint8, 4, at + header)
        messages.append((body ^ np.resize(mask, length)).tobytes())
        at += header + 4 + length
    return b"".join(messages)


def tensor_needles(tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    """Every tensor and its transpose in float32, bfloat16, float16 and int8 with row scales, in pieces of rows."""
    for tensor in tensors.values():
        rows = tensor.detach().float().reshape(-1, tensor.shape[-1])
        for matrix in (rows, rows.T):
            scale = matrix.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
            forms = (
                matrix,
                matrix.bfloat16().view(torch.int16),
                matrix.half(),
                (matrix / scale).round().to(torch.int8),
            )
            for form in forms:
                array = form.contiguous().numpy()
                whole = array if array[0].nbytes >= CHUNK_BYTES else array.reshape(1, -1)
                for row in whole:
                    yield from _chunks(row.tobytes())


def token_needles(sequences: Iterable[Sequence[int]]) -> Iterator[bytes]:
    """Token ids as arrays of every integer type that could carry them, in pieces of twelve."""
    for sequence in sequences:
        for dtype in (np.int64, np.int32, np.uint16, np.uint8):
            ids = np.array(sequence).astype(dtype)
            yield from _chunks(ids.tobytes(), 12 * ids.itemsize)


def text_needles(texts: Iterable[str]) -> Iterator[bytes]:
    """Text as UTF-8, in pieces of sixteen bytes."""
    for text in texts:
        yield from _chunks(text.encode(), 16)


def _chunks(data: bytes, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    for start in range(0, len(data) - size + 1, size):
        chunk = data[start : start + size]
        if len(set(chunk)) >= DISTINCT_BYTES:
            yield chunk


class Search:
    """Looks for many needles at once, at any offset: first for their beginnings, eight bytes at a time."""

    def __init__(self, needles: Iterable[bytes]) -> None:
        self._by_key: dict[int, set[bytes]] = defaultdict(set)
        for needle in needles:
            self._by_key[int.from_bytes(needle[:KEY_BYTES], "little")].add(needle)
        self._keys = np.array(sorted(self._by_key), "<u8")

    def find(self, haystack: bytes) -> list[bytes]:
        """The needles that occur in the haystack."""
        found = []
        for shift in range(KEY_BYTES):
            words = np.frombuffer(haystack, "<u8", max(0, len(haystack) - shift) // KEY_BYTES, shift)
            for hit in np.flatnonzero(np.isin(words, self._keys)).tolist():
                at = KEY_BYTES * hit + shift
                found += [needle for needle in self._by_key[int(words[hit])] if haystack.startswith(needle, at)]
        return found

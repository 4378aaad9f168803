"""Many devices in one process, as cheap as they can be: the load of the rows about decoding.

    python -m benchmarks.loadgen --url http://127.0.0.1:8765 --token TOKEN --devices 32 --placement paper

The wire is the real one, a session and a socket for each device; what a device computes is the embedding and a linear M
of its own. It is teacher-forced: it knows its next token, so it has no LM head and no layers, sends the embedding as
h_first and ignores the h_{L-last} that comes back. All devices prefill, then all decode at once, each as fast as its
answers come or `--tokens-per-second`. The last line of stdout is a JSON object (`report`), which `fleet.py` reads.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import resource
import select
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # which numpy reads when it is first imported

import numpy as np
import typer

from benchmarks.light_device import Bits, Devices, Floats, LightDevice
from privatelora.device.connection import ByteCount, Connection
from privatelora.device.service import Service
from privatelora.protocol.adapter import AdapterSpec
from privatelora.protocol.errors import ConfigurationError, ConnectionLostError, PrivateLoraError
from privatelora.protocol.frames import Kind
from privatelora.protocol.messages import Opened, OpenRequest, control_frame, parse
from privatelora.protocol.placement import Placement

FEW_INLINE = "few-inline"  # besides what `Placement.parse` reads: nothing on the device, four inline layers
FEW_INLINE_COUNT = 4
PROMPTS = range(90, 111)  # tokens of a device's prefill, by its seed
M_STD = 0.02
M_OFFSET = 16  # float32 elements, a cache line
SILENCE_S = 60.0  # without any answer while some are due


class Opening(Connection):
    """The SDK's own handshake; its socket is taken over once the session is open."""

    def take_socket(self) -> socket.socket:
        self._socket.setblocking(False)
        return self._socket


class Load:
    """All devices of a process on one epoll loop."""

    def __init__(
        self,
        service: Service,
        devices: int,
        placement: str,
        rank: int,
        tokens: int,
        warmup: int,
        rate: float,
        seed: int,
    ) -> None:
        self.service, self.info = service, service.info
        if self.info.model.dtype != "bfloat16":
            raise ConfigurationError(
                f"the load generator speaks bfloat16 only; this service has {self.info.model.dtype}"
            )
        self.placement = parse_placement(placement, self.info.model.shape.layers)
        self.spec = AdapterSpec("calibrated", rank, rank)
        self.decoded, self.warmup, self.rate = warmup + tokens, warmup, rate
        self.embedding = _embedding(service)
        self.shared = Devices(self.spec)
        self._waiting: list[tuple[float, int]] = []  # paced devices: when their next token is due, and their number
        self._busy = 0  # devices from which an answer is due, or a token
        random = np.random.default_rng(seed)
        self.devices = [self._device(number, m, random) for number, m in enumerate(self._matrices(devices, random))]
        self._jitter = random

    def prefill(self) -> None:
        """Prefill every device's prompt."""
        for device in self.devices:
            device.prefill()
        self._busy = len(self.devices)
        self._run()

    def decode(self, stop_at_input: bool) -> None:
        """Decode until every device has all its tokens, or until a line on stdin, if that is to be watched."""
        self._busy = len(self.devices)
        for device in self.devices:
            if self.rate:  # people do not all start at the same moment
                self._wait(time.monotonic() + self._jitter.uniform(0, 1 / self.rate), device)
            else:
                device.decode()
        if stop_at_input:
            self.shared.epoll.register(sys.stdin.fileno(), select.EPOLLIN)
        self._run()

    def open(self) -> tuple[socket.socket, int]:
        """A new session: its socket and number."""
        info = self.info
        connection = Opening(
            self.service.data_plane_url, self.service.token, ByteCount(), SILENCE_S, info.limits.max_message_bytes
        )
        request = OpenRequest(
            model_hash=info.model.sha256,
            set_hash=info.default_sets[self.spec.kind] if self.placement.inline else None,
            spec=self.spec,
            placement=self.placement,
            wire_dtype="bfloat16",
        )
        connection.send(control_frame(Kind.OPEN, request))
        opened = connection.receive()
        return connection.take_socket(), parse(opened.payload, Opened).session

    def watch(self, device: LightDevice, writable: bool) -> None:
        self.shared.epoll.modify(device.socket, select.EPOLLIN | (select.EPOLLOUT if writable else 0))

    def prefilled(self, device: LightDevice) -> None:
        self._busy -= 1

    def next_token(self, device: LightDevice) -> None:
        """Go on at once, or where devices are paced when the time has come."""
        due = device.begun_at + 1 / self.rate if self.rate else 0.0
        if due > time.monotonic():
            self._wait(due, device)
        else:
            device.decode()

    def done(self, device: LightDevice) -> None:
        self._busy -= 1

    def close(self) -> None:
        for device in self.devices:
            device.close()
        self.shared.epoll.close()

    def _run(self) -> None:
        """Serve the sockets until no device is busy."""
        while self._busy:
            events = self.shared.serve(SILENCE_S, self._waiting[0][0] if self._waiting else None)
            if sys.stdin.fileno() in events:
                return
            if not events and not self._waiting:
                late = self.devices[0]
                raise ConnectionLostError(
                    f"no device had an answer for {SILENCE_S:g} s; device {late.number} waits for {late.waits_for}"
                )
            while self._waiting and self._waiting[0][0] <= time.monotonic():
                due, number = heapq.heappop(self._waiting)
                self.devices[number].decode(due)

    def _wait(self, until: float, device: LightDevice) -> None:
        heapq.heappush(self._waiting, (until, device.number))

    def _device(self, number: int, m: list[Floats], random: np.random.Generator) -> LightDevice:
        prompt = int(random.integers(PROMPTS.start, PROMPTS.stop))
        tokens = random.integers(0, len(self.embedding), prompt + self.decoded)
        return LightDevice(self, number, m, tokens)

    def _matrices(self, devices: int, random: np.random.Generator) -> Iterator[list[Floats]]:
        """M (r_down, 3 r_up) of each inline layer for each device in turn, windows of one array of random numbers.

        All differ, but lie in 110 kB for 32 devices and 30 layers. Apart they were 47 MB to read for each token of all,
        as no device's processor would: 6.7 us instead of 1.6 for an M times u.
        """
        rows, columns, inline = self.spec.rank_down, 3 * self.spec.rank_up, len(self.placement.inline)
        size = rows * columns
        pool = (M_STD * random.standard_normal(size + devices * inline * M_OFFSET)).astype(np.float32)
        offsets = itertools.count(0, M_OFFSET)
        for _ in range(devices):
            starts = itertools.islice(offsets, inline)
            yield [pool[start : start + size].reshape(rows, columns) for start in starts]


def parse_placement(text: str, layers: int) -> Placement:
    """`few-inline`, or whatever `Placement.parse` reads."""
    if text != FEW_INLINE:
        return Placement.parse(text, layers)
    step = layers // FEW_INLINE_COUNT
    return Placement(inline=tuple(range(step // 2, layers, step))[:FEW_INLINE_COUNT]).check(layers)


def report(load: Load, used: tuple[float, float]) -> dict[str, Any]:
    """What is printed: each device's tokens as (begun, done) in seconds of the monotonic clock, and what they cost.

    CPU seconds and bytes are those of decoding, warm-up included.
    """
    return {
        "placement": load.placement.describe(load.info.model.shape.layers),
        "warmup_tokens": load.warmup,
        "devices": [{"prompt_tokens": device.prompt, "times": device.times} for device in load.devices],
        "exchanges": sum(device.exchanges for device in load.devices),
        "compiled_exchanges": sum(device.state.exchanges for device in load.devices),
        "bytes_up": sum(device.state.sent for device in load.devices),
        "bytes_down": sum(device.state.received for device in load.devices),
        "cpu_user_s": used[0],
        "cpu_system_s": used[1],
    }


def main(
    url: Annotated[str, typer.Option(help="Base URL of the service.")],
    token: Annotated[str, typer.Option(help="Its bearer token.")],
    devices: Annotated[int, typer.Option(min=1, help="Devices in this process.")] = 32,
    placement: Annotated[
        str, typer.Option(help="paper, few-inline, one-trip, or first=2,last=4,inline=7+12.")
    ] = "paper",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that each device decodes after the warm-up.")] = 45,
    warmup_tokens: Annotated[int, typer.Option(min=0, help="Tokens that each device decodes before.")] = 5,
    tokens_per_second: Annotated[float, typer.Option(min=0, help="Pace of each device; 0 is as fast as it goes.")] = 0,
    rank: Annotated[int, typer.Option(min=1, help="r_down and r_up.")] = 64,
    seed: Annotated[int, typer.Option(help="Of prompts' lengths, tokens and M.")] = 0,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where the embedding is kept; the SDK's own unless set.")
    ] = None,
    gate: Annotated[
        bool, typer.Option(help="After the prefill print a line and wait for one; another ends it.")
    ] = False,
) -> None:
    """Play many devices that decode."""
    try:
        service = Service(url, token, cache_dir=cache_dir)
        load = Load(service, devices, placement, rank, tokens, warmup_tokens, tokens_per_second, seed)
        load.prefill()
        if gate:
            print(json.dumps({"ready": devices}), flush=True)
            if not os.read(sys.stdin.fileno(), 1 << 12):
                return  # whoever started this is gone
        for device in load.devices:
            device.state.sent = device.state.received = 0
        before = resource.getrusage(resource.RUSAGE_SELF)
        load.decode(stop_at_input=gate)
        after = resource.getrusage(resource.RUSAGE_SELF)
        load.close()
    except PrivateLoraError as error:
        sys.exit(f"loadgen: {error.code}: {error}")
    used = (after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime)
    print(json.dumps(report(load, used)), flush=True)


def _embedding(service: Service) -> Bits:
    """The embedding part (vocab, d) as bfloat16's bits, mapped from its file, without torch's 200 MB."""
    path = service.download(service.info.model.parts["embedding"])
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        weight = json.loads(file.read(size))["weight"]  # safetensors: a JSON header, then the tensors
    shape: tuple[int, int] = tuple(weight["shape"])
    return np.memmap(path, "<u2", "r", 8 + size + weight["data_offsets"][0], shape)


if __name__ == "__main__":
    typer.run(main)

"""Complete devices, a thread each: what `loadgen.py` is for cheap ones, with the same options and the same report.

    python -m benchmarks.whole --url URL --token TOKEN --devices 8 --placement paper --cache-dir DIR

Each is a `DeviceSession` with its own layers, LM head and M; tokens are chosen, not known. `fleet.py` starts these.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from privatelora.device import DeviceSession
from privatelora.device.decoding import Decoding
from privatelora.protocol.errors import PrivateLoraError

PROMPT = 100
FIRST_TOKEN = 1000  # of a vocabulary: those before it are bytes and marks


class Device:
    """One session that decodes a sequence of its own."""

    def __init__(self, me: DeviceSession, seed: int) -> None:
        self.me = me
        vocabulary = range(FIRST_TOKEN, me.model.embedding.shape[0])
        self.history = random.Random(seed).choices(vocabulary, k=PROMPT)
        self.times: list[tuple[float, float]] = []
        self.decoding: Decoding = me.split.decode(self.history)

    def prefill(self) -> None:
        self._choose()

    def decode(self, tokens: int, stopped: threading.Event) -> None:
        for _ in range(tokens):
            if stopped.is_set():
                return
            begun = time.monotonic()
            self._choose()
            self.times.append((begun, time.monotonic()))

    def _choose(self) -> None:
        self.history.append(int(self.decoding.next_logits().argmax()))


def main(
    url: Annotated[str, typer.Option(help="Base URL of the service.")],
    token: Annotated[str, typer.Option(help="Its bearer token.")],
    cache_dir: Annotated[Path, typer.Option(help="Where downloads are kept.")],
    devices: Annotated[int, typer.Option(min=1, help="Devices in this process.")] = 8,
    placement: Annotated[str, typer.Option(help="What `Placement.parse` reads.")] = "paper",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that each device decodes after the warm-up.")] = 45,
    warmup_tokens: Annotated[int, typer.Option(min=0, help="Tokens that each device decodes before.")] = 5,
    tokens_per_second: Annotated[float, typer.Option(min=0, max=0, help="No pace is kept here.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    gate: Annotated[
        bool, typer.Option(help="After the prefill print a line and wait for one; another ends it.")
    ] = False,
) -> None:
    """Play complete devices that decode."""
    try:
        with ExitStack() as stack:
            store = stack.enter_context(tempfile.TemporaryDirectory(prefix="privatelora-whole-"))
            fleet = []
            for number in range(devices):
                me = DeviceSession(
                    url, token=token, name=f"whole-{number}", placement=placement, store_dir=store, cache_dir=cache_dir
                )
                fleet.append(Device(stack.enter_context(me), seed * devices + number))
            pool = stack.enter_context(ThreadPoolExecutor(devices))
            list(pool.map(Device.prefill, fleet))
            stopped = threading.Event()
            if gate:
                print(json.dumps({"ready": devices}), flush=True)
                if not os.read(sys.stdin.fileno(), 1 << 12):
                    return  # whoever started this is gone
                threading.Thread(target=_stop_at_input, args=(stopped,), daemon=True).start()
            prefilled = [replace(device.me.remote.count) for device in fleet]
            before = resource.getrusage(resource.RUSAGE_SELF)
            list(pool.map(lambda device: device.decode(warmup_tokens + tokens, stopped), fleet))
            after = resource.getrusage(resource.RUSAGE_SELF)
            counts = [device.me.remote.count for device in fleet]
            up = sum(c.payload_up + c.overhead_up for c in counts) - sum(
                c.payload_up + c.overhead_up for c in prefilled
            )
            down = sum(c.total for c in counts) - sum(c.total for c in prefilled) - up
            trips = fleet[0].me.placement.round_trips
    except PrivateLoraError as error:
        sys.exit(f"whole: {error.code}: {error}")
    report = {
        "placement": placement,
        "warmup_tokens": warmup_tokens,
        "devices": [{"prompt_tokens": PROMPT, "times": device.times} for device in fleet],
        "exchanges": trips * sum(len(device.times) for device in fleet),
        "bytes_up": up,
        "bytes_down": down,
        "cpu_user_s": after.ru_utime - before.ru_utime,
        "cpu_system_s": after.ru_stime - before.ru_stime,
    }
    print(json.dumps(report), flush=True)


def _stop_at_input(stopped: threading.Event) -> None:
    os.read(sys.stdin.fileno(), 1 << 12)  # and not sys.stdin, whose lock would be held when the interpreter ends
    stopped.set()


if __name__ == "__main__":
    typer.run(main)

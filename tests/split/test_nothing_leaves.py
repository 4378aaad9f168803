"""M, the optimizer's state, tokens and text never leave the device: not on its socket, not in a file of the service.

A recording proxy stands between a real device process and a real service process. What crossed it and all that the
service wrote is searched for the device's secrets, in every element type and at every offset; and the same search finds
each of them where it was planted, and finds the activations that do cross.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.support.fleet import Fleet
from tests.support.recorder import (
    Recording,
    RecordingProxy,
    Search,
    tensor_needles,
    text_needles,
    token_needles,
    unmasked,
)
from tests.support.service import REPOSITORY, ServiceProcess, service
from torch import Tensor

from privatelora.device.connection import ByteCount, Connection
from privatelora.protocol.codec import WireDtype, encode
from privatelora.protocol.frames import Frame, Kind

# An audit hook in the service's process: every path that Python opens for writing is noted.
NOTE_WRITES = """
import os, sys
notes = os.open(os.environ["NOTES_OF_WRITES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def note(event, arguments):
    if event == "open" and arguments[2] and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        os.write(notes, f"{arguments[0]}\\n".encode())
sys.addaudithook(note)
"""


@dataclass(frozen=True)
class Secrets:
    """What the devices must keep to themselves."""

    tensors: dict[str, Tensor]  # every step's M, LoRA and moments
    tokens: list[list[int]]
    texts: list[str]

    def search(self) -> Search:
        return Search([*tensor_needles(self.tensors), *token_needles(self.tokens), *text_needles(self.texts)])


@dataclass(frozen=True)
class Run:
    """A device's life, as its network and its service saw it."""

    service: ServiceProcess
    proxy: RecordingProxy
    device: Path  # the device's own folder
    written: Path  # the service's folder: all that it wrote
    written_since_start: list[str]
    printed: bytes
    counted: list[dict[str, int]]  # by each of the device's sessions
    secrets: Secrets
    search: Search  # for those secrets

    def files(self) -> bytes:
        """Everything that the service wrote or printed."""
        return b"".join(path.read_bytes() for path in self.written.rglob("*") if path.is_file()) + self.printed


@pytest.fixture(scope="module")
def run(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Two sessions of one device process, with every step's M, LoRA and moments on the record."""
    written, device = tmp_path_factory.mktemp("service"), tmp_path_factory.mktemp("device")
    notes = device / "writes"  # the hook's, so not the service's own
    (device / "hook").mkdir()
    (device / "hook" / "sitecustomize.py").write_text(NOTE_WRITES)
    places = {"HOME": str(written), "TMPDIR": str(written), "NOTES_OF_WRITES": str(notes)}
    python = {"PYTHONPATH": f"{device / 'hook'}:{os.environ.get('PYTHONPATH', '')}", "PYTHONDONTWRITEBYTECODE": "1"}
    with (
        service(
            fleet.source("llama"), written / "data", "--log-level", "debug", environment=places | python
        ) as running,
        RecordingProxy(running.port) as proxy,
    ):
        at_start = notes.read_text()
        counted = run_device(proxy.port, running.token, device)
        running.process.terminate()
        running.process.wait(30)
        assert running.process.stdout is not None
        noted = json.loads((device / "secrets.json").read_text())
        secrets = Secrets(load_file(device / "secrets.safetensors"), noted["tokens"], noted["texts"])
        yield Run(
            running,
            proxy,
            device,
            written,
            notes.read_text().removeprefix(at_start).splitlines(),
            running.process.stdout.read(),
            counted,
            secrets,
            secrets.search(),
        )


def run_device(port: int, token: str, folder: Path) -> list[dict[str, int]]:
    """The device as its owner would run it: no variable of the tests keeps it offline."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PRIVATELORA_", "HF_", "FLWR_"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.private_device", f"http://127.0.0.1:{port}", token, str(folder)],
        cwd=REPOSITORY,
        env=environment | {"HOME": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_nothing_private_crosses_the_socket(run: Run) -> None:
    assert run.search.find(crossed(run.proxy.recordings)) == []


def test_nothing_private_is_written_by_the_service(run: Run) -> None:
    assert b"session opened" in run.files()  # the log is among them
    assert run.search.find(run.files()) == []
    assert run.written_since_start == []  # while devices are served, nothing is opened for writing at all


def test_the_device_connects_to_its_service_only(run: Run) -> None:
    connections = [json.loads(line) for line in (run.device / "connections").read_text().splitlines()]
    assert ["socket.connect", str(("127.0.0.1", run.proxy.port))] in connections
    elsewhere = [(event, address) for event, address in connections if str(run.proxy.port) not in address]
    assert elsewhere == []


def test_the_device_counts_what_crosses(run: Run) -> None:
    sessions = [recording for recording in run.proxy.recordings if recording.is_websocket]
    assert len(sessions) == len(run.counted) == 2
    for recording, counted in zip(sessions, run.counted, strict=True):
        both = len(recording.up) + len(recording.down)
        assert counted["up"] < len(unmasked(bytes(recording.up))) < len(recording.up)
        assert counted["down"] < len(recording.down)
        assert counted["total"] < both < 1.05 * counted["total"]  # WebSocket's own headers and the handshake are left


def test_the_search_finds_the_activations_that_do_cross(run: Run) -> None:
    embedded = load_file(run.device / "sent.safetensors")  # h_0 of a private text, sent up as float32
    assert Search(tensor_needles(embedded)).find(crossed(run.proxy.recordings)) != []


def test_the_search_finds_every_secret_that_is_planted(run: Run, fleet: Fleet) -> None:
    """Sent at an odd offset as a device sends, through a proxy of the same kind; and put among the service's files."""
    leaked = planted(run.secrets)
    to = fleet.service("llama")
    with RecordingProxy(to.port) as proxy:
        for secret in leaked.values():
            device = Connection(f"ws://127.0.0.1:{proxy.port}/v1/sessions", to.token, ByteCount(), 10.0, 1 << 20)
            device.send(Frame(Kind.OPEN, shape=(len(secret) + 3,), payload=b"abc" + secret))
            device.close()
    for name, secret in leaked.items():
        (run.written / "data" / name).write_bytes(b"abc" + secret)
    files = run.files()
    for name in leaked:
        (run.written / "data" / name).unlink()
    for haystack in (crossed(proxy.recordings), files):
        found = set(run.search.find(haystack))
        assert [name for name, secret in leaked.items() if not any(needle in secret for needle in found)] == []


def planted(secrets: Secrets) -> dict[str, bytes]:
    """One of each secret, as it might leak; no two of them have a piece in common."""
    m, lora, moment = (
        secrets.tensors[name] for name in ("0.4.m.3.weight.value", "1.4.lora.0.b.gate.value", "1.4.m.2.w1.exp_avg_sq")
    )
    tokens = secrets.tokens[0]
    return {
        "M in float32": m.numpy().tobytes(),
        "M in bfloat16": m.bfloat16().view(torch.int16).numpy().tobytes(),
        "M in float16": m.half().numpy().tobytes(),
        "M in int8": bytes(encode(m.numpy(), WireDtype.INT8)),
        "M transposed": m[0].T.contiguous().numpy().tobytes(),
        "two rows of another M": secrets.tensors["0.1.m.2.weight.value"][0, 5:7].numpy().tobytes(),
        "LoRA": lora.numpy().tobytes(),
        "a moment": moment.numpy().tobytes(),
        "tokens in int64": np.array(tokens, np.int64).tobytes(),
        "tokens in int32": np.array(tokens, np.int32).tobytes(),
        "tokens in uint16": np.array(tokens, np.uint16).tobytes(),
        "the question": secrets.texts[0].encode(),
        "an answer": max(secrets.texts[-2:], key=len).encode(),
    }


def crossed(recordings: list[Recording]) -> bytes:
    """All bytes that crossed, and what the masked WebSocket messages among them say; none of it is compressed."""
    parts = []
    for recording in recordings:
        up, down = bytes(recording.up), bytes(recording.down)
        assert not any(name in down.lower() for name in (b"\r\ncontent-encoding:", b"\r\nsec-websocket-extensions:"))
        parts += [up, down, *([unmasked(up)] if recording.is_websocket else [])]
    return b"".join(parts)

"""A data plane process with several users or small limits, which `privatelora backbone` has no options for.

    python -m tests.support.plane --model DIR --data-dir DIR --tokens '{"alice": "..."}' --settings '{"max_streams": 2}'

Prints one JSON line with its URL once it serves, as the real command does, and at its end logs a last one with the
bytes that each user was charged for; everything below that is the service's own code. `tests/support/service.py` starts
it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
from pathlib import Path

import torch

from privatelora.cloud.admission import Meter, Principal, TokenAdmission, Unmetered
from privatelora.cloud.backbone import Backbone
from privatelora.cloud.endpoint import server
from privatelora.cloud.plane import DataPlane, DataPlaneSettings
from privatelora.platform.logs import configure_logging
from privatelora.protocol.messages import OpenRequest


class Counting:
    """A quota that nobody exceeds."""

    def __init__(self) -> None:
        self.spent: dict[str, list[int]] = {}

    async def open(self, owner: Principal, number: int, request: OpenRequest) -> Meter:
        return CountingMeter(self.spent.setdefault(owner.user, [0, 0]))


class CountingMeter(Unmetered):
    """Adds up what one user's sessions spend."""

    def __init__(self, spent: list[int]) -> None:
        self.spent = spent

    def spend(self, bytes_up: int, bytes_down: int) -> None:
        self.spent[0] += bytes_up
        self.spent[1] += bytes_down


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tokens", type=json.loads, required=True)
    parser.add_argument("--settings", type=json.loads, required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    configure_logging("info", "console")

    backbone = Backbone.load(given.model, given.data_dir, getattr(torch, given.dtype))
    users = {token: user for user, token in given.tokens.items()}
    quota = Counting()
    data_plane = DataPlane(backbone, TokenAdmission(users), DataPlaneSettings(**given.settings), quota=quota)
    listener = socket.create_server(("127.0.0.1", given.port))
    asyncio.run(_serve(data_plane, listener))
    print(json.dumps({"spent": quota.spent}), file=sys.stderr, flush=True)


async def _serve(data_plane: DataPlane, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    running = server(data_plane, "127.0.0.1", port)
    serving = asyncio.create_task(running.serve(sockets=[listener]))
    while not running.started and not serving.done():  # noqa: ASYNC110 (uvicorn has no event for it)
        await asyncio.sleep(0.01)
    print(json.dumps({"url": f"http://127.0.0.1:{port}"}), flush=True)
    await serving


if __name__ == "__main__":
    main()

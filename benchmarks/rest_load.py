"""A bounded load of GET requests on loopback, as cheap for this machine as it can be: the load of the REST rows.

    python -m benchmarks.rest_load --port 8765 --path /api/v1/me --key plk_… --connections 8 --requests 2000

Keep-alive HTTP/1.1 over plain sockets, one request at a time on each connection. The last line of stdout is a JSON
object: the seconds of every request, in order of their end, and how long all of them took.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Annotated

import typer

from privatelora.protocol.errors import ConnectionLostError

_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


async def _requests(port: int, head: bytes, left: list[int], seconds: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while left[0] > 0:
            left[0] -= 1
            began = time.perf_counter()
            writer.write(head)
            answer = await reader.readuntil(b"\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 200"):
                raise ConnectionLostError(f"the server answered {answer.splitlines()[0].decode()}; nothing is measured")
            found = _LENGTH.search(answer)
            await reader.readexactly(int(found[1]) if found else 0)
            seconds.append(time.perf_counter() - began)
    finally:
        writer.close()


async def _load(port: int, paths: list[str], key: str, connections: int, requests: int) -> dict[str, object]:
    heads = [
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n\r\n".encode() for path in paths
    ]
    left, seconds = [requests], list[float]()
    began = time.perf_counter()
    await asyncio.gather(*(_requests(port, heads[i % len(heads)], left, seconds) for i in range(connections)))
    return {"seconds": seconds, "took_s": time.perf_counter() - began}


def main(
    port: Annotated[int, typer.Option(help="On 127.0.0.1.")],
    path: Annotated[list[str], typer.Option(help="What to get; connections share them out.")],
    key: Annotated[str, typer.Option(help="API key.")] = "none",
    connections: Annotated[int, typer.Option(min=1, max=64, help="At one time.")] = 8,
    requests: Annotated[int, typer.Option(min=1, max=100_000, help="All together.")] = 2000,
) -> None:
    """Get paths again and again, and print how long each took."""
    print(json.dumps(asyncio.run(_load(port, path, key, connections, requests))))


if __name__ == "__main__":
    typer.run(main)

"""The API's HTTP on a socket: heads that never end are cut off, and who waits does not hold up a stop."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.support.control import Control, control
from tests.support.servers import PostgresServer, ValkeyServer

from privatelora.platform.api import server as api_server
from privatelora.platform.net import listening
from privatelora.platform.settings import Settings


@pytest.fixture(scope="module")
def plane(server: PostgresServer, valkey: ValkeyServer) -> Iterator[Control]:
    with control(server.database(), valkey.url) as running:
        yield running


@contextmanager
def serving(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, list[api_server.Serving]]]:
    """`serve` in a thread: its port, and the server once it runs."""
    started, servers = threading.Event(), list[api_server.Serving]()
    begin = api_server.Serving.startup

    async def startup(self: api_server.Serving, sockets: list[socket.socket] | None = None) -> None:
        servers.append(self)
        await begin(self, sockets)

    monkeypatch.setattr(api_server.Serving, "startup", startup)
    with listening("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=api_server.serve, args=(settings, listener, lambda url: started.set()))
        thread.start()
        try:
            assert started.wait(20)
            yield listener.getsockname()[1], servers
        finally:
            servers[0].should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def asked(port: int, request: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(request.encode())
    return connection


def test_a_head_that_never_ends_is_cut_off_and_a_whole_one_is_not(
    plane: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_server, "HEAD_S", 0.3)
    with serving(plane.app.state.services.settings, monkeypatch) as (port, _):
        for part in ("", "GET /healthz HTTP/1.1\r\nHost: x\r\n"):
            with asked(port, part) as connection:
                assert connection.recv(1000) == b""
        with asked(port, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            connection.sendall(b"GET /healthz HTTP/1.1\r\n")  # the second of a connection as well
            while connection.recv(1000):
                pass


def test_a_stop_lets_event_streams_and_waiting_agents_go(plane: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_server, "STOP_S", 600)  # a stop that waited for them would last as long
    key = f"Authorization: Bearer {plane.keys['device']}\r\n"
    device, headers = plane.ids["device"], plane.as_("device")
    while plane.client.post(f"/api/v1/devices/{device}/offers", headers=headers).json()["items"]:
        for job in plane.client.get("/api/v1/jobs", headers=headers).json()["items"]:
            plane.client.post(f"/api/v1/jobs/{job['id']}/cancel", headers=headers)
    with serving(plane.app.state.services.settings, monkeypatch) as (port, servers):
        stream = asked(port, f"GET /api/v1/events HTTP/1.1\r\nHost: x\r\n{key}\r\n")
        assert b"text/event-stream" in stream.recv(1000)
        agent = asked(port, f"POST /api/v1/devices/{device}/offers?wait_s=30 HTTP/1.1\r\nHost: x\r\n{key}\r\n")
        services = servers[0].services
        while device not in services.offers.waiting:
            time.sleep(0.01)
    with stream, agent:
        assert b'{"items":[]}' in agent.recv(10_000)

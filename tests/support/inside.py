"""A service on a thread of this process, on a real socket, so that a test sees the objects that it holds."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from privatelora.cloud.admission import TokenAdmission
from privatelora.cloud.backbone import Backbone
from privatelora.cloud.endpoint import server
from privatelora.cloud.plane import DataPlane, DataPlaneSettings


@contextmanager
def serving(backbone: Backbone, **settings: Any) -> Iterator[tuple[DataPlane, str]]:
    """The data plane and its URL; token `t` is `owner`'s."""
    plane = DataPlane(
        backbone, TokenAdmission({"t": "owner"}), DataPlaneSettings(**({"memory_bytes": 64 << 20} | settings))
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        running = server(plane, "127.0.0.1", port)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_for(lambda: running.started)
            yield plane, f"http://127.0.0.1:{port}"
        finally:
            running.should_exit = True
            thread.join(10)


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the service still holds it"
        time.sleep(0.01)

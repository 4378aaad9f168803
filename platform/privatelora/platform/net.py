"""Listening sockets: taken early, so that a port in use is reported at once, and named as their clients write them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from privatelora.protocol.errors import ConfigurationError


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket, closed in the end; what connects to it waits until a server has it.

    Raises `ConfigurationError` for a port in use, or an address that is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()  # binding alone would not keep another process from the same port
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host}:{port} ({error.strerror or error}); stop what uses it, or choose another "
                "with --port (0 takes a free one) or --host"
            ) from None
        yield listener


@contextmanager
def adopted(fd: int) -> Iterator[socket.socket]:
    """The listening socket that a supervisor has opened and handed on as this file descriptor."""
    with socket.socket(fileno=fd) as listener:
        yield listener


def url_of(tls: bool, host: str, listener: socket.socket) -> str:
    """The http:// or https:// URL of a listening socket."""
    port = listener.getsockname()[1]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

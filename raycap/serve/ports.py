"""Whether a port can be listened on, told before anything is started."""

from __future__ import annotations

import errno
import socket

from raycap.errors import RunError


def find_port(host: str, port: int) -> int:
    """`port` if it can be listened on, a free one for 0; RunError when it is taken or not allowed."""
    if not 0 <= port <= 65535:  # getaddrinfo would take it modulo 65536
        raise RunError(f"serve.port={port} is no port: choose 1 to 65535, or 0 for a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the server will: a port whose old connections still fade away is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RunError(
                f"port {port} on {host} is in use: stop what listens there, or set serve.port (0 takes a free one)"
            ) from error
        raise RunError(f"cannot listen on serve.host={host} serve.port={port}: {error.strerror or error}") from error

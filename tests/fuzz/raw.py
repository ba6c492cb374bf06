"""Bytes in, bytes out: requests that no HTTP client would send."""

from __future__ import annotations

import re
import socket
from urllib.parse import urlsplit

from .conftest import PATIENCE

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})[ \r]")


def exchange(url: str, *parts: bytes, half_close: bool = False, limit: int = 1_000_000) -> bytes:
    """Send the parts, one after the other, and read until the server closes. `TimeoutError` if it does not.

    `half_close` says after the last part that there is no more, which a server may take for leaving.
    """
    where = urlsplit(url)
    assert where.hostname is not None
    received = bytearray()
    with socket.create_connection((where.hostname, where.port), timeout=PATIENCE) as connection:
        try:
            for part in parts:
                connection.sendall(part)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            while len(received) < limit and (data := connection.recv(65_536)):
                received += data
        except TimeoutError:
            raise
        except OSError:
            pass  # a reset is a close
    return bytes(received)


def statuses(answer: bytes) -> list[int]:
    """The statuses of the answers, without 100 Continue."""
    return [int(found) for found in _STATUS.findall(answer) if found != b"100"]


def request(target: str | bytes, *, method: str = "GET", body: bytes = b"", **headers: str) -> bytes:
    """A request whose target is sent as it is. It closes its connection."""
    target = target.encode("latin-1", "replace") if isinstance(target, str) else target
    lines = {"Host": "x", "Connection": "close", **{name.replace("_", "-"): value for name, value in headers.items()}}
    if body:
        lines = {"Content-Type": "application/json", "Content-Length": str(len(body)), **lines}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode("latin-1", "replace")
    return method.encode() + b" " + target + b" HTTP/1.1\r\n" + head + b"\r\n" + body

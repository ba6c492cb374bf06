"""A Redis server of a test's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...supervision import SupportGroup
from .base import ServerProcess


class RedisServer(ServerProcess):
    """Keeps what it got over a restart (append-only file, every write), unless it is told otherwise.

    Args:
        durable: False: it keeps nothing.
        password: What clients must know.
        certificate: Files with a certificate for 127.0.0.1 and its key: it speaks TLS, and nothing else.
        unix_socket: Listen there too.
        settings: More of its configuration, as on its command line.
    """

    program = "redis-server"
    ready = re.compile(r"Ready to accept connections")

    def __init__(
        self,
        group: SupportGroup,
        folder: Path,
        *,
        durable: bool = True,
        password: str | None = None,
        certificate: tuple[Path, Path] | None = None,
        unix_socket: Path | None = None,
        settings: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(group, folder, **options)
        self.durable = durable
        self.password = password
        self.certificate = certificate
        self.unix_socket = unix_socket
        self.settings = tuple(settings)

    @property
    def url(self) -> str:
        """Where clients reach it, with the password."""
        scheme = "redis" if self.certificate is None else "rediss"
        user = "" if self.password is None else f":{quote(self.password, safe='')}@"
        trust = "" if self.certificate is None else f"?ssl_ca_certs={quote(str(self.certificate[0]))}"
        return f"{scheme}://{user}127.0.0.1:{self.port}{trust}"

    def arguments(self) -> list[str]:
        arguments = ["--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]
        if self.certificate is None:
            arguments += ["--port", str(self.port)]
        else:
            certificate, key = map(str, self.certificate)
            arguments += ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            arguments += ["--tls-cert-file", certificate, "--tls-key-file", key, "--tls-ca-cert-file", certificate]
        if self.durable:
            arguments += ["--appendonly", "yes", "--appendfsync", "always"]
        if self.password is not None:
            arguments += ["--requirepass", self.password]
        if self.unix_socket is not None:
            arguments += ["--unixsocket", str(self.unix_socket)]
        return [*arguments, *self.settings]

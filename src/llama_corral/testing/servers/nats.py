"""A NATS server of a test's own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...supervision import SupportGroup
from .base import ServerProcess


class NatsServer(ServerProcess):
    """With JetStream, which keeps what it got over a restart.

    Args:
        options: More arguments of nats-server.
        jetstream: Whether it is enabled.
    """

    program = "nats-server"
    ready = re.compile(r"Server is ready")

    def __init__(
        self,
        group: SupportGroup,
        folder: Path,
        *,
        name: str | None = None,
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        jetstream: bool = True,
    ) -> None:
        super().__init__(group, folder, name=name, environment=environment)
        self._options = tuple(options)
        self._jetstream = jetstream

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def arguments(self) -> list[str]:
        jetstream = ("-js", "-sd", str(self.folder / "jetstream")) if self._jetstream else ()
        return ["-a", "127.0.0.1", "-p", str(self.port), *jetstream, *self._options]

"""What the servers of tests have in common."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from ...supervision import SupportGroup
from ..children import Child

# Keeps the server: signals go to it directly, and when the tests are gone, however they went, so is the server.
# It says so in one write: the lines of the server go there too, and would come between the pieces that print makes.
_KEEPER: Final = """
import os, signal, subprocess, sys, threading
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
server = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, user=sys.argv[1] or None,
                          preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGTERM, signal.SIGINT)])
os.write(1, b"corral keeps %d\\n" % server.pid)
threading.Thread(target=lambda: os.read(0, 1) or os.kill(server.pid, signal.SIGKILL), daemon=True).start()
sys.exit(server.wait() % 256)
"""
_KEPT: Final = re.compile(r"^corral keeps (\d+)$", re.MULTILINE)


class ServerMissingError(RuntimeError):
    """The program of a server is not installed here."""


class ServerProcess(Child):
    """A server of a test's own, on a free port of the loopback, with its data in a folder: to be killed, stopped and
    started again with the same port and data.

        async with open_support_group() as group:
            server = RedisServer(group, folder)
            await server.start()

    Raises:
        ServerMissingError: it is not installed.

    Attributes:
        port: Where it listens.
        url: Where clients of ours reach it.
    """

    program: ClassVar[str]
    """The name of its binary."""
    places: ClassVar[Sequence[str]] = ("/usr/sbin", "/usr/local/sbin")
    """Where the binary may be, beside the `PATH`."""
    user: ClassVar[str | None] = None
    """Who runs it when the tests run as root, where it refuses to be run by root."""

    def __init__(
        self,
        group: SupportGroup,
        folder: Path,
        *,
        name: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.binary = find_binary(self.program, self.places)
        self.folder = folder
        self.port = free_port()
        super().__init__(group, name or type(self).__name__, (), folder, environment or {})

    @property
    def url(self) -> str:
        raise NotImplementedError

    def arguments(self) -> list[str]:
        """Of the binary."""
        raise NotImplementedError

    def command(self) -> list[str]:
        user = self.user if self.user is not None and os.geteuid() == 0 else ""
        return [sys.executable, "-c", _KEEPER, user, self.binary, *self.arguments()]

    async def wait_ready(self) -> None:
        # A busy machine may run the server before its keeper gets to say whom it keeps, and then nobody could kill it.
        await self.wait_output(_KEPT)
        await super().wait_ready()

    @property
    def pid(self) -> int:
        """Of the server itself, not of the process that keeps it."""
        found = _KEPT.search(self.output)
        assert found is not None, f"{self.name} is not ready"
        return int(found[1])

    def send_signal(self, number: signal.Signals) -> None:
        if self.running and _KEPT.search(self.output):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
        # Else its keeper has not said yet whom it keeps; it ends the server when its input is closed.

    async def stop(self) -> None:
        """End it in order (SIGTERM) and return when it has ended; what it keeps is kept."""
        self.terminate()
        await self.wait_exit()


def find_binary(program: str, places: Sequence[str]) -> str:
    """The path of an installed program. Raises ServerMissingError."""
    found = shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *places]))
    if found is None:
        raise ServerMissingError(f"there is no {program} here")
    return found


def free_port() -> int:
    """A port of the loopback that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: Any = listener.getsockname()[1]
        return int(port)

"""A PostgreSQL server of a test's own."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

import anyio

from ...supervision import SupportGroup
from .base import ServerMissingError, ServerProcess, find_binary


class PostgresServer(ServerProcess):
    """A cluster that asks for the password in `url`. Keeps what it has committed over a restart, but not over a crash of the
    machine.

    As root it runs as the user `postgres`, whom its `folder` is opened for; the folders above must let everybody through, as
    `/tmp` does and pytest's `tmp_path` does not.

    Args:
        settings: More settings of the server: `{"max_connections": "5"}`.

    Attributes:
        password: Of the user `postgres`.
    """

    program = "postgres"
    places = (
        *(str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)),
        "/usr/pgsql/bin",
    )
    ready = re.compile(r"database system is ready to accept connections")
    user = "postgres"

    def __init__(
        self,
        group: SupportGroup,
        folder: Path,
        *,
        name: str | None = None,
        environment: Mapping[str, str] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(group, folder, name=name, environment=environment)
        self._initdb = find_binary("initdb", (str(Path(os.path.realpath(self.binary)).parent), *self.places))
        self._runs_as: str | None = self.user if os.geteuid() == 0 else None
        if self._runs_as is not None:
            try:
                pwd.getpwnam(self._runs_as)
            except KeyError:
                raise ServerMissingError("there is no user postgres here, and root may not run PostgreSQL") from None
        self._data = folder / "data"
        self._settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "fsync": "off",
            **(settings or {}),
        }
        self.password = secrets.token_hex(8)

    @property
    def url(self) -> str:
        return f"postgresql://postgres:{self.password}@127.0.0.1:{self.port}/postgres"

    def arguments(self) -> list[str]:
        return ["-D", str(self._data), *(f"--{name}={value}" for name, value in self._settings.items())]

    async def launch(self) -> None:
        if not self._data.exists():
            await self._create()
        await super().launch()

    async def _create(self) -> None:
        word = self.folder / "password"
        word.write_text(self.password)
        if self._runs_as is not None:
            self.folder.chmod(0o711)
            shutil.chown(word, self._runs_as)
            self._data.mkdir(0o700)
            shutil.chown(self._data, self._runs_as)
        await anyio.run_process(
            [
                *(self._initdb, "-D", str(self._data), "-U", "postgres", "-A", "scram-sha-256", "--pwfile", str(word)),
                *("-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"),
            ],
            cwd=self.folder,
            user=self._runs_as,
        )
        word.unlink()

    def send_signal(self, number: signal.Signals) -> None:
        """SIGTERM would let it wait for its clients: it gets SIGINT instead, and ends. SIGKILL, SIGSTOP and SIGCONT go to
        all of its processes: none works on when the first one is dead, or stands still."""
        if number is signal.SIGTERM:
            number = signal.SIGINT
        children = self._children() if number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT) else []
        super().send_signal(number)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

    def _children(self) -> list[int]:
        try:
            pid = self.pid
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except (OSError, AssertionError):  # it is not ready yet, or gone
            return []

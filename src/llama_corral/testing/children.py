"""A child process whose output is followed: what programs and servers of tests have in common."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

import anyio
import anyio.abc

from ..supervision import SupportGroup

START_TIME: Final = 60.0
"""Seconds that a program gets to be ready, and to end after a signal that ends it."""
_PIPE_GRACE: Final = 2.0


class Child:
    """A command as a child process that can be started again. Its owner's `group` ends it with its block.

    Attributes:
        name: What it is called in messages and in the names of files.
        log_path: The file with everything that it prints, over all its starts.
    """

    ready: re.Pattern[str]
    """What it prints when it is ready."""

    def __init__(
        self, group: SupportGroup, name: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.log_path = folder / f"{name}.log"
        self._group = group
        self._arguments = tuple(arguments)
        self._folder = folder
        self._environment = {**os.environ, **environment}
        self._process: anyio.abc.Process | None = None
        self._output = bytearray()
        self._news = anyio.Event()
        self._gone = anyio.Event()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    # Starting

    async def start(self) -> None:
        """Start it and return when it says that it is ready.

        Raises:
            RuntimeError: it ended instead; the message has what it printed.
            TimeoutError: it did neither within `START_TIME` seconds.
        """
        await self.launch()
        await self.wait_ready()

    async def launch(self) -> None:
        """Start it and return at once."""
        if self.running:
            raise RuntimeError(f"{self.name} is running already")
        # Shielded: it is short, and a process that has no owner yet would be lost.
        with anyio.CancelScope(shield=True):
            process = await anyio.open_process(
                self.command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env=self._environment,
            )
            self._process, self._gone = process, anyio.Event()
            self._output.clear()
            self._group.start_soon(self._follow, process, self._gone, name=f"output of {self.name}")

    def command(self) -> list[str]:
        """The command line of the next start."""
        return [*self._arguments]

    async def wait_ready(self) -> None:
        """Return when it has said that it is ready. Raises what `start` raises."""
        await self.wait_output(self.ready)

    async def restart(self) -> None:
        """Start it again and return when it is ready; SIGKILL if it still runs."""
        if self.running:
            self.kill()
        await self.wait_exit()
        await self.start()

    # Ending

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM: drain and end."""
        self.send_signal(signal.SIGTERM)

    def send_signal(self, number: signal.Signals) -> None:
        """Send any signal; nothing if it has ended."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    async def wait_exit(self) -> int:
        """Its exit code, as soon as it has ended; minus the number of the signal that killed it.

        Raises:
            TimeoutError: not within `START_TIME` seconds.
        """
        assert self._process is not None, f"{self.name} was never started"
        with anyio.fail_after(START_TIME):
            await self._gone.wait()
        code = self._process.returncode
        assert code is not None
        return code

    # Looking at it

    @property
    def running(self) -> bool:
        return self._process is not None and not self._gone.is_set()

    @property
    def pid(self) -> int:
        """Of its latest start."""
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    @property
    def output(self) -> str:
        """What its latest start has printed so far, on either stream."""
        return self._output.decode(errors="replace")

    async def wait_output(self, wanted: str | re.Pattern[str]) -> re.Match[str]:
        """Return as soon as its latest start has printed a whole line with it.

        Raises:
            RuntimeError: it ended without.
            TimeoutError: not within `START_TIME` seconds.
        """
        pattern = re.compile(re.escape(wanted)) if isinstance(wanted, str) else wanted
        with anyio.fail_after(START_TIME):
            while True:
                gone, news = self._gone.is_set(), self._news
                whole_lines = self.output.rpartition("\n")[0]
                found = pattern.search(whole_lines)
                if found is not None:
                    return found
                if gone:
                    code = None if self._process is None else self._process.returncode
                    raise RuntimeError(f"{self.name} ended ({code}) without {pattern.pattern!r}:\n{self.output}")
                await news.wait()

    async def _follow(self, process: anyio.abc.Process, gone: anyio.Event) -> None:
        """Take what it prints, until it has ended; end it if the block is left."""
        assert process.stdout is not None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._read, process.stdout)
                await process.wait()
                # A child of its own may hold the pipe open.
                tasks.cancel_scope.deadline = anyio.current_time() + _PIPE_GRACE
        finally:
            with anyio.CancelScope(shield=True):  # bounded: nobody survives a SIGKILL
                self.kill()
                await process.aclose()
            gone.set()
            self._tell()

    async def _read(self, stream: anyio.abc.ByteReceiveStream) -> None:
        with _open_log(self.log_path) as file:
            async for chunk in stream:
                file.write(chunk)
                self._output += chunk
                self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = anyio.Event()


def _open_log(path: Path) -> BinaryIO:
    return path.open("ab", buffering=0)

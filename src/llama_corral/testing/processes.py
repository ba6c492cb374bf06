"""Real processes for tests: `corral serve`, or `corral core` and workers, to be killed, stopped and started again.

async with open_stack(["app.py:flow"], workers=2) as stack, Client(stack.url) as client:
    task = await client.start("flow")
    stack.workers[0].kill()
    await stack.workers[0].restart()
    print(await task.result())

Works on both backends. The programs use free ports and a store of their own, are waited for by what they print, and end
with the block, however it ends: also with the process that runs the tests.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import BinaryIO, Final

import anyio
import anyio.abc

from ..supervision import SupportGroup, open_support_group

START_TIME: Final = 60.0
"""Seconds that a program gets to be ready, and to end after a signal that ends it."""
_PIPE_GRACE: Final = 2.0
_SHOWN_LINES: Final = 60
_READY: Final = re.compile(r"^corral (?:worker )?ready\b.* at (\S+)$", re.MULTILINE)

# Its standard input is a pipe from the tests: when they are gone, however they went, so is the program.
_CHILD: Final = """
import os, threading
threading.Thread(target=lambda: os.read(0, 1) or os._exit(137), daemon=True).start()
from llama_corral.cli import main
main()
"""


class Program:
    """A `corral` command as a child process that can be started again with the same port and store. `open_stack` makes
    them.

    Attributes:
        name: What it is called in messages and in the names of files.
        log_path: The file with everything that it prints, over all its starts.
    """

    def __init__(
        self, group: SupportGroup, name: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.log_path = folder / f"{name}.log"
        self._group = group
        self._arguments = tuple(arguments)
        self._folder = folder
        self._environment = {**os.environ, **environment}
        self._port: str | None = None
        self._process: anyio.abc.Process | None = None
        self._output = bytearray()
        self._news = anyio.Event()
        self._gone = anyio.Event()

    def __repr__(self) -> str:
        return f"<Program {self.name}>"

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
        arguments = [*self._arguments]
        if self._port is not None:
            arguments[arguments.index("--port") + 1] = self._port
        return [sys.executable, "-c", _CHILD, *arguments]

    async def wait_ready(self) -> None:
        """Return when it has said that it is ready. Raises what `start` raises."""
        found = await self.wait_output(_READY)
        if "--port" in self._arguments:
            self._port = found[1].rpartition(":")[2]

    async def restart(self) -> None:
        """Start it again with the same port and store and return when it is ready; SIGKILL if it still runs."""
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
    def url(self) -> str:
        """Where it listens, or the control plane that a worker works for."""
        found = _READY.search(self.output)
        assert found is not None, f"{self.name} is not ready"
        return found[1]

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
                if process.returncode is None:
                    process.kill()
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


class Stack:
    """What `open_stack` started.

    Attributes:
        folder: Where the programs run, with the store and the files of their output.
        main: `corral serve` or `corral core`.
        workers: The workers, in the order of their start.
    """

    def __init__(
        self,
        group: SupportGroup,
        folder: Path,
        targets: Sequence[str],
        worker_options: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        self.folder = folder
        self.workers: list[Program] = []
        self.main: Program
        self._group = group
        self._targets = tuple(targets)
        self._worker_options = tuple(worker_options)
        self._environment = dict(environment)

    @property
    def url(self) -> str:
        """Where clients reach it. It stays the same over restarts."""
        return self.main.url

    @property
    def store_path(self) -> Path:
        """The file of the store."""
        return self.folder / "corral.db"

    @property
    def programs(self) -> list[Program]:
        """All of them."""
        return [self.main, *self.workers]

    def make_main(self, command: str, options: Sequence[str]) -> Program:
        targets = self._targets if command == "serve" else ()
        places = ("--port", "0", "--store", f"sqlite:///{self.store_path}")
        return Program(self._group, command, (command, *targets, *places, *options), self.folder, self._environment)

    async def add_worker(
        self, *options: str, targets: Sequence[str] | None = None, environment: Mapping[str, str] | None = None
    ) -> Program:
        """One more worker, ready to take tasks. What is not given is as for the others."""
        worker = self.make_worker(*options, targets=targets, environment=environment)
        await worker.start()
        return worker

    def make_worker(
        self, *options: str, targets: Sequence[str] | None = None, environment: Mapping[str, str] | None = None
    ) -> Program:
        """One more worker, not started yet."""
        arguments = ("worker", *(self._targets if targets is None else targets), "--control-plane", self.url)
        worker = Program(
            self._group,
            f"worker-{len(self.workers)}",
            (*arguments, *self._worker_options, *options),
            self.folder,
            {**self._environment, **(environment or {})},
        )
        self.workers.append(worker)
        return worker

    def describe(self) -> str:
        """The last lines of each program's output."""
        parts = []
        for program in self.programs:
            lines = program.output.splitlines()[-_SHOWN_LINES:]
            parts.append("\n".join([f"-- {program.name}: the end of {program.log_path}", *lines]))
        return "\n".join(parts)


@asynccontextmanager
async def open_stack(
    targets: Sequence[str] = (),
    *,
    workers: int | None = None,
    folder: Path | None = None,
    options: Sequence[str] = (),
    worker_options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[Stack]:
    """Start the programs, yield when all of them are ready, and end them with the block.

    An error that leaves the block gets the end of every program's output as a note.

    Args:
        targets: What is served, as on the command line; files with an absolute path.
        workers: None: one process, `corral serve`. A number: `corral core` and so many workers.
        folder: Where the store and the logs are; None: a temporary folder, which is removed.
        options: More options of `corral serve` or `corral core`.
        worker_options: More options of every worker.
        environment: Variables for all of them, beside those of this process.

    Raises:
        RuntimeError: a program ended before it was ready; the message has what it printed.
    """
    async with AsyncExitStack() as places:
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="corral-test-"))
            places.callback(shutil.rmtree, folder, ignore_errors=True)
        group = await places.enter_async_context(open_support_group())
        stack = Stack(group, folder, targets, worker_options, environment or {})
        stack.main = stack.make_main("serve" if workers is None else "core", options)
        with _showing(stack):
            await stack.main.start()
            for _ in range(workers or 0):
                await stack.make_worker().launch()
            for worker in stack.workers:
                await worker.wait_ready()
            yield stack


@contextmanager
def _showing(stack: Stack) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(stack.describe())
        raise


def _open_log(path: Path) -> BinaryIO:
    return path.open("ab", buffering=0)

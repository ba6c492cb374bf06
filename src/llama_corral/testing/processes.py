"""Real processes for tests: `corral serve`, or `corral core` and workers, to be killed, stopped and started again.

async with open_stack(["app.py:flow"], workers=2) as stack, Client(stack.url) as client:
    task = await client.start("flow")
    stack.workers[0].kill()
    await stack.workers[0].restart()
    print(await task.result())

Works on both backends. The programs use free ports and, unless told otherwise, a store of their own; they are waited for by
what they print, and end with the block, however it ends: also with the process that runs the tests. Brokers and databases
that a test breaks as well are in `servers/`.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

from ..queues.urls import credentials_of
from ..supervision import SupportGroup, open_support_group
from .children import Child

_SHOWN_LINES: Final = 60
_READY: Final = re.compile(r"^corral (?:worker )?ready\b.* at (\S+)$", re.MULTILINE)

# Its standard input is a pipe from the tests: when they are gone, however they went, so is the program.
_CHILD: Final = """
import os, threading
threading.Thread(target=lambda: os.read(0, 1) or os._exit(137), daemon=True).start()
from llama_corral.cli import main
main()
"""


class Program(Child):
    """A `corral` command as a child process that can be started again with the same port and store. `open_stack` makes
    them."""

    ready = _READY

    def __init__(
        self, group: SupportGroup, name: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        super().__init__(group, name, arguments, folder, environment)
        self._port: str | None = None

    def command(self) -> list[str]:
        arguments = super().command()
        if self._port is not None:
            arguments[arguments.index("--port") + 1] = self._port
        return [sys.executable, "-c", _CHILD, *arguments]

    async def wait_ready(self) -> None:
        await super().wait_ready()
        if "--port" in self._arguments:
            self._port = self.url.rpartition(":")[2]

    @property
    def url(self) -> str:
        """Where it listens, or the control plane that a worker works for."""
        found = _READY.search(self.output)
        assert found is not None, f"{self.name} is not ready"
        return found[1]


class Stack:
    """What `open_stack` started.

    Attributes:
        folder: Where the programs run, with the files of their output.
        store_url: Of the store: a file in the folder, or what was given.
        queue_url: Of the broker; None: the cores have a queue of their own.
        cores: `corral serve`, or each `corral core`.
        workers: The workers, in the order in which they were made.
    """

    def __init__(
        self,
        group: SupportGroup,
        folder: Path,
        targets: Sequence[str],
        worker_options: Sequence[str],
        environment: Mapping[str, str],
        *,
        store_url: str | None = None,
        queue_url: str | None = None,
    ) -> None:
        self.folder = folder
        self.store_url = store_url or f"sqlite:///{self.store_path}"
        self.queue_url = queue_url
        self.cores: list[Program] = []
        self.workers: list[Program] = []
        self._group = group
        self._targets = tuple(targets)
        self._worker_options = tuple(worker_options)
        self._environment = dict(environment)

    @property
    def main(self) -> Program:
        """`corral serve`, or the first core."""
        return self.cores[0]

    @property
    def url(self) -> str:
        """Where clients reach `main`. It stays the same over restarts."""
        return self.main.url

    @property
    def store_path(self) -> Path:
        """The file of the store, unless another one was given."""
        return self.folder / "corral.db"

    @property
    def programs(self) -> list[Program]:
        """All of them."""
        return [*self.cores, *self.workers]

    def make_core(self, command: str, options: Sequence[str]) -> Program:
        """`corral serve` or one more `corral core`, not started yet."""
        targets = self._targets if command == "serve" else ()
        queue = () if self.queue_url is None else ("--queue", self.queue_url)
        core = Program(
            self._group,
            command if command == "serve" else f"core-{len(self.cores)}",
            (command, *targets, "--port", "0", "--store", self.store_url, *queue, *options),
            self.folder,
            self._environment,
        )
        self.cores.append(core)
        return core

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
        """One more worker for all the cores, which have to be ready; it is not started yet."""
        urls = ",".join(core.url for core in self.cores)
        arguments = ("worker", *(self._targets if targets is None else targets), "--control-plane", urls)
        worker = Program(
            self._group,
            f"worker-{len(self.workers)}",
            (*arguments, *self._worker_options, *options),
            self.folder,
            {**self._queue_credentials(), **self._environment, **(environment or {})},
        )
        self.workers.append(worker)
        return worker

    def _queue_credentials(self) -> dict[str, str]:
        user, password = credentials_of(self.queue_url or "")
        return ({} if user is None else {"CORRAL_QUEUE_USER": user}) | (
            {} if password is None else {"CORRAL_QUEUE_PASSWORD": password}
        )

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
    cores: int = 1,
    store_url: str | None = None,
    queue_url: str | None = None,
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
        cores: How many times `corral core`; they share the store and the queue. Workers know all of them.
        store_url: Of a store that is there already, such as a database that several cores can share; None: a file in the
            folder.
        queue_url: Of a broker; None: the cores' own queue. Workers ask the cores for it, and have what opens it in their
            environment.
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
        stack = Stack(
            group, folder, targets, worker_options, environment or {}, store_url=store_url, queue_url=queue_url
        )
        with _showing(stack):
            await _start([stack.make_core("serve" if workers is None else "core", options) for _ in range(cores)])
            await _start([stack.make_worker() for _ in range(workers or 0)])
            yield stack


async def _start(programs: Sequence[Program]) -> None:
    """All at a time."""
    for program in programs:
        await program.launch()
    for program in programs:
        await program.wait_ready()


@contextmanager
def _showing(stack: Stack) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(stack.describe())
        raise

"""Starting what is measured: programs of this project, and peers in environments of their own."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from . import environments

PEER_REQUIREMENT = "llama-agents-server>=0.8,<0.9"
ORIGINAL_REQUIREMENT = "llama-deploy==0.6.1"
HELLO = "llama_corral.examples.hello"
START_TIMEOUT = 60.0
STOP_TIMEOUT = 20.0

Flavour = Literal["anyio", "asyncio"]
PeerStore = Literal["memory", "sqlite"]

_READY = re.compile(r"ready\b.* at (http://\S+)")


@dataclass(frozen=True, slots=True)
class Server:
    """A program that is ready: a server that answers, or a worker, whose URL is that of its control plane.

    `store`: the file of its store, where that is an SQLite file.
    """

    url: str
    process: psutil.Process
    store: Path | None = None

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def memory_mib(self) -> float:
        """Resident memory."""
        return float(self.process.memory_info().rss) / 2**20

    def cpu_seconds(self) -> float:
        """User and system time so far, of all threads, and of the processes that it has started and that still run."""
        tree = [self.process, *self.process.children(recursive=True)]
        return float(sum(times.user + times.system for times in (one.cpu_times() for one in tree)))


@contextmanager
def open_corral(*targets: str, flavour: Flavour, cap: int, options: Sequence[str] = ()) -> Iterator[Server]:
    """`corral serve` of the targets on a fresh store on disk, with more options of the command line."""
    with tempfile.TemporaryDirectory(prefix="corral-bench-") as folder:
        store = Path(folder, "corral.db")
        command = _corral("serve", *targets, "--port", "0", "--store", f"sqlite:///{store.as_posix()}", *options)
        command += ["--step-flavour", flavour, "--max-concurrent-tasks", str(cap)]
        with _open_process(command, Path(folder)) as started:
            yield replace(_wait_ready(started, health="/ready"), store=store)


@dataclass(frozen=True, slots=True)
class Stack:
    """A core and its workers, each in a process of its own, which all serve the same workflow."""

    core: Server
    workers: tuple[Server, ...]

    @property
    def url(self) -> str:
        return self.core.url


@contextmanager
def open_core(*options: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """`corral core` with options of the command line; without `--store` among them on a fresh store on disk."""
    with tempfile.TemporaryDirectory(prefix="corral-bench-") as folder:
        store = () if "--store" in options else ("--store", f"sqlite:///{Path(folder, 'corral.db').as_posix()}")
        command = _corral("core", "--port", "0", *store, *options)
        with _open_process(command, Path(folder), environment) as started:
            yield _wait_ready(started, health="/ready")


@contextmanager
def open_stack(
    target: str,
    workers: int,
    *,
    core_options: Sequence[str] = (),
    worker_options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Stack]:
    """`corral core`, and so many times `corral worker` of the target."""
    with ExitStack() as stack, open_core(*core_options, environment=environment) as core:
        command = _corral("worker", target, "--control-plane", core.url, *worker_options)
        yield Stack(core, _open_workers(stack, [command] * workers, environment))


@contextmanager
def open_original(name: str, workers: int, *, module: str = HELLO) -> Iterator[Stack]:
    """The original's core with its simple queue, and so many services with the same workflow."""
    python, script = str(environments.python_with("llama-deploy", ORIGINAL_REQUIREMENT)), str(_beside("original.py"))
    spec = importlib.util.find_spec(module)
    assert spec is not None
    port, queue_port, *ports = map(str, free_ports(2 + workers))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="corral-bench-")))
        command = [python, script, "core", port, queue_port]
        core = _wait_ready(stack.enter_context(_open_process(command, folder)), health="/services")
        services = [[python, script, "service", f"{spec.origin}:{name}", name, port, own] for own in ports]
        yield Stack(core, _open_workers(stack, services))


def _open_workers(
    stack: ExitStack, commands: Sequence[Sequence[str]], environment: Mapping[str, str] | None = None
) -> tuple[Server, ...]:
    """All at once: each takes seconds to import what it needs."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="corral-bench-")))
    started = []
    for number, command in enumerate(commands):
        own = folder / str(number)
        own.mkdir()
        started.append(stack.enter_context(_open_process(command, own, environment)))
    return tuple(_wait_ready(one) for one in started)


def _corral(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "llama_corral.cli", *arguments, "--log-level", "warning"]


def _beside(name: str) -> Path:
    return Path(__file__).with_name(name)


def free_ports(number: int) -> list[int]:
    """Different ports of the loopback that are free now, for programs that cannot be given port 0."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def peer_python() -> Path:
    """The interpreter with llama-agents-server; made on first use."""
    return environments.python_with("llama-agents-server", PEER_REQUIREMENT)


@contextmanager
def open_peer(store: PeerStore, *, name: str = "hello", module: str = HELLO) -> Iterator[Server]:
    """llama-agents-server with the same workflow, on its memory store or on its SQLite store on disk."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    with tempfile.TemporaryDirectory(prefix="corral-bench-") as folder:
        command = [str(peer_python()), str(_beside("peer_server.py")), f"{spec.origin}:{name}", name]
        if store == "sqlite":
            command.append(str(Path(folder, "peer.db")))
        with _open_process(command, Path(folder)) as started:
            yield _wait_ready(started, health="/health")


@dataclass(frozen=True, slots=True)
class _Started:
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def _open_process(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[_Started]:
    """It is stopped, if need be by force, when the block is left."""
    log = folder / "output.txt"
    env = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")} | dict(
        environment or {}
    )
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield _Started(process, log)
    finally:
        ended = process.poll()
        if ended is not None:  # what went wrong in the block is probably its consequence
            print(f"the server ended by itself with {ended}:\n{log.read_text()}", file=sys.stderr)
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_ready(started: _Started, *, health: str | None = None) -> Server:
    """Return when it has printed `... ready ... at URL`. With `health`, that path of it must answer."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and started.process.poll() is None:
        found = _READY.search(started.log.read_text())
        if found and (health is None or _answers(found[1] + health)):
            return Server(found[1], psutil.Process(started.process.pid))
        time.sleep(0.05)
    code = started.process.poll()
    raise RuntimeError(f"the server did not come up (exit code {code}):\n{started.log.read_text()}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False

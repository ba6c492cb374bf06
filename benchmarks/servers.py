"""Starting what is measured: `corral serve`, and llama-agents-server in an environment of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from . import environments

PEER_REQUIREMENT = "llama-agents-server>=0.8,<0.9"
HELLO = "llama_corral.examples.hello"
START_TIMEOUT = 60.0
STOP_TIMEOUT = 20.0

Flavour = Literal["anyio", "asyncio"]
PeerStore = Literal["memory", "sqlite"]


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers. `store`: the file of its store, where that is an SQLite file."""

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
        """User and system time so far, of all threads."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def open_corral(*targets: str, flavour: Flavour, cap: int, options: Sequence[str] = ()) -> Iterator[Server]:
    """`corral serve` of the targets on a fresh store on disk, with more options of the command line."""
    with tempfile.TemporaryDirectory(prefix="corral-bench-") as folder:
        command = [sys.executable, "-m", "llama_corral.cli", "serve", *targets, "--port", "0"]
        store = Path(folder, "corral.db")
        command += ["--store", f"sqlite:///{store.as_posix()}", *options]
        command += ["--step-flavour", flavour, "--max-concurrent-tasks", str(cap), "--log-level", "warning"]
        with _open_server(command, Path(folder), health="/ready") as server:
            yield replace(server, store=store)


def peer_python() -> Path:
    """The interpreter with llama-agents-server; made on first use."""
    return environments.python_with("llama-agents-server", PEER_REQUIREMENT)


@contextmanager
def open_peer(store: PeerStore, *, name: str = "hello", module: str = HELLO) -> Iterator[Server]:
    """llama-agents-server with the same workflow, on its memory store or on its SQLite store on disk."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    with tempfile.TemporaryDirectory(prefix="corral-bench-") as folder:
        script = Path(__file__).with_name("peer_server.py")
        command = [str(peer_python()), str(script), f"{spec.origin}:{name}", name]
        if store == "sqlite":
            command.append(str(Path(folder, "peer.db")))
        with _open_server(command, Path(folder), health="/health") as server:
            yield server


@contextmanager
def _open_server(command: Sequence[str], folder: Path, *, health: str) -> Iterator[Server]:
    """A process that prints `... ready at URL`. It is stopped, if need be by force, when the block is left."""
    log = folder / "output.txt"
    env = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield Server(_wait_ready(process, log, health), psutil.Process(process.pid))
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


def _wait_ready(process: subprocess.Popen[bytes], log: Path, health: str) -> str:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"ready at (http://\S+)", log.read_text())
        if found and _answers(found[1] + health):
            return found[1]
        time.sleep(0.05)
    raise RuntimeError(f"the server did not come up (exit code {process.poll()}):\n{log.read_text()}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False

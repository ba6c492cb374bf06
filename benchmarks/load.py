"""A closed-loop HTTP/1.1 load generator: a process of its own, keep-alive sockets, the latency of every operation.

    echo '{"url": ..., "scenario": "run", ...}' | python -m benchmarks.load

A number of connections each do one operation after the other, for some seconds. One thread and a selector: the cheaper the
generator, the more of the machine is left to the server. Every answer is checked; what is wrong is counted, not timed.

As a module: `drive(plan)` starts that process and returns its `Load`.
"""

from __future__ import annotations

import json
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil

from . import report

Scenario = Literal["run", "session", "peer"]
Operation = Generator["bytes | Pause", "Answer", None]
"""Yields requests, is sent their answers, ends when the operation is done, raises `WrongAnswer` if it failed. A `Pause`
is waited for, and answered by the last answer again."""

ANSWER_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing for so many seconds, as a client that polls does it."""

    seconds: float


class WrongAnswer(Exception):
    """An answer that is not what a working server says."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do to a server. The first `warm_up` seconds are not measured.

    `run`: POST /services/{service}/run. `session`: POST /sessions/{id}/tasks, then GET its result with `?wait=`; one
    session a connection, as the tasks of a session run in order. `peer`: llama-agents-server's POST
    /workflows/{service}/run. `server_pid`: whose CPU time is read at the edges of the measured window.
    """

    url: str
    scenario: Scenario
    service: str
    connections: int
    seconds: float
    warm_up: float
    server_pid: int


@dataclass(frozen=True, slots=True)
class Load:
    """What came out. Times in seconds; latencies sorted. `generator_cpu` is the load generator's own CPU time."""

    seconds: float
    latencies: list[float]
    failures: int
    first_failure: str
    server_cpu: float
    generator_cpu: float

    @property
    def operations(self) -> int:
        return len(self.latencies)

    def percentile(self, share: float) -> float:
        """The latency that `share` (0 to 1) of the operations did not exceed; nan without any."""
        return report.percentile(self.latencies, share)


def drive(plan: Plan) -> Load:
    """Run the plan in a process of its own.

    Raises:
        RuntimeError: the process failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load"],
        input=json.dumps(asdict(plan)),
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
        timeout=plan.warm_up + plan.seconds + 4 * ANSWER_TIMEOUT,
    )
    if done.returncode:
        raise RuntimeError(f"the load generator failed:\n{done.stderr}")
    return Load(**json.loads(done.stdout))


# Requests and answers


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes

    def json(self, status: int = 200) -> Any:
        """The body's value. Raises WrongAnswer for another status or a body that is not JSON."""
        if self.status != status:
            raise WrongAnswer(f"status {self.status}: {self.body[:200]!r}")
        try:
            return json.loads(self.body)
        except ValueError as exc:
            raise WrongAnswer(f"not JSON: {self.body[:200]!r}") from exc


def post(path: str, value: Any = None) -> bytes:
    body = b"" if value is None else json.dumps(value).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()


def expect(value: Any, wanted: Any) -> None:
    if value != wanted:
        raise WrongAnswer(f"{value!r} instead of {wanted!r}")


# Scenarios. Every operation asks for something else, so that a stale or swapped answer is seen.

_numbers = count()


def run_once(service: str) -> Operation:
    name = f"caller {next(_numbers)}"
    answer = (yield post(f"/services/{service}/run", {"name": name})).json()
    expect((answer["status"], answer["result"]), ("completed", f"Hello, {name}!"))


def peer_once(service: str) -> Operation:
    name = f"caller {next(_numbers)}"
    answer = (yield post(f"/workflows/{service}/run", {"start_event": {"name": name}})).json()
    expect((answer["status"], answer["result"]["value"]["result"]), ("completed", f"Hello, {name}!"))


class SessionScenario:
    """A session for a connection, made by its first operation."""

    def __init__(self, service: str) -> None:
        self.service = service
        self.session: str | None = None

    def __call__(self) -> Operation:
        if self.session is None:
            self.session = (yield post("/sessions/create")).json()
        name = f"caller {next(_numbers)}"
        task = {"agent_id": self.service, "input": json.dumps({"name": name})}
        task_id = (yield post(f"/sessions/{self.session}/tasks", task)).json()
        answer = (yield get(f"/sessions/{self.session}/tasks/{task_id}/result?wait=20")).json()
        expect((answer["task_id"], answer["result"]), (task_id, f"Hello, {name}!"))


def operations(plan: Plan) -> Callable[[], Operation]:
    """What one connection does again and again."""
    if plan.scenario == "session":
        return SessionScenario(plan.service)
    once = run_once if plan.scenario == "run" else peer_once
    return lambda: once(plan.service)


# Connections


class Connection:
    """One socket, one operation after the other. `report(latency, failure)` hears of each that ended.

    `resume_at`: when the operation goes on that has asked for a pause (`resume`); None: it has not.
    """

    def __init__(
        self, address: tuple[str, int], begin: Callable[[], Operation], report: Callable[[float, str], None]
    ) -> None:
        self.socket = socket.create_connection(address, timeout=ANSWER_TIMEOUT)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._begin = begin
        self._report = report
        self._buffer = b""
        self._operation: Operation | None = None
        self._started = 0.0
        self._answer: Answer | None = None
        self.resume_at: float | None = None

    def start(self) -> None:
        """Begin the next operation."""
        self._operation = self._begin()
        self._started = time.perf_counter()
        first = next(self._operation)
        assert isinstance(first, bytes)
        self.socket.sendall(first)  # a request is small: it never fills the socket's buffer

    def on_readable(self) -> bool:
        """Read on; True if the operation ended.

        Raises:
            ConnectionError: the server closed the connection, which a keep-alive server has no reason to do.
        """
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._buffer += data
        answer = self._take_answer()
        return answer is not None and self._go_on(answer)

    def resume(self) -> bool:
        """Go on after a pause; True if the operation ended."""
        assert self._answer is not None
        self.resume_at = None
        return self._go_on(self._answer)

    def _go_on(self, answer: Answer) -> bool:
        assert self._operation is not None
        failure = ""
        try:
            wanted = self._operation.send(answer)
            if isinstance(wanted, Pause):
                self._answer, self.resume_at = answer, time.perf_counter() + wanted.seconds
            else:
                self.socket.sendall(wanted)
        except StopIteration:
            pass
        except (WrongAnswer, LookupError, TypeError) as exc:
            failure = f"{type(exc).__name__}: {exc}"
        else:
            return False
        self._report(time.perf_counter() - self._started, failure)
        return True

    def _take_answer(self) -> Answer | None:
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return None
        status_line, *headers = head.split(b"\r\n")
        for header in headers:
            name, _, value = header.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
                break
        else:
            raise ConnectionError("an answer without content-length")
        if len(rest) < length:
            return None
        self._buffer = rest[length:]
        return Answer(int(status_line.split()[1]), rest[:length])


class Client:
    """All connections of a plan on one selector."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._server = psutil.Process(plan.server_pid)
        self._latencies: list[float] = []
        self._failures: list[str] = []

    def run(self) -> Load:
        parts = urlsplit(self._plan.url)
        assert parts.hostname is not None
        assert parts.port is not None
        selector = selectors.DefaultSelector()
        for _ in range(self._plan.connections):
            connection = Connection((parts.hostname, parts.port), operations(self._plan), self._note)
            connection.start()
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        self._loop(selector, self._plan.warm_up)
        self._latencies.clear()  # failures of the warm-up count: they are no less wrong
        started, server, own = time.perf_counter(), self._server.cpu_times(), time.process_time()
        self._loop(selector, self._plan.seconds)
        seconds, after = time.perf_counter() - started, self._server.cpu_times()
        return Load(
            seconds=seconds,
            latencies=sorted(self._latencies),
            failures=len(self._failures),
            first_failure=self._failures[0] if self._failures else "",
            server_cpu=after.user + after.system - server.user - server.system,
            generator_cpu=time.process_time() - own,
        )

    def _loop(self, selector: selectors.BaseSelector, seconds: float) -> None:
        end = time.perf_counter() + seconds
        last_answer = time.perf_counter()
        while (now := time.perf_counter()) < end:
            ready = selector.select(min(end - now, 1.0))
            if ready:
                last_answer = now
            elif now - last_answer > ANSWER_TIMEOUT:
                raise TimeoutError(f"no answer for {ANSWER_TIMEOUT:g} s")
            for key, _ in ready:
                connection: Connection = key.data
                if connection.on_readable():
                    connection.start()

    def _note(self, latency: float, failure: str) -> None:
        if failure:
            self._failures.append(failure)
        else:
            self._latencies.append(latency)


def main() -> None:
    plan = Plan(**json.load(sys.stdin))
    json.dump(asdict(Client(plan).run()), sys.stdout)


if __name__ == "__main__":
    main()

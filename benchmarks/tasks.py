"""So many tasks through a control plane, ours or the original's: the same requests to both.

    echo '{"url": ..., "service": "hello", "clients": 16, "tasks": 1000}' | python -m benchmarks.tasks

A closed loop: each client makes a session, starts a task in it and waits for its result, until all tasks have ended. A
session for each task, because the original mixes up what tasks of one session write. The result is asked for with
`?wait=20`, which the original does not know: it answers `null` at once, and is asked again after 50 ms.

A task without a result after `LOST_AFTER` seconds is lost. As a module: `drive(plan)` starts that process and returns what
came out.
"""

from __future__ import annotations

import heapq
import json
import selectors
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

from . import report
from .load import ANSWER_TIMEOUT, Connection, Operation, Pause, WrongAnswer, expect, get, post

POLL = 0.05
LOST_AFTER = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """`service`: `hello` greets, `nap` sleeps for `seconds` and tells how long."""

    url: str
    service: str
    clients: int
    tasks: int
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """`seconds` from the first request to the last answer. `latencies` of the tasks that ended well, sorted; of the others,
    `lost` had no result in time and `failed` had a wrong one."""

    seconds: float
    latencies: list[float]
    failed: int
    lost: int
    first_failure: str
    generator_cpu: float

    @property
    def rate(self) -> float:
        """Tasks that ended well, a second."""
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        return report.percentile(self.latencies, share)


class LostTask(WrongAnswer):
    """There is no result."""


def drive(plan: Plan) -> Outcome:
    """Carry out the plan in a process of its own.

    Raises:
        RuntimeError: the process failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tasks"],
        input=json.dumps(asdict(plan)),
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    if done.returncode:
        raise RuntimeError(f"the load generator failed:\n{done.stderr}")
    return Outcome(**json.loads(done.stdout))


# In the process

_numbers = count()


def one_task(plan: Plan) -> Operation:
    """Session, task, result."""
    number = next(_numbers)
    start, wanted = (
        ({"seconds": plan.seconds}, f"{plan.seconds:g}")
        if plan.service == "nap"
        else ({"name": f"caller {number}"}, f"Hello, caller {number}!")
    )
    session = (yield post("/sessions/create")).json()
    task = {"agent_id": plan.service, "input": json.dumps(start)}
    task_id = (yield post(f"/sessions/{session}/tasks", task)).json()
    deadline = time.perf_counter() + LOST_AFTER
    question = get(f"/sessions/{session}/tasks/{task_id}/result?wait=20")
    while (answer := (yield question).json()) is None:
        if time.perf_counter() > deadline:
            raise LostTask(f"no result after {LOST_AFTER:g} s")
        yield Pause(POLL)
    expect((answer["task_id"], answer["result"]), (task_id, wanted))


class Crowd:
    """All clients of a plan on one selector."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._latencies: list[float] = []
        self._failures: list[str] = []
        self._begun = 0
        self._selector = selectors.DefaultSelector()
        self._pauses: list[tuple[float, int, Connection]] = []
        self._order = count()

    def run(self) -> Outcome:
        plan, parts = self._plan, urlsplit(self._plan.url)
        assert parts.hostname is not None
        assert parts.port is not None
        own, started = time.process_time(), time.perf_counter()
        for _ in range(min(plan.clients, plan.tasks)):
            connection = Connection((parts.hostname, parts.port), lambda: one_task(plan), self._note)
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)
            self._begin(connection)
        while self._begun - len(self._latencies) - len(self._failures):
            self._turn()
        lost = sum(text.startswith(LostTask.__name__) for text in self._failures)
        return Outcome(
            seconds=time.perf_counter() - started,
            latencies=sorted(self._latencies),
            failed=len(self._failures) - lost,
            lost=lost,
            first_failure=self._failures[0] if self._failures else "",
            generator_cpu=time.process_time() - own,
        )

    def _turn(self) -> None:
        now = time.perf_counter()
        wait = max(0.0, self._pauses[0][0] - now) if self._pauses else ANSWER_TIMEOUT
        ready = self._selector.select(wait)
        if not ready and not self._pauses:
            raise TimeoutError(f"no answer for {ANSWER_TIMEOUT:g} s")
        now = time.perf_counter()
        while self._pauses and self._pauses[0][0] <= now:
            connection = heapq.heappop(self._pauses)[2]
            self._after(connection, connection.resume())
        for key, _ in ready:
            self._after(key.data, key.data.on_readable())

    def _after(self, connection: Connection, ended: bool) -> None:
        if ended:
            self._begin(connection)
        elif connection.resume_at is not None:
            heapq.heappush(self._pauses, (connection.resume_at, next(self._order), connection))

    def _begin(self, connection: Connection) -> None:
        if self._begun < self._plan.tasks:
            self._begun += 1
            connection.start()
        else:  # or the server would close it sooner or later
            self._selector.unregister(connection.socket)
            connection.socket.close()

    def _note(self, latency: float, failure: str) -> None:
        if failure:
            self._failures.append(failure)
        else:
            self._latencies.append(latency)


def main() -> None:
    plan = Plan(**json.load(sys.stdin))
    json.dump(asdict(Crowd(plan).run()), sys.stdout)


if __name__ == "__main__":
    main()

"""Many tasks on two workers, one of which is killed again and again: every task ends, once, and no stored step is repeated.

`CORRAL_TEST_KILLED_TASKS=500` runs the whole of it; without, a shorter form.
"""

from __future__ import annotations

import math
import os
import signal
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest

from llama_corral.client import Client, Task
from llama_corral.testing import Stack

from .stored import Kill, check_against_kills, check_stream, look_after_kill, times_to_next_attempt
from .support import all_tasks, check_streams, count_open, each, flows_stack, read_marks

pytestmark = [pytest.mark.process, pytest.mark.trio]

TASKS = int(os.environ.get("CORRAL_TEST_KILLED_TASKS", "150"))
KILL_EVERY = 25
AT_ONCE = 12
"""Fewer tasks at a time than one worker takes, so that those of a killed worker do not wait for a slot."""
OPTIONS = ("--heartbeat", "0.3", "--lease", "1.2")
WORKER_OPTIONS = ("--checkpoints", "every_step", "--max-concurrent-tasks", "16")


@dataclass
class Run:
    """The tasks, and who kills their workers."""

    stack: Stack
    client: Client
    kills: list[Kill] = field(default_factory=list)
    ended: int = 0

    async def run_all(self) -> list[Task]:
        due, kills = anyio.create_memory_object_stream[None](math.inf)

        async def run_one(number: int) -> Task:
            name = f"task-{number}"
            task = await self.client.start("steps", {"name": name, "pause": 0.05}, task_id=name)
            await task.wait()
            self.ended += 1
            if self.ended % KILL_EVERY == 0:
                due.send_nowait(None)
            return task

        with due, kills:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.kill_forever, kills)
                done = await each(run_one, range(TASKS), at_once=AT_ONCE)
                due.close()
        return done

    async def kill_forever(self, due: anyio.abc.ObjectReceiveStream[None]) -> None:
        async for _ in due:
            worker = self.stack.workers[len(self.kills) % 2]
            pid, at = worker.pid, time.time()
            worker.kill()
            assert await worker.wait_exit() == -signal.SIGKILL
            self.kills.append(await look_after_kill(self.stack.store_url, pid, at))
            await worker.restart()


@pytest.mark.promise("P1", "P2", "P3")
@pytest.mark.timeout(300)
async def test_workers_killed_again_and_again(tmp_path: Path) -> None:
    async with (
        flows_stack(tmp_path, "steps", workers=2, options=OPTIONS, worker_options=WORKER_OPTIONS) as stack,
        Client(stack.url) as client,
    ):
        began = time.monotonic()
        run = Run(stack, client)
        tasks = await run.run_all()
        took = time.monotonic() - began
        endings = await check_streams(tasks)
        records = {task_id: record for task_id, (record, _) in endings.items()}
        assert {task_id: record.value for task_id, record in records.items()} == {t.id: t.id for t in tasks}
        assert len(records) == TASKS
        assert await count_open(client) == 0
        assert len(run.kills) == TASKS // KILL_EVERY
        assert Counter(info.task_id for info in await all_tasks(client)) == Counter(t.id for t in tasks)
        streams = {task_id: events for task_id, (_, events) in endings.items()}

    marks = read_marks(tmp_path)
    resumed = sum(event.type == "RunResumed" for events in streams.values() for event in events)
    for task_id, events in streams.items():
        check_stream(events, {1, 2, 3})
        check_against_kills(task_id, events, [mark for mark in marks if mark.name == task_id], run.kills)
    waits = sorted(times_to_next_attempt(marks, run.kills))
    assert waits
    print(
        f"\n{TASKS} tasks, {len(run.kills)} kills in {took:.1f} s; {resumed} attempts went on; {len(marks)} steps ran, "
        f"{len(marks) - 3 * TASKS} of them again; from kill to the next attempt: "
        f"median {statistics.median(waits):.2f} s, longest {waits[-1]:.2f} s of {len(waits)}"
    )

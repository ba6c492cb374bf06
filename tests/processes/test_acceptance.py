"""Many tasks on two workers, one of which is killed again and again: every task ends, once, and no stored step is repeated.

`CORRAL_TEST_KILLED_TASKS=500` runs the whole of it; without, a shorter form.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest

from llama_corral.client import Client, Task, TaskEvent, TaskInfo
from llama_corral.testing import Stack

from .support import Mark, check_endings, count_open, each, flows_stack, read_marks

pytestmark = [pytest.mark.process, pytest.mark.trio]

TASKS = int(os.environ.get("CORRAL_TEST_KILLED_TASKS", "150"))
KILL_EVERY = 25
AT_ONCE = 12
"""Fewer tasks at a time than one worker takes, so that those of a killed worker do not wait for a slot."""
OPTIONS = ("--heartbeat", "0.3", "--lease", "1.2")
WORKER_OPTIONS = ("--checkpoints", "every_step", "--max-concurrent-tasks", "16")


@dataclass
class Kill:
    """A worker was killed, and what the store held right after."""

    pid: int
    at: float
    looked_at: float
    stored: dict[str, tuple[int, int]]
    """Of each task with a checkpoint: its epoch, and how many events the checkpoint has."""


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
            looked_at = time.time()
            self.kills.append(Kill(pid, at, looked_at, read_checkpoints(self.stack.store_path)))
            await worker.restart()


def read_checkpoints(store: Path) -> dict[str, tuple[int, int]]:
    connection = sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)
    try:
        rows = connection.execute(
            "SELECT t.task_id, t.epoch, c.event_count FROM corral_checkpoints c JOIN corral_tasks t ON t.no = c.task_no"
        )
        return {task_id: (epoch, count) for task_id, epoch, count in rows}
    finally:
        connection.close()


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
        records = await check_endings(tasks)
        assert {task_id: record.value for task_id, record in records.items()} == {t.id: t.id for t in tasks}
        assert len(records) == TASKS
        assert await count_open(client) == 0
        assert len(run.kills) == TASKS // KILL_EVERY
        assert Counter(info.task_id for info in await all_tasks(client)) == Counter(t.id for t in tasks)
        streams = dict(zip(records, await each(read_events, tasks), strict=True))

    marks = read_marks(tmp_path)
    resumed = sum(event.type == "RunResumed" for events in streams.values() for event in events)
    for task_id, events in streams.items():
        check_stream(events)
        check_against_kills(task_id, events, [mark for mark in marks if mark.name == task_id], run.kills)
    waits = sorted(times_to_next_attempt(marks, run.kills))
    assert waits
    print(
        f"\n{TASKS} tasks, {len(run.kills)} kills in {took:.1f} s; {resumed} attempts went on; {len(marks)} steps ran, "
        f"{len(marks) - 3 * TASKS} of them again; from kill to the next attempt: "
        f"median {statistics.median(waits):.2f} s, longest {waits[-1]:.2f} s of {len(waits)}"
    )


async def read_events(task: Task) -> list[TaskEvent]:
    return [event async for event in task.events()]


async def all_tasks(client: Client) -> list[TaskInfo]:
    found: list[TaskInfo] = []
    while page := await client.tasks(before=found[-1].task_id if found else None, limit=100):
        found += page
    return found


def done_before(events: list[TaskEvent], index: int) -> set[int]:
    """The steps that had said that they were done when the log had so many events."""
    return {event.data["n"] for event in events[:index] if event.type == "Done"}


def check_stream(events: list[TaskEvent]) -> None:
    """An attempt goes on behind what its checkpoint has."""
    stored: set[int] = set()
    for event in events:
        if event.type == "RunResumed":
            stored = done_before(events, event.data["from_index"])
        elif event.type in ("Tick", "Done"):
            assert event.data["n"] not in stored, [(each.type, json.dumps(each.data)) for each in events]
    assert done_before(events, len(events)) == {1, 2, 3}


def check_against_kills(task_id: str, events: list[TaskEvent], marks: list[Mark], kills: list[Kill]) -> None:
    """What a checkpoint in the table had as done was not begun again, and was not forgotten."""
    for kill in kills:
        if task_id not in kill.stored:
            continue
        epoch, count = kill.stored[task_id]
        done = {str(n) for n in done_before(events, count)}
        again = [mark for mark in marks if mark.step in done and mark.at > kill.looked_at]
        assert not again, (task_id, again, kill)
        for event in events:
            if event.type == "RunResumed" and event.data["epoch"] > epoch:
                assert event.data["from_index"] >= count, (task_id, event, kill)


def times_to_next_attempt(marks: list[Mark], kills: list[Kill]) -> Iterator[float]:
    """Of each task that a killed worker was at, the time until its next step began elsewhere."""
    for kill in kills:
        last = {mark.name: mark for mark in marks if mark.at < kill.at}
        for mark in last.values():
            later = [each.at for each in marks if each.name == mark.name and each.at > kill.at]
            if mark.pid == kill.pid and later:
                yield min(later) - kill.at

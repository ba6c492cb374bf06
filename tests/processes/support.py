"""Asking many tasks at a time, and what must hold for each of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import anyio

from llama_corral.client import Client, Task, TaskEvent, TaskInfo
from llama_corral.protocol.messages import TaskResult
from llama_corral.testing import Stack, open_stack

FLOWS = Path(__file__).with_name("flows.py")
AT_ONCE = 16
T = TypeVar("T")
R = TypeVar("R")


@asynccontextmanager
async def flows_stack(folder: Path, *names: str, module: Path = FLOWS, **options: Any) -> AsyncIterator[Stack]:
    """A stack that serves flows of ours."""
    environment = {"CORRAL_TEST_MARKS": str(folder / "marks"), **options.pop("environment", {})}
    targets = [f"{name}={module}:{name}" for name in names]
    async with open_stack(targets, folder=folder, environment=environment, **options) as stack:
        yield stack


class Mark(NamedTuple):
    """A step began."""

    name: str
    step: str
    pid: int
    at: float


def read_marks(folder: Path) -> list[Mark]:
    """In the order in which they were written."""
    try:
        lines = (folder / "marks").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [Mark(name, step, int(pid), float(at)) for name, step, pid, at in map(str.split, lines)]


async def each(act: Callable[[T], Awaitable[R]], over: Iterable[T], *, at_once: int = AT_ONCE) -> list[R]:
    """All results in order, some calls at a time."""
    inputs = list(over)
    results: dict[int, R] = {}
    limiter = anyio.CapacityLimiter(at_once)

    async def one(number: int, value: T) -> None:
        async with limiter:
            results[number] = await act(value)

    async with anyio.create_task_group() as tasks:
        for number, value in enumerate(inputs):
            tasks.start_soon(one, number, value)
    return [results[number] for number in range(len(inputs))]


async def start_named(client: Client, service: str, count: int, **arguments: Any) -> list[Task]:
    """`count` tasks named `service-n`, which is also their id."""

    async def start(number: int) -> Task:
        name = f"{service}-{number}"
        return await client.start(service, {"name": name, **arguments}, task_id=name)

    return await each(start, range(count))


async def wait_event(task: Task, index: int = 0) -> TaskEvent:
    """An event, as soon as the task has published so many."""
    async with task.events(index) as events:
        async for event in events:
            return event
    raise AssertionError(f"{task} ended without event {index}")


async def wait_type(task: Task, kind: str) -> TaskEvent:
    """The first event of a type."""
    async with task.events() as events:
        async for event in events:
            if event.type == kind:
                return event
    raise AssertionError(f"{task} ended without {kind}")


async def answer(task: Task) -> None:
    """Say yes to whoever waits for a person."""
    await task.send_event("HumanResponseEvent", {"response": "yes"})


async def check_endings(tasks: Sequence[Task]) -> dict[str, TaskResult]:
    """All of them end as completed, exactly once, with a stream of 0..n-1 that says the same as the record."""
    return {task_id: record for task_id, (record, _) in (await check_streams(tasks)).items()}


async def check_streams(tasks: Sequence[Task]) -> dict[str, tuple[TaskResult, list[TaskEvent]]]:
    """The same, and how they ended with what they published."""

    async def check(task: Task) -> tuple[TaskResult, list[TaskEvent]]:
        record = await task.wait()
        assert record.status == "completed", record
        async with task.events() as events:
            seen = [event async for event in events]
        assert [event.index for event in seen] == list(range(len(seen)))
        kinds = [event.type for event in seen]
        # An attempt that ended but was not heard of may have published its last event.
        resumed = len(kinds) - kinds[::-1].index("RunResumed") if "RunResumed" in kinds else 0
        assert kinds.index("StopEvent", resumed) == len(kinds) - 1
        assert events.record == record
        return record, seen

    return {task.id: found for task, found in zip(tasks, await each(check, tasks), strict=True)}


async def all_tasks(client: Client) -> list[TaskInfo]:
    """Newest first, over all pages."""
    found: list[TaskInfo] = []
    while page := await client.tasks(before=found[-1].task_id if found else None, limit=100):
        found += page
    return found


async def count_open(client: Client) -> int:
    """Tasks that have not ended."""
    services = (await client.status())["services"].values()
    return sum(numbers[kind] for numbers in services for kind in ("held", "queued", "running", "waiting"))

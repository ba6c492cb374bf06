"""A cluster at work: many tasks whose streams are followed as they come, people who answer, and whoever breaks parts of it.

Everything happens by progress, that is after so many endings, so that a slow machine sees the same as a fast one.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio

from llama_corral.client import Client, TaskEvent
from llama_corral.exceptions import Unavailable
from llama_corral.protocol import topics
from llama_corral.protocol.messages import TaskResult
from llama_corral.queues import open_queue
from llama_corral.testing import Stack
from llama_corral.testing.children import Child

from .stored import Kill, look_after_kill, read_rows
from .support import Mark, flows_stack

FLOW = Path(__file__).with_name("journey.py")
CAPACITIES = (4, 8, 16)
LEASE = 1.2
OPTIONS = ("--heartbeat", "0.3", "--lease", str(LEASE))
WORKER_OPTIONS = ("--checkpoints", "every_step")
SECRET = {"CORRAL_STATE_SECRET": "sixteen letters at least"}
AT_ONCE = 44
"""More tasks at a time than there are slots: some always wait, and who takes them is a matter of free slots."""
PAUSE = 0.2
"""Seconds that a step works."""
CALM = 56
"""How many tasks end before the first break: two for each slot."""
CALM_PAUSE = 0.8
"""The same before the first break, where it is counted who works: slots are to be scarce, not the processor."""
PATIENCE = 15
"""How many others end before a person answers."""
MAX_ATTEMPTS = 50
"""A task may be hit again and again before it makes progress, also by a machine that is too busy for so short a lease."""
HOP = 3
"""Events that a follower takes from one control plane before it goes on at the next one."""
RETRY_FOR = 60.0
NO_TICKETS = 0.5
"""Seconds in which no ticket comes if there is none."""

Break = Callable[[], Awaitable[None]]


class Progress:
    """Counts what has ended."""

    def __init__(self) -> None:
        self.count = 0
        self._news = anyio.Event()

    def add(self) -> None:
        self.count += 1
        self._news.set()
        self._news = anyio.Event()

    async def wait_count(self, count: int) -> None:
        while self.count < count:
            await self._news.wait()


class Cluster:
    """Control planes and three workers of different capacities.

    Attributes:
        clients: One for each control plane; of several, one more that knows all of them.
        kills: Of workers, in order.
        broken_at: When the first break came.
        live: What followers saw as it came, by task.
        endings: And the record that they got with it.
    """

    def __init__(self, stack: Stack, clients: Sequence[Client], count: int) -> None:
        self.stack = stack
        self.clients = tuple(clients)
        self.count = count
        self.kills: list[Kill] = []
        self.broken_at = 0.0
        self.live: dict[str, list[TaskEvent]] = {}
        self.endings: dict[str, TaskResult] = {}
        self.progress = Progress()
        self._capacities = dict(zip(stack.workers, CAPACITIES, strict=True))
        self._pids = {worker.pid: worker for worker in stack.workers}
        self._at_once = anyio.CapacityLimiter(AT_ONCE)

    # The tasks

    @property
    def names(self) -> list[str]:
        return [name_of(number) for number in range(self.count)]

    @property
    def people(self) -> list[str]:
        """The tasks that wait for a person: every tenth."""
        return self.names[4::10]

    async def run_all(self, breaks: Sequence[Break]) -> None:
        """All tasks, from the first start to the last ending, and the breaks: the first one after `CALM` endings, the
        others evenly spread over what follows."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._break_all, breaks)
            for number in range(self.count):
                group.start_soon(self._run_one, number)

    async def _break_all(self, breaks: Sequence[Break]) -> None:
        every = (self.count * 9 // 10 - CALM) / max(1, len(breaks))
        for number, act in enumerate(breaks):
            await self.progress.wait_count(CALM + int(number * every))
            self.broken_at = self.broken_at or time.time()
            await act()

    async def _run_one(self, number: int) -> None:
        name = name_of(number)
        person = number % 10 == 4
        client = self.clients[number % len(self.clients)]
        asked = anyio.Event()
        async with anyio.create_task_group() as group:
            async with self._at_once:
                arguments = {"name": name, "pause": pause_of(name), "person": person}
                await client.start("journey", arguments, task_id=name, max_attempts=MAX_ATTEMPTS)
                group.start_soon(self._see_through, number, asked)
                await asked.wait()
            if person:
                await self.progress.wait_count(min(self.progress.count + PATIENCE, self.count - len(self.people)))
                await self._answer(name, client)

    async def _see_through(self, number: int, asked: anyio.Event) -> None:
        """To its ending. Those that wait for a person, and some of the others, are followed."""
        name = name_of(number)
        if number % 2:
            await self.clients[number % len(self.clients)].task(name).wait()
        else:
            await self._follow(number, asked)
        self.progress.add()
        asked.set()

    async def _follow(self, number: int, asked: anyio.Event) -> None:
        """A few events from each control plane in turn."""
        name = name_of(number)
        seen = self.live[name] = []
        for client in itertools.cycle(self.clients[::-1] if number % 4 else self.clients):
            async with client.task(name).events(len(seen)) as events:
                async for event in events:
                    seen.append(event)
                    if event.type == "InputRequiredEvent":
                        asked.set()
                    if len(seen) % HOP == 0:
                        break
                else:
                    assert events.record is not None
                    self.endings[name] = events.record
                    return

    async def _answer(self, name: str, client: Client) -> None:
        """Once: where it is unknown whether it arrived, the store is asked."""
        while True:
            try:
                await client.task(name).send_event("HumanResponseEvent", {"response": f"yes, {name}"})
                return
            except Unavailable:
                if name in await self.answered():
                    return
                await anyio.sleep(0.5)

    async def answered(self) -> Counter[str]:
        """How many outside events each task got."""
        rows = await self.read_rows("SELECT task_id, inbox_head FROM corral_tasks WHERE inbox_head > 0")
        return Counter(dict(rows))

    async def read_rows(self, statement: str) -> list[Any]:
        """What is in the database."""
        return await read_rows(self.stack.store_url, statement)

    async def read_tickets(self) -> list[str]:
        """The tasks whose tickets wait in the queue, where nobody else takes any. Left out are those that killed workers
        had open, which come back some time later."""
        found: list[str] = []
        async with (
            open_queue(self.stack.queue_url or self.stack.url) as queue,
            queue.consumer(topics.topic(topics.DEFAULT_NAMESPACE, "journey")) as consumer,
        ):
            with anyio.move_on_after(NO_TICKETS):
                while True:
                    for delivery in await consumer.receive():
                        if not delivery.redelivered:
                            found.append(str(delivery.message.data.get("task_id")))
                        await delivery.ack()
        return found

    # The breaks

    async def kill_worker(self, *others: Child) -> None:
        """SIGKILL to one worker after the other, each at a time with others, and a new start in its place."""
        worker = self.stack.workers[len(self.kills) % len(self.stack.workers)]
        at = time.time()
        for child in (*others, worker):
            child.kill()
        for child in (*others, worker):
            await child.wait_exit()
        for child in others:
            await child.launch()
        self.kills.append(await look_after_kill(self.stack.store_url, worker.pid, at))
        await worker.restart()
        self._pids[worker.pid] = worker
        for child in others:
            await child.wait_ready()

    # Who worked

    def shares(self, pids: Sequence[int]) -> dict[int, float]:
        """Of each capacity: what its worker did of these steps, as a part of what is its share by capacity."""
        done = Counter(self._capacities[self._pids[pid]] for pid in pids)
        return {each: done[each] / len(pids) * sum(CAPACITIES) / each for each in CAPACITIES}

    def most_at_once(self, by_task: Iterable[Sequence[Mark]]) -> dict[int, int]:
        """Of each capacity: how many steps its worker had in work at a time, as far as they are known to have run through:
        the same process began another one of the task after it."""
        moments: dict[int, list[tuple[float, int]]] = defaultdict(list)
        for marks in by_task:
            for mark, after in itertools.pairwise(marks):
                if mark.pid == after.pid and mark.step != after.step:
                    moments[mark.pid] += (mark.at, 1), (mark.at + pause_of(mark.name), -1)
        most: dict[int, int] = dict.fromkeys(CAPACITIES, 0)
        for pid, changes in moments.items():
            capacity = self._capacities[self._pids[pid]]
            at_work = itertools.accumulate(change for _, change in sorted(changes))
            most[capacity] = max(most[capacity], *at_work)
        return most

    async def stop_workers(self) -> None:
        """SIGTERM, and all of them end well."""
        for worker in self.stack.workers:
            worker.terminate()
        for worker in self.stack.workers:
            assert await worker.wait_exit() == 0


def name_of(number: int) -> str:
    return f"task-{number}"


def pause_of(name: str) -> float:
    return CALM_PAUSE if int(name.rpartition("-")[2]) < CALM else PAUSE


@asynccontextmanager
async def open_cluster(folder: Path, count: int, **options: Any) -> AsyncIterator[Cluster]:
    """Ready to work."""
    async with AsyncExitStack() as places:
        stack = await places.enter_async_context(
            flows_stack(
                folder,
                "journey",
                module=FLOW,
                workers=0,
                options=OPTIONS,
                worker_options=WORKER_OPTIONS,
                environment=SECRET,
                **options,
            )
        )
        for capacity in CAPACITIES:
            await stack.make_worker("--max-concurrent-tasks", str(capacity)).launch()
        for worker in stack.workers:
            await worker.wait_ready()
        urls = [core.url for core in stack.cores]
        clients = [
            await places.enter_async_context(Client(known, retry_for=RETRY_FOR, reconnect_for=RETRY_FOR))
            for known in (*urls, *([urls] if len(urls) > 1 else []))
        ]
        yield Cluster(stack, clients, count)

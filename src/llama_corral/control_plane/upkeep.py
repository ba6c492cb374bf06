"""What a control plane does by itself: timers only. No task's way leads through here unless something failed."""

# ruff: noqa: RUF100 - flake8-async has rules that ruff does not have or has switched off

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Callable, Iterable
from typing import Final

import anyio

from ..abc import MessageQueue, Store
from ..exceptions import QueueUnavailable, Unavailable
from ..protocol import topics
from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import ActionTypes
from ..protocol.records import TaskFilter, Ticket
from .config import ControlPlaneConfig
from .effects import MESSAGES_INSTANCE, Effects
from .leases import Leases
from .registry import Registry
from .reports import MessageReports

logger = logging.getLogger(__name__)

START_TICKETS: Final = 1_000_000
BACKSTOP_TICKETS: Final = 1_000
FIRST_RETRY: Final = 0.5


class Deadlines:
    """Wakes whoever sleeps until the next deadline. Deadlines are rounded up by a 64th of their distance, a second at
    most: a million tasks with a minute each are some hundred wake-ups and numbers."""

    def __init__(self) -> None:
        self._heap: list[float] = []
        self._known: set[float] = set()
        self._earlier = anyio.Event()

    def add(self, deadline: float, now: float) -> None:
        # Powers of two, so that deadlines at slightly different distances share their numbers.
        step = 2.0 ** min(0, max(-5, math.floor(math.log2(max(deadline - now, 1e-3) / 64))))
        due = math.ceil(deadline / step) * step
        if due not in self._known:
            self._known.add(due)
            heapq.heappush(self._heap, due)
            if self._heap[0] == due:
                self._earlier.set()

    async def wait_due(self, now: Callable[[], float]) -> None:
        while not self._heap or self._heap[0] > now():
            self._earlier = anyio.Event()
            # At most an hour at once: wall clocks are set, and a timer of the loop does not notice.
            with anyio.move_on_after(min(3600.0, self._heap[0] - now()) if self._heap else None):
                await self._earlier.wait()
        while self._heap and self._heap[0] <= now():
            self._known.remove(heapq.heappop(self._heap))


class Upkeep:
    """The background of one control plane; each `..._forever` is a support task."""

    def __init__(
        self,
        store: Store,
        queue: MessageQueue,
        registry: Registry,
        effects: Effects,
        reports: MessageReports,
        config: ControlPlaneConfig,
        now: Callable[[], float],
    ) -> None:
        self.deadlines = Deadlines()
        self._store = store
        self._queue = queue
        self._registry = registry
        self._effects = effects
        self._reports = reports
        self._config = config
        self._now = now

    # Once, before anything else

    async def start(self, *, alone: bool) -> None:
        """Bring what earlier processes left behind back to life.

        Args:
            alone: Nobody else has the store, so every instance in it is dead, and every task that one holds is free.
        """
        if alone:
            left = [instance.instance_id for instance in await self._store.list_instances()]
            if left:
                tickets = await self._store.reap(left, self._now())
                logger.info("took over from %d instances of an earlier process: %d tasks", len(left), len(tickets))
        for service in await self._store.list_services():
            self._registry.learn(service)
        await self.expire()
        self._effects.tickets(await self._store.due_tickets(limit=START_TICKETS, now=self._now()))

    # Timers

    async def backstop_forever(self) -> None:
        """Look every now and then, and soon after a message could not be published, for tickets that nobody has."""
        retry = FIRST_RETRY
        while True:
            with anyio.move_on_after(self._config.backstop_interval):
                await self._effects.in_doubt.wait()
            if self._effects.in_doubt.is_set():
                # Not at once: whatever failed has failed just now.
                await anyio.sleep(retry)
                retry = min(self._config.backstop_interval, retry * 2)
            else:
                retry = FIRST_RETRY
            self._effects.in_doubt = anyio.Event()
            try:
                self._effects.tickets(
                    self._unheard(await self._store.due_tickets(limit=BACKSTOP_TICKETS, now=self._now()))
                )
                await self.expire()
            except Unavailable as error:
                logger.warning("the backstop could not look: %s", error)
                self._effects.in_doubt.set()

    def _unheard(self, due: Iterable[Ticket]) -> list[Ticket]:
        """Without those in whose topic messages still wait: publishing again is free once, not every time."""
        waiting = self._queue.statistics().get("topics", {})
        namespace = self._config.topic_namespace
        return [ticket for ticket in due if not waiting.get(topics.topic(namespace, ticket.service_name))]

    async def deadlines_forever(self) -> None:
        """End what nobody holds when its time is over. Owners end their own."""
        while True:
            await self.deadlines.wait_due(self._now)
            try:
                await self.expire()
            except Unavailable as error:
                logger.warning("could not end overdue tasks; the backstop will: %s", error)

    async def expire(self) -> None:
        with anyio.CancelScope(shield=True):
            for answer in await self._store.expire(self._now()):
                self._effects.answered(answer, "timed_out")
        await self._expire_messages_only()

    async def _expire_messages_only(self) -> None:
        # Their services do not know about deadlines, and we are the owner.
        for name in list(self._registry.messages_only()):
            which = TaskFilter((TaskStatus.RUNNING, TaskStatus.WAITING), service_name=name, limit=BACKSTOP_TICKETS)
            for record in await self._store.list_tasks(which):
                overdue = record.deadline is not None and record.deadline <= self._now()
                if overdue and record.owner == MESSAGES_INSTANCE:
                    await self._reports.end(record, TaskStatus.TIMED_OUT, "The task's deadline passed.")

    async def reap_forever(self, *, alone: bool) -> None:
        """Queue again what dead instances hold. Those of this process live as long as it does."""
        leases = Leases(self._config.lease)
        while True:
            try:
                await self._reap(leases, alone=alone)
            except Unavailable as error:
                logger.warning("the reaper could not look: %s", error)
            await anyio.sleep(self._config.lease / 4)

    async def _reap(self, leases: Leases, *, alone: bool) -> None:
        local = self._registry.local_instances
        if not alone:
            # Other control planes judge our instances too.
            for instance_id in local:
                await self._store.heartbeat(instance_id, ())
        instances = await self._store.list_instances()
        dead = leases.dead((each for each in instances if each.instance_id not in local), anyio.current_time())
        if not dead:
            return
        with anyio.CancelScope(shield=True):
            tickets = await self._store.reap(dead, self._now())
            # Some may have failed with it; the answer does not name them, and this is rare.
            self._effects.changes.notify_all()
            self._effects.tickets(tickets)
        logger.warning(
            "lost %d instances (%s); %d tasks are queued again", len(dead), ", ".join(dead[:5]), len(tickets)
        )

    async def listen_forever(self) -> None:
        """Hear what other control planes on the same store have changed."""
        topic = topics.instance(self._config.topic_namespace, topics.CONTROL_PLANE_NAME)
        while True:
            try:
                async with self._queue.subscribe(topic) as subscription:
                    self._effects.changes.notify_all()
                    while True:
                        message = await subscription.receive()
                        if message.action == ActionTypes.WAKE_UP and message.publisher_id != self._effects.publisher_id:
                            self._effects.changes.notify(
                                str(message.data.get("task_id")), ended=message.data.get("kind") != "events"
                            )
            except QueueUnavailable as error:
                logger.warning("cannot hear the other control planes: %s", error)
                await anyio.sleep(self._config.heartbeat_interval)

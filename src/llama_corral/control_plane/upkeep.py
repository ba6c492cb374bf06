"""What a control plane does by itself: timers only. No task's way leads through here unless something failed."""

# ruff: noqa: RUF100 - flake8-async has rules that ruff does not have or has switched off

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import anyio

from ..abc import MessageQueue, Store
from ..exceptions import NotFound, QueueUnavailable, Unavailable
from ..protocol import topics
from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import ActionTypes, QueueMessage
from ..protocol.records import InstanceRecord, TaskFilter, Ticket
from ..supervision import Backoff
from .config import ControlPlaneConfig
from .effects import MESSAGES_INSTANCE, Effects
from .leases import Leases
from .registry import Registry
from .reports import MessageReports

logger = logging.getLogger(__name__)

PORTION: Final = 5_000
"""Tickets of a service that are published again at a time. Its next portion follows when these are taken."""
BACKLOG_INTERVAL: Final = 1.0
MESSAGES_PAGE: Final = 1_000
PURGE_BATCH: Final = 200
DUE_BATCH: Final = 500
"""Tasks that one unit of the store ends or wakes: others are to get their turn in between."""
ALARM_GAP: Final = 0.02
FIRST_RETRY: Final = 0.5
HEALTHY_AFTER: Final = 5.0
"""Seconds of hearing others after which a lost connection is the first one again."""
MAX_NAMES: Final = 20
"""Names in a line of the log."""


class Upkeep:
    """The background of one control plane; each `..._forever` is a support task."""

    def __init__(
        self,
        store: Store,
        queue: MessageQueue,
        registry: Registry,
        effects: Effects,
        reports: MessageReports,
        leases: Leases,
        config: ControlPlaneConfig,
        now: Callable[[], float],
    ) -> None:
        self._store = store
        self._queue = queue
        self._registry = registry
        self._effects = effects
        self._reports = reports
        self._leases = leases
        self._config = config
        self._now = now
        self._looked: float | None = None
        self._backlog: set[str] = set()

    # Once, before anything else

    async def start(self, *, alone: bool) -> None:
        """Bring what earlier processes left behind back to life.

        Args:
            alone: Nobody else has the store, so every embedded instance in it is dead, and every task that one holds is
                free. Workers are processes of their own, and live on.
        """
        if alone:
            left = [each.instance_id for each in await self._store.list_instances() if each.embedded]
            if left:
                reaped = await self._store.reap(left, self._now())
                logger.info(
                    "took over from an earlier process; instances: %d, tasks queued again: %d, tasks ended: %d",
                    len(left),
                    len(reaped.tickets),
                    len(reaped.ended),
                )
        self._registry.learn_all(await self._store.list_services())
        await self.look()
        self._effects.tickets(await self._missing(everything=not self._queue.durable))

    # Timers

    async def alarm_forever(self) -> None:
        """Do what is due when it is due."""
        while True:
            due = await self._effects.alarm.wait_due(self._now)
            try:
                await self.look(due)
            except Unavailable as error:
                logger.warning("could not look at what is due; the backstop will: %s", error)
            # Not oftener, however many moments there are.
            await anyio.sleep(ALARM_GAP)

    async def look(self, due: float = math.inf) -> None:
        """End what nobody holds and whose time is over, wake what waits for a timer, ticket what may start now; then set
        the alarm for what comes next. Owners end their own tasks.

        Args:
            due: The moment that the alarm was set to. It may lie before the last look: clocks are set back.
        """
        now = self._now()
        await self._expire(now)
        await self._wake(now)
        if self._looked is not None:
            since = min(self._looked if self._looked <= now else 0.0, math.nextafter(due, 0.0))
            tickets = await self._store.due_tickets(limit=PORTION, now=now, since=since)
            self._effects.tickets(tickets)
            if len(tickets) == PORTION:
                self._effects.in_doubt.set()  # there may be more
        self._looked = now
        await self._expire_messages_only()
        self._effects.alarm.add(await self._store.next_due(now))

    async def _expire(self, now: float) -> None:
        count = DUE_BATCH
        while count == DUE_BATCH:
            with anyio.CancelScope(shield=True):
                answers = await self._store.expire(now, limit=DUE_BATCH)
                for answer in answers:
                    self._effects.answered(answer, "timed_out")
            count = len(answers)

    async def _wake(self, now: float) -> None:
        count = DUE_BATCH
        while count == DUE_BATCH:
            with anyio.CancelScope(shield=True):
                tickets = await self._store.wake(now, limit=DUE_BATCH)
                self._effects.tickets(tickets)
            count = len(tickets)

    async def _expire_messages_only(self) -> None:
        # Their services do not know about deadlines, and we are the owner.
        for name in list(self._registry.messages_only()):
            try:
                await self._expire_messages_of(name)
            except NotFound:
                logger.debug("a task was deleted while those of %s were looked at; the next look goes on", name)

    async def _expire_messages_of(self, service_name: str) -> None:
        which = TaskFilter((TaskStatus.RUNNING, TaskStatus.WAITING), service_name=service_name, limit=MESSAGES_PAGE)
        more = True
        while more:
            records = await self._store.list_tasks(which)
            for record in records:
                if record.deadline is None or record.owner != MESSAGES_INSTANCE:
                    continue
                if record.deadline <= self._now():
                    await self._reports.end(record, TaskStatus.TIMED_OUT, "The task's deadline passed.")
                else:
                    self._effects.alarm.add(record.deadline)
            more = len(records) == MESSAGES_PAGE
            if more:
                which = replace(which, before=records[-1].task_id)

    async def backstop_forever(self) -> None:
        """Look every now and then, and soon after a message could not be published, for what should have happened."""
        retry = FIRST_RETRY
        while True:
            interval = self._config.backstop_interval
            with anyio.move_on_after(min(interval, BACKLOG_INTERVAL) if self._backlog else interval):
                await self._effects.in_doubt.wait()
            doubt = self._effects.in_doubt.is_set()
            if doubt:
                # Not at once: whatever failed has failed just now.
                await anyio.sleep(retry)
                retry = min(self._config.backstop_interval, retry * 2)
            else:
                retry = FIRST_RETRY
            self._effects.in_doubt = anyio.Event()
            if doubt:
                # What others should have heard may be lost too.
                self._effects.tell_others("all")
            try:
                self._registry.learn_all(await self._store.list_services())
                self._effects.tickets(await self._missing(everything=doubt))
                await self.look()
            except Unavailable as error:
                logger.warning("the backstop could not look: %s", error)
                self._effects.in_doubt.set()

    async def _missing(self, *, everything: bool) -> list[Ticket]:
        """Tickets that may be lost, a portion for each service: publishing one again is free once, not every time.

        None for a service in whose topic messages still wait, where the queue knows that. Without `everything` only for
        services with a free slot: somebody would have taken them. Where no slot is free, tickets waiting is as it should
        be, and in a queue that cannot count them every look would leave one more of each.
        """
        waiting = self._queue.statistics().get("topics", {})
        namespace = self._config.topic_namespace
        counts = await self._store.count_tasks()
        queued = {name for name, numbers in counts.items() if numbers.get("queued")}
        heard = {name for name in queued if waiting.get(topics.topic(namespace, name))}
        unheard = queued - heard
        if unheard and not everything:
            # Services that take tasks out of messages have no slots that anybody knows of.
            speaks = self._registry.is_messages_only
            free = await self._with_free_slots(counts)
            unheard = {name for name in unheard if name in free or speaks(name)}
        tickets: list[Ticket] = []
        more: set[str] = set()
        for name in sorted(unheard):
            found = await self._store.due_tickets(limit=PORTION, now=self._now(), service_name=name)
            tickets += found
            if len(found) == PORTION:
                more.add(name)
        # What waits in a topic may be a portion only: after a doubt, and after a portion, it is looked at sooner.
        self._backlog = (queued if everything else self._backlog & queued) - unheard | more
        return tickets

    async def _with_free_slots(self, counts: Mapping[str, Mapping[str, int]]) -> set[str]:
        free: dict[str, int] = {}
        for instance in await self._store.list_instances():
            free[instance.service_name] = free.get(instance.service_name, 0) + instance.capacity
        return {name for name, slots in free.items() if slots > counts.get(name, {}).get("running", 0)}

    async def reap_forever(self, *, alone: bool) -> None:
        """Queue again what dead instances hold. Those of this process live as long as it does."""
        while True:
            try:
                await self._reap(alone=alone)
            except Unavailable as error:
                logger.warning("the reaper could not look: %s", error)
            await anyio.sleep(self._config.lease / 4)

    async def _reap(self, *, alone: bool) -> None:
        local = self._registry.local_instances
        if not alone:
            # Other control planes judge our instances too.
            for instance_id in local:
                await self._store.heartbeat(instance_id, ())
        instances = await self._store.list_instances()
        # Unregistered owners never beat: those that live register again within their lease.
        instances += [InstanceRecord(owner, "", 0, 0.0) for owner in await self._store.list_strangers()]
        spared = local | {MESSAGES_INSTANCE}
        dead = self._leases.dead((each for each in instances if each.instance_id not in spared), anyio.current_time())
        if not dead:
            return
        with anyio.CancelScope(shield=True):
            reaped = await self._store.reap(dead, self._now())
            self._effects.lost(reaped)
        logger.warning(
            "lost instances: %s; tasks queued again: %s; tasks ended: %d",
            _some(dead),
            _some([ticket.task_id for ticket in reaped.tickets]),
            len(reaped.ended),
        )

    async def purge_forever(self) -> None:
        """Remove what ended longer than the retention time ago, in batches with pauses of the same length: at most half of
        the writer's time, whatever there is to remove."""
        retention = self._config.retention
        while retention:
            try:
                while True:
                    began = anyio.current_time()
                    if not await self._store.purge(self._now() - retention, limit=PURGE_BATCH):
                        break
                    await anyio.sleep(anyio.current_time() - began)
            except Unavailable as error:
                logger.warning("could not remove old tasks; the next look will: %s", error)
            await anyio.sleep(max(1.0, min(60.0, retention / 4)))

    # Other control planes on the same store

    async def announce_forever(self) -> None:
        """Say every now and then that this one is there."""
        while True:
            self._effects.tell_others("here")
            await anyio.sleep(self._config.heartbeat_interval)

    async def listen_forever(self) -> None:
        """Hear what other control planes have changed, and notice when the queue was away."""
        topic = topics.instance(self._config.topic_namespace, topics.CONTROL_PLANE_NAME)
        backoff = Backoff(maximum=self._config.heartbeat_interval)
        failures = 0
        while True:
            began = anyio.current_time()
            try:
                async with self._queue.subscribe(topic) as subscription:
                    self._begin_to_hear(again=failures > 0)
                    while True:
                        self._hear(await subscription.receive())
            except QueueUnavailable as error:
                self._effects.peers.deaf()
                failures = 1 if anyio.current_time() - began >= HEALTHY_AFTER else failures + 1
                level = logging.WARNING if failures == 1 else logging.DEBUG
                logger.log(level, "cannot hear the other control planes, trying again: %s", error)
            await anyio.sleep(backoff.delay(failures))

    def _begin_to_hear(self, *, again: bool) -> None:
        self._effects.peers.listening(anyio.current_time())
        self._effects.tell_others("hello")
        # What was said before is unknown.
        self._effects.changes.notify_all()
        if again:
            logger.info("the message queue is back")
            if not self._queue.durable:
                # It may have been restarted, and then all tickets are lost.
                self._effects.in_doubt.set()

    def _hear(self, message: QueueMessage) -> None:
        sender = message.publisher_id
        if message.action != ActionTypes.WAKE_UP or sender == self._effects.publisher_id:
            return
        effects, kind = self._effects, message.data.get("kind")
        if kind in ("ended", "events"):
            effects.changes.notify(str(message.data.get("task_id")), ended=kind == "ended")
        elif kind == "all":
            effects.changes.notify_all()
        elif kind == "service":
            self._registry.forget(str(message.data.get("service_name")))
        elif kind == "left":
            effects.peers.left(sender)
        elif kind in ("hello", "here"):
            effects.peers.heard(sender, anyio.current_time())
            if kind == "hello":
                effects.tell_others("here")


def _some(names: Sequence[str]) -> str:
    """How many there are, and the first of them."""
    if not names:
        return "0"
    shown = ", ".join(names[:MAX_NAMES])
    return f"{len(names)} ({shown}{', ...' if len(names) > MAX_NAMES else ''})"

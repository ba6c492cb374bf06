"""What follows from a stored change: tickets and wake-ups on the queue, news for the readers of this process.

Everything here is synchronous and is called right after a commit, so that no cancellation fits between the two. What
needs the queue goes into an outbox, which support tasks empty. Nothing in it has to survive: the store says which
tickets are due, and a wake-up is a hint.
"""

# ruff: noqa: RUF100 - flake8-async has rules that ruff does not have or has switched off

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final

import anyio
import anyio.abc
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from ..abc import MessageQueue, Store
from ..events import Changes
from ..exceptions import CorralError
from ..protocol import topics
from ..protocol.lifecycle import TaskStatus
from ..protocol.messages import ActionTypes, QueueMessage, TaskDefinition, new_id
from ..protocol.records import ClaimRequest, HeldTask, Reaped, ReportAnswer, SendAnswer, Terminal, Ticket
from .alarm import Alarm
from .config import ControlPlaneConfig
from .peers import Peers
from .registry import Registry

logger = logging.getLogger(__name__)

Item = Ticket | tuple[QueueMessage, str, bool]
"""A ticket, or a message with its topic and whether everybody is to hear it."""
OUTBOX_LIMIT: Final = 10_000
PUBLISHERS: Final = 4
LOOK_AGAIN: Final = 1.0
"""Seconds after which the store is asked what is due next, where only it knows: once for many tasks."""
MESSAGES_INSTANCE: Final = "messages"
"""The owner of tasks whose service takes them out of messages and never claims."""


def messages_claim(task_id: str, now: float) -> ClaimRequest:
    """The claim on behalf of such a service. The same for each task every time, so that it can be asked for again."""
    return ClaimRequest(task_id, MESSAGES_INSTANCE, f"{MESSAGES_INSTANCE}:{task_id}", now)


class Endings:
    """Endings on their way to requests of this process that wait for them, past the store.

    Only what was stored by this process comes this way; whoever finds nothing looks into the store.
    """

    def __init__(self) -> None:
        self._wanted: dict[str, Terminal | None] = {}

    def expect(self, task_id: str) -> AbstractContextManager[None]:
        return _Expected(self._wanted, task_id)

    def put(self, task_id: str, terminal: Terminal) -> None:
        if task_id in self._wanted:
            self._wanted[task_id] = terminal

    def get(self, task_id: str) -> Terminal | None:
        return self._wanted.get(task_id)


class _Expected(AbstractContextManager[None]):
    __slots__ = ("_task_id", "_wanted")

    def __init__(self, wanted: dict[str, Terminal | None], task_id: str) -> None:
        self._wanted = wanted
        self._task_id = task_id

    def __enter__(self) -> None:
        self._wanted[self._task_id] = None

    def __exit__(self, *exc_info: object) -> None:
        self._wanted.pop(self._task_id, None)


class Effects:
    """The acting half of the control plane. `publish_forever` is its support task.

    Attributes:
        changes: Who reads what in this process.
        endings: Who waits for which ending in this process.
        in_doubt: Set when a ticket may not have been published: look into the store soon.
        alarm: When something is due by itself.
        peers: Who else is there.
        publisher_id: Names this control plane to the others.
    """

    def __init__(
        self,
        store: Store,
        queue: MessageQueue,
        registry: Registry,
        config: ControlPlaneConfig,
        now: Callable[[], float],
        *,
        alone: bool,
    ) -> None:
        self.changes = Changes()
        self.endings = Endings()
        self.in_doubt = anyio.Event()
        self.alarm = Alarm()
        # It sorts by the time of the start.
        self.publisher_id = f"control_plane-{int(now() * 1000):012x}-{new_id()}"
        self.peers = Peers(self.publisher_id, config.lease, alone=alone)
        self._store = store
        self._queue = queue
        self._registry = registry
        self._config = config
        self._now = now
        self._alone = alone
        self._namespace = config.topic_namespace
        self._outbox: MemoryObjectSendStream[Item] | None = None
        self._published = self._failed = 0

    # Deciders call these after their commit.

    def tickets(self, due: Iterable[Ticket]) -> None:
        for ticket in due:
            self._put(ticket)

    def answered(self, answer: SendAnswer, kind: str) -> None:
        """An outside event or a cancel request was stored."""
        self.tickets(answer.tickets)
        if answer.owner is not None:
            self.wake(answer.owner, answer.task_id, kind)
        if answer.ended:
            self.changed(answer.task_id)

    def ended(self, task_id: str, terminal: Terminal, answer: ReportAnswer) -> None:
        """A report with an ending was answered. It may have led to another attempt instead."""
        if answer.retry_at is not None:
            self.alarm.add(answer.retry_at)
            self.changed(task_id, ended=False)
        else:
            if answer.status == "ok":
                self.endings.put(task_id, terminal)
            self.changed(task_id)
        self.tickets(answer.tickets)

    def lost(self, reaped: Reaped) -> None:
        """Tasks were taken away from an instance."""
        for answer in reaped.ended:
            if answer.status is TaskStatus.FAILED:
                logger.warning("the task %s has failed (worker_lost): it has no attempts left", answer.task_id)
            else:
                logger.info("the task %s lost its worker and has ended: %s", answer.task_id, answer.status.value)
            self.changed(answer.task_id)
        for ticket in reaped.tickets:
            # A request that waits for it may want to know that nobody works on it.
            self.changed(ticket.task_id)
        self.tickets(reaped.tickets)
        self.look_again()

    def released(self, task_id: str, answer: ReportAnswer, wake_at: float | None = None) -> None:
        """A task was handed back, or its run has left memory."""
        self.alarm.add(wake_at)
        # Its deadline was its owner's business until now, and only the store knows it.
        self.look_again()
        self.tickets(answer.tickets)
        # A request that waits for it may want to know that nobody works on it.
        self.changed(task_id)

    def look_again(self) -> None:
        """Something may become due of which only the store knows when."""
        self.alarm.add(self._now() + LOOK_AGAIN)

    def wake(self, instance_id: str, task_id: str, kind: str) -> None:
        if instance_id != MESSAGES_INSTANCE:
            self._broadcast(instance_id, {"task_id": task_id, "kind": kind})

    def changed(self, task_id: str, *, ended: bool = True) -> None:
        """News for the readers of a task, here and in the other control planes on the store."""
        self.changes.notify(task_id, ended=ended)
        self.tell_others("ended" if ended else "events", task_id=task_id)

    def tell_others(self, kind: str, **data: str) -> None:
        """Say something to the other control planes on the store. What they do about it: `Upkeep.listen_forever`."""
        if not self._alone:
            self._broadcast(topics.CONTROL_PLANE_NAME, {"kind": kind, **data})

    def send_message(self, message: QueueMessage) -> None:
        """Publish to the service that `message.type` names."""
        self._put((message, topics.topic(self._namespace, message.type), False))

    def _broadcast(self, instance_id: str, data: dict[str, Any]) -> None:
        message = QueueMessage(publisher_id=self.publisher_id, action=ActionTypes.WAKE_UP, type=instance_id, data=data)
        self._put((message, topics.instance(self._namespace, instance_id), True))

    def _put(self, item: Item) -> None:
        try:
            if self._outbox is None:
                raise anyio.ClosedResourceError
            self._outbox.send_nowait(item)
        except (anyio.WouldBlock, anyio.BrokenResourceError, anyio.ClosedResourceError):
            # Full: the broker is away or slow. The store knows the ticket; the backstop brings it.
            self._failed += 1
            self.in_doubt.set()

    # The outbox

    def close(self) -> None:
        """`publish_forever` ends when it has published what is in the outbox now."""
        if self._outbox is not None:
            self._outbox.close()

    async def publish_forever(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        self._outbox, items = anyio.create_memory_object_stream[Item](OUTBOX_LIMIT)
        with self._outbox, items:
            async with anyio.create_task_group() as publishers:
                for number in range(PUBLISHERS):
                    publishers.start_soon(self._publish_all, items, name=f"publisher {number}")
                task_status.started()

    async def _publish_all(self, items: MemoryObjectReceiveStream[Item]) -> None:
        async for item in items:
            try:
                with anyio.fail_after(self._config.publish_timeout):
                    await self._publish(item)
                self._published += 1
            except (CorralError, TimeoutError) as error:
                self._failed += 1
                if not self.in_doubt.is_set():
                    logger.warning("could not publish; the store keeps the ticket: %s", str(error) or "timeout")
                self.in_doubt.set()

    async def _publish(self, item: Item) -> None:
        if isinstance(item, Ticket):
            await self._publish_ticket(item)
        else:
            message, topic, everybody = item
            await (self._queue.broadcast(message, topic) if everybody else self._queue.publish(message, topic))

    async def _publish_ticket(self, ticket: Ticket) -> None:
        if not await self.messages_only(ticket.service_name):
            # Who claims gets everything else with the claim, in the version that is stored then.
            await self._publish_task(TaskDefinition(input="", task_id=ticket.task_id, agent_id=ticket.service_name))
            return
        record = await self._store.get_task(ticket.task_id)
        if record is None or record.status is not TaskStatus.QUEUED:
            return  # another control plane has published it
        if record.not_before is not None and record.not_before > self._now():
            self.alarm.add(record.not_before)
            return
        definition = TaskDefinition(
            input=record.input, task_id=record.task_id, session_id=record.session_id, agent_id=record.service_name
        )
        await self._publish_task(definition)
        # After the publishing: a crash in between publishes twice, the other order would lose the task.
        claim = await self._store.claim(messages_claim(ticket.task_id, self._now()))
        if claim is not None and not await self.messages_only(ticket.service_name):
            # An instance has registered meanwhile. Whoever saw to that may have looked before this claim was there.
            self.lost(
                await self._store.reclaim(MESSAGES_INSTANCE, [HeldTask(ticket.task_id, claim.epoch)], self._now())
            )

    async def _publish_task(self, definition: TaskDefinition) -> None:
        assert definition.agent_id is not None
        message = QueueMessage(
            publisher_id=self.publisher_id,
            action=ActionTypes.NEW_TASK,
            type=definition.agent_id,
            data=definition.model_dump(),
        )
        await self._queue.publish(message, topics.topic(self._namespace, definition.agent_id))

    async def messages_only(self, service_name: str) -> bool | None:
        """Whether a service takes its tasks out of messages and never claims. None: there is no such service."""
        known = self._registry.is_messages_only(service_name)
        if known is not False:
            # Also who did so: a task that is claimed on behalf of a service that claims by itself would never end.
            service = await self._store.get_service(service_name)
            if service is None:
                self._registry.forget(service_name)
            else:
                self._registry.learn(service)
            known = self._registry.is_messages_only(service_name)
        return known

    def statistics(self) -> Mapping[str, Any]:
        return {
            "outbox": 0 if self._outbox is None else self._outbox.statistics().current_buffer_used,
            "control_planes": self.peers.count(anyio.current_time()),
            "published": self._published,
            "unpublished": self._failed,
            "readers": self.changes.statistics(),
        }

"""Consumers and subscriptions for clients that are only heard of request by request: each is a lease with a task of its own.

What is in the hands of a client is here, so that it comes back when the client is gone. Works on any `MessageQueue`, on
Trio and on asyncio, and knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import anyio
import anyio.abc

from ..abc import Consumer, Delivery, MessageQueue
from ..exceptions import Conflict, QueueUnavailable
from ..protocol.messages import QueueMessage, new_id
from ..protocol.queue_calls import Received

logger = logging.getLogger(__name__)

DEFAULT_LEASE: Final = 15.0
SHORTEST_LEASE: Final = 0.1
LONGEST_LEASE: Final = 3600.0
MAX_LEASES: Final = 10_000
MAX_OPEN: Final = 1_000
"""Deliveries that one consumer may have open; beyond it `receive` raises."""
MAX_BATCH: Final = 64
"""Messages in one answer."""
BROADCAST_BUFFER: Final = 1_000
"""Broadcasts kept for one subscription; beyond it the oldest is dropped."""


class Lease(ABC):
    """What one client may do until it was silent for `seconds`, or closes it."""

    def __init__(self, topic: str, seconds: float) -> None:
        self.lease_id = new_id()
        self.topic = topic
        self.seconds = seconds
        self.ended = anyio.Event()
        self._scope = anyio.CancelScope(deadline=anyio.current_time() + seconds)
        self._busy = 0
        self._seq = 0
        self._answer: tuple[Received, ...] = ()
        self._lock = anyio.Lock()
        self._receiving: anyio.CancelScope | None = None
        self._closing = False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A request of the client is here: it is not silent."""
        self._busy += 1
        self._scope.deadline = math.inf
        try:
            yield
        finally:
            self._busy -= 1
            if not self._busy:
                self._scope.deadline = anyio.current_time() + self.seconds

    async def receive(self, seq: int, max_messages: int) -> tuple[Received, ...]:
        """Wait for messages, or give the same answer again. A call that is cancelled has taken no message, or its answer is
        kept for the next call with the same `seq`. Nothing: another call overtook it, or the lease is over.

        Raises:
            Conflict: `seq` is neither that of the last answer nor the next one.
            QueueUnavailable: the queue is away, and with it the lease; or too many deliveries are open.
        """
        self._interrupt()  # its client asks anew, so it does not hear the answer any more
        async with self._lock:
            if self._closing:
                return ()
            if seq == self._seq > 0:
                return self._still_open(self._answer)
            if seq != self._seq + 1:
                raise Conflict(f"receive {seq} of a lease comes after {self._seq}", seq=self._seq)
            with anyio.CancelScope() as self._receiving:
                try:
                    # No checkpoint between the messages and the answer that keeps them.
                    self._answer = await self._take(min(max_messages, MAX_BATCH))
                    self._seq = seq
                    return self._answer
                finally:
                    self._receiving = None
            return ()

    async def abandon(self, seq: int) -> None:
        """Nobody will take the answer to `receive` number `seq`, whether it was given or not."""
        self._interrupt()
        async with self._lock:
            if seq == self._seq + 1:
                self._seq, self._answer = seq, ()
            elif seq == self._seq:
                answer, self._answer = self._answer, ()
                await self.settle((), [item.number for item in answer])

    async def close(self) -> None:
        """End the lease; returns when what was open is back. Repeating it is harmless."""
        self._closing = True
        self._interrupt()
        async with self._lock:
            self._scope.cancel()
        await self.ended.wait()

    async def hold(self, queue: MessageQueue, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Keep the lease until it is over. Started when it can be used; raises what the queue raises before that."""
        try:
            with self._scope:
                await self._hold(queue, task_status)
        finally:
            self._closing = True
            self._interrupt()  # whoever waits for a message that cannot come any more
            self.ended.set()

    def _interrupt(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()

    @abstractmethod
    async def settle(self, ack: Sequence[int], nack: Sequence[int]) -> None:
        """Settle deliveries by their numbers. Those that are not open are passed over."""

    @abstractmethod
    async def _hold(self, queue: MessageQueue, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Keep the queue's side of the lease open, until it is cancelled."""

    @abstractmethod
    async def _take(self, limit: int) -> tuple[Received, ...]:
        """Wait for 1 to `limit` messages. Cancelling it loses nothing."""

    @abstractmethod
    def _still_open(self, answer: tuple[Received, ...]) -> tuple[Received, ...]:
        """What of a kept answer is to be given again."""


class ConsumerLease(Lease):
    """The consumer of one client, with what it has open."""

    def __init__(self, topic: str, group: str, seconds: float) -> None:
        super().__init__(topic, seconds)
        self.group = group
        self.open: dict[int, Delivery] = {}
        self._consumer: Consumer | None = None
        self._number = 0

    async def settle(self, ack: Sequence[int], nack: Sequence[int]) -> None:
        for number in ack:
            if (delivery := self.open.get(number)) is not None:
                await delivery.ack()
                self.open.pop(number, None)
        for number in nack:
            if (delivery := self.open.get(number)) is not None:
                await delivery.nack()
                self.open.pop(number, None)

    async def _hold(self, queue: MessageQueue, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with queue.consumer(self.topic, self.group) as self._consumer:
            task_status.started()
            await anyio.sleep_forever()

    async def _take(self, limit: int) -> tuple[Received, ...]:
        assert self._consumer is not None
        room = MAX_OPEN - len(self.open)
        if room <= 0:
            raise QueueUnavailable(
                f"{MAX_OPEN} deliveries of {self.topic!r} are open in the hands of one consumer",
                hint="Ack or nack some of them.",
                limit=MAX_OPEN,
            )
        try:
            deliveries = await self._consumer.receive(min(limit, room))
        except QueueUnavailable:
            self._closing = True  # a consumer that was lost stays lost: the client opens another one
            self._scope.cancel()
            raise
        return tuple(self._number_of(delivery) for delivery in deliveries)

    def _number_of(self, delivery: Delivery) -> Received:
        self._number += 1
        self.open[self._number] = delivery
        return Received(self._number, delivery.message, delivery.redelivered)

    def _still_open(self, answer: tuple[Received, ...]) -> tuple[Received, ...]:
        return tuple(item for item in answer if item.number in self.open)


class SubscriptionLease(Lease):
    """The subscription of one client, with what it has not fetched yet."""

    def __init__(self, topic: str, seconds: float) -> None:
        super().__init__(topic, seconds)
        self._heard: deque[QueueMessage] = deque(maxlen=BROADCAST_BUFFER)
        self._news = anyio.Event()

    async def settle(self, ack: Sequence[int], nack: Sequence[int]) -> None:
        """Broadcasts are not settled."""

    async def _hold(self, queue: MessageQueue, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with queue.subscribe(self.topic) as subscription:
            task_status.started()
            while True:
                self._heard.append(await subscription.receive())
                self._news.set()

    async def _take(self, limit: int) -> tuple[Received, ...]:
        while not self._heard:
            self._news = anyio.Event()
            await self._news.wait()
        count = min(limit, len(self._heard))
        return tuple(Received(0, self._heard.popleft()) for _ in range(count))

    def _still_open(self, answer: tuple[Received, ...]) -> tuple[Received, ...]:
        return answer


class LeasedQueue:
    """The leases on one queue. `run` owns their tasks.

    Args:
        queue: Open, and stays open longer than `run`.
        lease: Seconds of a lease whose client asks for no duration of its own.
        max_leases: Limit of consumers and subscriptions together; beyond it they are refused.
    """

    def __init__(self, queue: MessageQueue, *, lease: float = DEFAULT_LEASE, max_leases: int = MAX_LEASES) -> None:
        self._queue = queue
        self._lease = lease
        self._max_leases = max_leases
        self._leases: dict[str, Lease] = {}
        self._tasks: anyio.abc.TaskGroup | None = None

    async def run(self) -> None:
        """Hold leases until cancelled: then all of them end, and what their clients had open comes back."""
        try:
            async with anyio.create_task_group() as self._tasks:
                await anyio.sleep_forever()
        finally:
            self._tasks = None

    async def open_consumer(self, topic: str, group: str, seconds: float | None = None) -> Lease:
        """Raises QueueUnavailable: the queue is away, or there are too many leases."""
        return await self._open(ConsumerLease(topic, group, self._seconds(seconds)))

    async def open_subscription(self, topic: str, seconds: float | None = None) -> Lease:
        """Raises QueueUnavailable: the queue is away, or there are too many leases."""
        return await self._open(SubscriptionLease(topic, self._seconds(seconds)))

    def get(self, lease_id: str) -> Lease | None:
        """None: there is no such lease any more."""
        return self._leases.get(lease_id)

    def statistics(self) -> Mapping[str, Any]:
        """How many clients consume and listen, and how many deliveries they have open."""
        consumers = [lease for lease in self._leases.values() if isinstance(lease, ConsumerLease)]
        return {
            "consumers": len(consumers),
            "subscriptions": len(self._leases) - len(consumers),
            "open": sum(len(lease.open) for lease in consumers),
        }

    async def close(self, lease: Lease) -> None:
        """End a lease; returns when what was open is back."""
        self._leases.pop(lease.lease_id, None)
        await lease.close()

    def _seconds(self, asked: float | None) -> float:
        return self._lease if asked is None else max(SHORTEST_LEASE, min(asked, LONGEST_LEASE))

    async def _open(self, lease: Lease) -> Lease:
        if self._tasks is None:
            raise QueueUnavailable("This queue is not served now")
        if len(self._leases) >= self._max_leases:
            raise QueueUnavailable(
                f"There are {len(self._leases)} consumers and subscriptions already",
                hint="Clients that left without closing theirs are forgotten when they were silent for their lease.",
                limit=self._max_leases,
            )
        self._leases[lease.lease_id] = lease
        await self._tasks.start(self._hold, lease)
        return lease

    async def _hold(self, lease: Lease, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        starting = _Starting(task_status)
        try:
            await lease.hold(self._queue, task_status=starting)
        except Exception as error:
            # Whatever an adapter raises is the end of this lease, and of nothing else.
            if not starting.is_started:
                raise
            logger.log(_level(error), "a lease on topic %s ended: %s", lease.topic, error, exc_info=error)
        finally:
            self._leases.pop(lease.lease_id, None)
        if not starting.is_started:
            raise QueueUnavailable(f"The queue took longer than {lease.seconds:g} s to let a client in")


def _level(error: Exception) -> int:
    return logging.INFO if isinstance(error, QueueUnavailable) else logging.ERROR


class _Starting:
    """Passes on that a task has started, and remembers it."""

    def __init__(self, task_status: anyio.abc.TaskStatus[None]) -> None:
        self.is_started = False
        self._task_status = task_status

    def started(self, value: None = None) -> None:
        self.is_started = True
        self._task_status.started(value)

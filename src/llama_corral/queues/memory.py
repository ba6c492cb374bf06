"""The queue inside one process: the reference behaviour that the adapters of real brokers are measured against.

Everything is decided in synchronous code between two checkpoints: a published message goes straight into the hands of
the consumer that waits longest, or into its place in the line. There are no tasks, no timers and no copies, so that a
message costs little more than the two checkpoints of its publisher and its consumer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from heapq import heappop, heappush
from typing import Any, Self

import anyio
from anyio.lowlevel import checkpoint

from ..abc import Consumer, Delivery, MessageQueue, Subscription
from ..exceptions import QueueUnavailable
from ..protocol.messages import QueueMessage

DEFAULT_MAX_MESSAGES = 100_000
DEFAULT_MAX_TOPICS = 10_000
DEFAULT_BROADCAST_BUFFER = 1_000


class MemoryDelivery(Delivery):
    """`ack` and `nack` are no checkpoints: a cancellation there would only cause a delivery that nobody needs."""

    def __init__(self, message: QueueMessage, group: _Group, place: int, *, redelivered: bool = False) -> None:
        self.message = message
        self.redelivered = redelivered
        self.group = group
        self.place = place
        self.holder: MemoryConsumer | None = None  # None: still in the line, or settled

    async def ack(self) -> None:
        if self._settle():
            self.group.pending -= 1

    async def nack(self) -> None:
        if self._settle():
            self.group.give_back(self)

    def _settle(self) -> bool:
        if self.holder is None:
            return False
        del self.holder.open[self]
        self.holder = None
        return True

    def __lt__(self, other: MemoryDelivery) -> bool:
        return self.place < other.place


class _Waiter:
    """A consumer in the line for a message. Woken without a delivery: the queue or the consumer was closed."""

    __slots__ = ("consumer", "delivery", "event")

    def __init__(self, consumer: MemoryConsumer) -> None:
        self.consumer = consumer
        self.event = anyio.Event()
        self.delivery: MemoryDelivery | None = None


class _Group:
    """The line of one (topic, group). While a consumer waits, no message does."""

    __slots__ = ("consumers", "fresh", "next_place", "pending", "returned", "waiters")

    def __init__(self) -> None:
        self.fresh: deque[MemoryDelivery] = deque()
        # What came back stands in front of what is fresh, in the order of publication however it came back. A heap,
        # because nacking a thousand messages in order must not cost a thousand walks.
        self.returned: list[MemoryDelivery] = []
        self.waiters: deque[_Waiter] = deque()
        self.consumers: set[MemoryConsumer] = set()
        self.next_place = 0
        self.pending = 0  # in the line or open; what the limit of a topic counts

    @property
    def waiting(self) -> int:
        return len(self.fresh) + len(self.returned)

    def put(self, message: QueueMessage) -> None:
        delivery = MemoryDelivery(message, self, self.next_place)
        self.next_place += 1
        self.pending += 1
        if self.waiters:
            self._hand_over(delivery)
        else:
            self.fresh.append(delivery)

    def give_back(self, delivery: MemoryDelivery) -> None:
        """A new object goes back into the line, so that the old one in somebody's hands can do nothing any more."""
        self.put_back(MemoryDelivery(delivery.message, self, delivery.place, redelivered=True))

    def put_back(self, delivery: MemoryDelivery) -> None:
        if self.waiters:
            self._hand_over(delivery)
        else:
            heappush(self.returned, delivery)

    def take(self, limit: int) -> list[MemoryDelivery]:
        taken: list[MemoryDelivery] = []
        while len(taken) < limit:
            if self.returned:
                taken.append(heappop(self.returned))
            elif self.fresh:
                taken.append(self.fresh.popleft())
            else:
                break
        return taken

    def wake(self, which: MemoryConsumer | None = None) -> None:
        """Send the waiters away without a message: all, or those of one consumer."""
        stay: deque[_Waiter] = deque()
        for waiter in self.waiters:
            if which is None or waiter.consumer is which:
                waiter.event.set()
            else:
                stay.append(waiter)
        self.waiters = stay

    def _hand_over(self, delivery: MemoryDelivery) -> None:
        waiter = self.waiters.popleft()
        waiter.delivery = delivery
        waiter.event.set()


class _Topic:
    """The groups of a topic. `unclaimed` is the line before the first group is known; that group inherits it."""

    __slots__ = ("groups", "unclaimed")

    def __init__(self) -> None:
        self.groups: dict[str, _Group] = {}
        self.unclaimed: _Group | None = None

    def group(self, name: str) -> _Group:
        found = self.groups.get(name)
        if found is None:
            found = self.groups[name] = self.unclaimed or _Group()
            self.unclaimed = None
        return found

    def lines(self) -> list[_Group]:
        if not self.groups and self.unclaimed is None:
            self.unclaimed = _Group()
        return list(self.groups.values()) if self.unclaimed is None else [self.unclaimed]

    @property
    def idle(self) -> bool:
        return not any(group.pending or group.consumers for group in self.lines())


class MemoryConsumer(Consumer):
    """Made by `MemoryMessageQueue.consumer`. Several tasks may receive from it; each message goes to one of them."""

    def __init__(self, group: _Group, topic: str) -> None:
        self.open: dict[MemoryDelivery, None] = {}
        self._group = group
        self._topic = topic
        self._closed = False

    async def receive(self, max_messages: int = 1) -> list[Delivery]:
        if max_messages < 1:
            raise ValueError(f"max_messages must be at least 1, got {max_messages}")
        while True:
            self._check_open()
            if self._group.waiting:
                # First the checkpoint, then the message: nothing is in our hands when a cancellation arrives.
                await checkpoint()
                self._check_open()
                taken = self._group.take(max_messages)
            else:
                first = await self._wait_in_line()
                taken = [first, *self._group.take(max_messages - 1)]
            for delivery in taken:
                delivery.holder = self
                self.open[delivery] = None
            # Empty: another consumer was faster during the checkpoint.
            if taken:
                return list(taken)

    async def _wait_in_line(self) -> MemoryDelivery:
        waiter = _Waiter(self)
        self._group.waiters.append(waiter)
        try:
            await waiter.event.wait()
        except BaseException:
            # Nobody has seen the message that was handed over meanwhile: it goes back unmarked.
            if waiter.delivery is not None:
                self._group.put_back(waiter.delivery)
            elif not waiter.event.is_set():
                self._group.waiters.remove(waiter)
            raise
        if waiter.delivery is None:
            raise self._gone()
        if self._closed:
            self._group.put_back(waiter.delivery)
            raise self._gone()
        return waiter.delivery

    def close(self) -> None:
        """Give back what is open, in order, and send its waiting tasks away."""
        self._closed = True
        self._group.wake(self)
        for delivery in self.open:
            delivery.holder = None
            self._group.give_back(delivery)
        self.open.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise self._gone()

    def _gone(self) -> QueueUnavailable:
        return QueueUnavailable(f"The consumer of {self._topic!r} or its queue is closed", topic=self._topic)


class MemorySubscription(Subscription):
    """Made by `MemoryMessageQueue.subscribe`. `lost` counts what fell out of the full ring."""

    def __init__(self, topic: str, buffer: int) -> None:
        self.lost = 0
        self._topic = topic
        self._ring: deque[QueueMessage] = deque(maxlen=buffer)
        self._news: anyio.Event | None = None
        self._closed = False

    async def receive(self) -> QueueMessage:
        while True:
            if self._closed:
                raise QueueUnavailable(f"The subscription to {self._topic!r} is closed", topic=self._topic)
            if self._ring:
                await checkpoint()
            else:
                if self._news is None:
                    self._news = anyio.Event()
                await self._news.wait()
            # Empty: several tasks were woken for one message.
            if self._ring:
                return self._ring.popleft()

    def hear(self, message: QueueMessage) -> None:
        self.lost += len(self._ring) == self._ring.maxlen
        self._ring.append(message)
        self._wake()

    def close(self) -> None:
        self._closed = True
        self._ring.clear()
        self._wake()

    def _wake(self) -> None:
        if self._news is not None:
            self._news.set()
            self._news = None


class MemoryMessageQueue(MessageQueue):
    """A queue for one process and one event loop; works on Trio and on asyncio.

    Messages are handed on as they are, not copied: whoever has published one does not change it any more. A topic is
    known from its first message or consumer on, a group from its first consumer on; what was published before the first
    group of its topic is known waits for that group. What comes back (nacked, or its consumer left) stands in front of
    the line, in the order of publication.

    Args:
        max_messages: Limit of each line, waiting and open deliveries together; beyond it `publish` raises.
        max_topics: Limit of topics; beyond it those without messages and consumers are forgotten, and if there is none,
            `publish` and `consumer` raise.
        broadcast_buffer: What each subscription keeps for a slow listener; beyond it the oldest is dropped.
    """

    durable = False

    def __init__(
        self,
        *,
        max_messages: int = DEFAULT_MAX_MESSAGES,
        max_topics: int = DEFAULT_MAX_TOPICS,
        broadcast_buffer: int = DEFAULT_BROADCAST_BUFFER,
    ) -> None:
        if min(max_messages, max_topics, broadcast_buffer) < 1:
            raise ValueError("max_messages, max_topics and broadcast_buffer must be at least 1")
        self._max_messages = max_messages
        self._max_topics = max_topics
        self._broadcast_buffer = broadcast_buffer
        self._topics: dict[str, _Topic] = {}
        # Dicts as ordered sets: broadcasts reach the listeners in the order in which they came.
        self._listeners: dict[str, dict[MemorySubscription, None]] = {}
        self._state = "not entered"
        self._published = self._broadcasts = self._refused = 0

    async def __aenter__(self) -> Self:
        await checkpoint()
        if self._state != "not entered":
            raise RuntimeError("A MemoryMessageQueue can be entered once; make a new one")
        self._state = "open"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._state = "closed"
        for topic in self._topics.values():
            for group in topic.groups.values():
                for consumer in tuple(group.consumers):
                    consumer.close()
        for listeners in self._listeners.values():
            for listener in listeners:
                listener.close()
        self._topics.clear()
        self._listeners.clear()

    async def publish(self, message: QueueMessage, topic: str) -> None:
        """As the specification says; if it is cancelled, the message was not published."""
        await checkpoint()
        self.publish_nowait(message, topic)

    def publish_nowait(self, message: QueueMessage, topic: str) -> None:
        """`publish` without its checkpoint, for callers that have one of their own.

        Raises:
            QueueUnavailable: the queue is closed, or a line of the topic is full; no group got the message.
        """
        lines = self._topic(topic).lines()
        for line in lines:
            if line.pending >= self._max_messages:
                self._refused += 1
                raise QueueUnavailable(
                    f"Topic {topic!r} is full: {line.pending} messages wait or are being worked on",
                    hint="Start more consumers of this topic, or raise max_messages of the queue.",
                    topic=topic,
                    limit=self._max_messages,
                )
        for line in lines:
            line.put(message)
        self._published += 1

    @asynccontextmanager
    async def consumer(self, topic: str, group: str = "default") -> AsyncIterator[MemoryConsumer]:
        await checkpoint()
        line = self._topic(topic).group(group)
        consumer = MemoryConsumer(line, topic)
        line.consumers.add(consumer)
        try:
            yield consumer
        finally:
            line.consumers.remove(consumer)
            consumer.close()

    async def broadcast(self, message: QueueMessage, topic: str) -> None:
        await checkpoint()
        self.broadcast_nowait(message, topic)

    def broadcast_nowait(self, message: QueueMessage, topic: str) -> None:
        """`broadcast` without its checkpoint."""
        self._check_open()
        for listener in self._listeners.get(topic, ()):
            listener.hear(message)
        self._broadcasts += 1

    @asynccontextmanager
    async def subscribe(self, topic: str) -> AsyncIterator[MemorySubscription]:
        await checkpoint()
        self._check_open()
        subscription = MemorySubscription(topic, self._broadcast_buffer)
        self._listeners.setdefault(topic, {})[subscription] = None
        try:
            yield subscription
        finally:
            subscription.close()
            # The queue may be closed by now, and with it the table.
            listeners = self._listeners.get(topic, {})
            listeners.pop(subscription, None)
            if not listeners:
                self._listeners.pop(topic, None)

    def waiting(self, topic: str, group: str = "default") -> int:
        """How many messages wait for a consumer of the group right now: what `statistics` says, at O(1)."""
        found = self._topics.get(topic)
        if found is None:
            return 0
        line = found.groups.get(group) or found.unclaimed
        return 0 if line is None else line.waiting

    def statistics(self) -> Mapping[str, Any]:
        """`topics` counts what waits, `open` what is in the hands of consumers, over all groups of a topic."""
        lines = {name: topic.lines() for name, topic in self._topics.items()}
        return {
            "topics": {name: sum(line.waiting for line in of) for name, of in lines.items()},
            "open": {name: sum(len(each.open) for line in of for each in line.consumers) for name, of in lines.items()},
            "consumers": {name: sum(len(line.consumers) for line in of) for name, of in lines.items()},
            "subscriptions": {name: len(listeners) for name, listeners in self._listeners.items()},
            "published": self._published,
            "broadcasts": self._broadcasts,
            "refused": self._refused,
            "lost_broadcasts": sum(each.lost for listeners in self._listeners.values() for each in listeners),
        }

    def _topic(self, name: str) -> _Topic:
        self._check_open()
        found = self._topics.get(name)
        if found is None:
            if len(self._topics) >= self._max_topics:
                self._forget_idle_topics()
            found = self._topics[name] = _Topic()
        return found

    def _forget_idle_topics(self) -> None:
        self._topics = {name: topic for name, topic in self._topics.items() if not topic.idle}
        if len(self._topics) >= self._max_topics:
            raise QueueUnavailable(
                f"There are {len(self._topics)} topics with messages or consumers already",
                hint="Raise max_topics of the queue, or use fewer topics.",
                limit=self._max_topics,
            )

    def _check_open(self) -> None:
        if self._state != "open":
            raise QueueUnavailable(
                f"The memory queue is {self._state}", hint="Use it inside its `async with` block.", state=self._state
            )

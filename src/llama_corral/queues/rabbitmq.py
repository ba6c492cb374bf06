"""A queue in RabbitMQ: a quorum queue for each group of a topic, and what is broadcast to whoever listens.

`rabbitmq_topology.py` says how a topic is kept there, `rabbitmq_consumer.py` how it is consumed, `rabbitmq_link.py` how a
connection is kept. A queue has two: a server whose memory or disk is full stops reading from connections that publish, and
what is acknowledged over the other one is what frees it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, Self, TypeVar
from uuid import uuid4

import anyio
from anyio.lowlevel import checkpoint

from ..abc import MessageQueue
from ..aio import Bell
from ..aio.client import AsyncioSide, open_asyncio_side
from ..exceptions import QueueUnavailable, TooLarge
from ..protocol import topics
from ..protocol.messages import QueueMessage
from ..protocol.topics import DEFAULT_NAMESPACE
from ..supervision import Backoff, open_support_group
from .broker import count, encode, seconds
from .dead_letter import dead_letter
from .memory import DEFAULT_BROADCAST_BUFFER, DEFAULT_MAX_MESSAGES
from .rabbitmq_address import RabbitMQAddress
from .rabbitmq_consumer import RabbitMQConsumer
from .rabbitmq_link import CLOSING_TIME, Away, RabbitMQConnection, RabbitMQLink, quiet_client
from .rabbitmq_publisher import Outcome, Publisher, refusal
from .rabbitmq_subscription import RabbitMQSubscription
from .rabbitmq_topology import BROADCAST, Declarations, declare_exchanges
from .urls import take_options

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_PATIENCE: Final = 10.0
DEFAULT_PREFETCH: Final = 32
MOST_PREFETCH: Final = 65_535


def _prefetch(text: str | int) -> int:
    value = int(text)
    if not 0 <= value <= MOST_PREFETCH:
        raise ValueError(f"a prefetch must be between 0 and {MOST_PREFETCH}, got {text}")
    return value


# The mixin's __aexit__ names its three arguments, the one of abc takes any: called by `async with`, they are the same.
class RabbitMQMessageQueue(anyio.AsyncContextManagerMixin, MessageQueue):  # type: ignore[misc]
    """`async with RabbitMQMessageQueue.from_url("amqp://user:password@host:5672/vhost") as queue: ...`. Works on Trio and on
    asyncio.

    A server that is away, or restarts, is waited for: consumers wait as long as it takes and go on, everything else raises
    after `patience`. A subscription whose connection was lost raises, because it may have missed something. A message is
    published in one round trip, stored by a majority of the cluster; messages that come back are delivered before the
    others. What is published before a topic has any group waits for the group `default`.

    Exchanges and queues are declared where they are missing, and never deleted or changed.

    Args:
        address: Of the servers, with credentials and virtual host.
        namespace: The topic namespace; messages that cannot be read go to its dead letters.
        max_messages: Limit of each group of a topic when its queue is declared; beyond it `publish` raises.
        prefetch: Messages that lie ready here at most for a consumer that takes them quickly, for 20 ms at most; 0: none.
        patience: Seconds for which entering, publishing and the like are tried before `QueueUnavailable` is raised.
        broadcast_buffer: What each subscription keeps for a slow listener; beyond it the oldest is dropped.

    Raises (all methods):
        QueueUnavailable: closed, or the server is away or cannot take anything now.
        SetupError: the operator must change something: wrong credentials, no such virtual host, no permission.
        TooLarge: a message is larger than the server takes.
    """

    durable = True

    def __init__(
        self,
        address: RabbitMQAddress,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        max_messages: int = DEFAULT_MAX_MESSAGES,
        prefetch: int = DEFAULT_PREFETCH,
        patience: float = DEFAULT_PATIENCE,
        broadcast_buffer: int = DEFAULT_BROADCAST_BUFFER,
    ) -> None:
        self.address = address
        self.namespace = namespace
        self.declarations = Declarations(count(max_messages))
        self.prefetch = _prefetch(prefetch)
        self.patience = seconds(patience)
        self._broadcast_buffer = count(broadcast_buffer)
        self._side: AsyncioSide | None = None
        self._publishing: RabbitMQLink | None = None
        self._receiving: RabbitMQLink | None = None
        self._publisher: Publisher | None = None
        self._bell = Bell()
        self._declaring: dict[str, Bell] = {}
        self._backoff = Backoff(initial=0.05, maximum=1.0)
        self._consumers: set[RabbitMQConsumer] = set()
        self._subscriptions: set[RabbitMQSubscription] = set()
        self._state = "not entered"
        self._published = self._broadcasts = self._refused = 0

    @classmethod
    def from_url(cls, url: str, *, namespace: str = DEFAULT_NAMESPACE) -> Self:
        """`amqp://` or, with TLS, `amqps://`; several nodes of a cluster with commas between them. Options: `max_messages`,
        `prefetch`, `patience`, `broadcast_buffer`, and those of `RabbitMQAddress`.

        Raises:
            SetupError: something in it cannot be used. The text never repeats the URL.
        """
        known: dict[str, Callable[[str], Any]] = {
            "max_messages": count,
            "prefetch": _prefetch,
            "patience": seconds,
            "broadcast_buffer": count,
        }
        rest, options = take_options(url, known)
        return cls(RabbitMQAddress.from_url(rest), namespace=namespace, **options)

    @property
    def side(self) -> AsyncioSide:
        assert self._side is not None
        return self._side

    @property
    def receiving(self) -> RabbitMQLink:
        assert self._receiving is not None
        return self._receiving

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncIterator[Self]:
        if self._state != "not entered":
            raise RuntimeError("A RabbitMQMessageQueue can be entered once; make a new one")
        self._state = "closed"
        async with contextlib.AsyncExitStack() as stack:
            with quiet_client():
                self._side = await stack.enter_async_context(open_asyncio_side("RabbitMQ"))
            support = await stack.enter_async_context(open_support_group())
            self._publishing = self._link("publishing", self._prepare_publishing)
            self._receiving = self._link("receiving", self._prepare_receiving)
            try:
                await support.start(self._publishing.keep, name="RabbitMQ link for publishing")
                await support.start(self._receiving.keep, name="RabbitMQ link for receiving")
                self._state = "open"
                yield self
            finally:
                self._state = "closed"
                with anyio.move_on_after(CLOSING_TIME * 2, shield=True):
                    await self._close()

    def _link(self, name: str, prepare: Callable[[RabbitMQConnection], Awaitable[None]]) -> RabbitMQLink:
        return RabbitMQLink(
            self.side, self.address, name=name, patience=self.patience, prepare=prepare, on_change=self._on_change
        )

    async def _close(self) -> None:
        """Give back what is open, and let everybody go who uses the queue. Blocks that are still entered find it closed."""
        self._bell.ring()
        for subscription in self._subscriptions:
            subscription.close()
        async with anyio.create_task_group() as tasks:
            for consumer in tuple(self._consumers):
                tasks.start_soon(consumer.leave)

    # Tickets

    async def publish(self, message: QueueMessage, topic: str) -> None:
        await checkpoint()
        body = encode(message)

        async def attempt(connection: RabbitMQConnection) -> None:
            publisher = self._publisher_on(connection)
            outcome = await publisher.publish(body, topic)
            if outcome is Outcome.NOWHERE:
                await self._give_place(connection, topic)
                outcome = await publisher.publish(body, topic)
            if outcome is not Outcome.TAKEN:
                raise refusal(outcome, topic)

        try:
            await self._patiently(self._publishing, attempt)
        except Away:
            raise
        except (QueueUnavailable, TooLarge):
            self._refused += 1
            raise
        self._published += 1

    async def _give_place(self, connection: RabbitMQConnection, topic: str) -> None:
        """Declare where the messages of a topic without groups wait: once, however many are being published."""
        declared = self._declaring.get(topic)
        if declared is not None:
            await declared.wait()
            return
        declared = self._declaring[topic] = Bell()
        try:
            await connection.call(self.declarations.waiting, connection, topic)
        finally:
            del self._declaring[topic]
            declared.ring()

    @asynccontextmanager
    async def consumer(self, topic: str, group: str = "default") -> AsyncIterator[RabbitMQConsumer]:
        self.check_open()
        consumer = RabbitMQConsumer(self, topic, group)
        self._consumers.add(consumer)
        try:
            await self._patiently(self._receiving, consumer.attach)
            consumer.start()
            yield consumer
        finally:
            self._consumers.discard(consumer)
            await consumer.leave()  # noqa: ASYNC102 - shielded and bounded there

    # Broadcasts

    async def broadcast(self, message: QueueMessage, topic: str) -> None:
        await checkpoint()
        body = encode(message)

        async def attempt(connection: RabbitMQConnection) -> None:
            outcome = await self._publisher_on(connection).broadcast(body, topic)
            if outcome is not Outcome.TAKEN:
                raise refusal(outcome, topic)

        await self._patiently(self._publishing, attempt)
        self._broadcasts += 1

    @asynccontextmanager
    async def subscribe(self, topic: str) -> AsyncIterator[RabbitMQSubscription]:
        self.check_open()
        name = f"{BROADCAST}.{uuid4().hex}"
        subscription = RabbitMQSubscription(self.side, topic, name, self._broadcast_buffer, self.check_open)
        self._subscriptions.add(subscription)
        try:
            await self._patiently(self._receiving, subscription.open)
            yield subscription
        finally:
            self._subscriptions.discard(subscription)
            await subscription.leave()  # noqa: ASYNC102 - shielded and bounded there

    def statistics(self) -> Mapping[str, Any]:
        """What waits is known by the server, not here: `topics` is empty."""
        links = [link for link in (self._publishing, self._receiving) if link is not None]
        return {
            "topics": {},
            "connected": bool(links) and all(link.connection is not None for link in links),
            "reconnects": sum(max(0, link.reconnects) for link in links),
            "consumers": len(self._consumers),
            "subscriptions": len(self._subscriptions),
            "published": self._published,
            "broadcasts": self._broadcasts,
            "refused": self._refused,
            "lost_broadcasts": sum(subscription.lost for subscription in self._subscriptions),
        }

    # For consumers, subscriptions and links

    def check_open(self) -> None:
        if self._state != "open":
            raise QueueUnavailable(
                f"The queue at RabbitMQ at {self.address} is {self._state}",
                hint="Use it inside its `async with` block.",
            )

    async def bury(self, raw: bytes, topic: str, reason: str) -> None:
        logger.warning("a message of %s cannot be read and goes to the dead letters: %s", topic, reason)
        await self.publish(dead_letter(raw, topic, reason), topics.dead_letter(self.namespace))

    async def _prepare_publishing(self, connection: RabbitMQConnection) -> None:
        await self._prepare_receiving(connection)
        publisher = Publisher(connection)
        await connection.call(publisher.open)
        self._publisher = publisher

    async def _prepare_receiving(self, connection: RabbitMQConnection) -> None:
        await connection.call(declare_exchanges, connection)

    def _on_change(self) -> None:
        self._bell.ring()
        for consumer in self._consumers:
            consumer.change()
        for subscription in self._subscriptions:
            subscription.change()

    def _publisher_on(self, connection: RabbitMQConnection) -> Publisher:
        if self._publisher is None or self._publisher.connection is not connection:
            raise connection.lost()
        return self._publisher

    async def _patiently(self, link: RabbitMQLink | None, fn: Callable[[RabbitMQConnection], Awaitable[T]]) -> T:
        """Try until it is done, for `patience` seconds at most."""
        self.check_open()
        assert link is not None
        last: Away | None = None
        failures = 0
        with anyio.move_on_after(self.patience):
            while True:
                try:
                    return await fn(await self._wait_connection(link))
                except Away as error:
                    last = error
                failures += 1
                await anyio.sleep(self._backoff.delay(failures))
        raise last or await self._no_answer(link)

    async def _wait_connection(self, link: RabbitMQLink) -> RabbitMQConnection:
        while True:
            self.check_open()
            if (found := link.connection) is not None and not found.is_lost:
                return found
            await self._bell.wait()

    async def _no_answer(self, link: RabbitMQLink) -> Away:
        connection = link.connection
        if connection is None:
            return link.away()
        if await connection.is_blocked():
            return Away(
                f"RabbitMQ at {self.address} takes no messages: its memory or disk is full",
                hint="Let consumers work off what waits, or give it more of either (rabbitmqctl status says which).",
            )
        return Away(f"RabbitMQ at {self.address} did not answer within {self.patience:g} s")

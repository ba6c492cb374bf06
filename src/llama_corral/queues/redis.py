"""A queue in a Redis server: streams with consumer groups for tickets, publish/subscribe for broadcasts.

`redis_scripts.py` says how a topic is kept there, `redis_consumer.py` how it is consumed, `redis_link.py` how a connection
is kept. A queue has one connection for its commands, one for all its subscriptions, and one for each consumer, which waits
in a blocking read. One server, or one behind a proxy that fails over; not a Redis Cluster.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, Self

import anyio
from coredis import exceptions as redis

from ..abc import MessageQueue
from ..exceptions import QueueUnavailable
from ..protocol.messages import QueueMessage
from ..protocol.topics import DEFAULT_NAMESPACE
from ..supervision import open_support_group
from .broker import BrokerSubscription, count, encode, seconds
from .memory import DEFAULT_BROADCAST_BUFFER, DEFAULT_MAX_MESSAGES
from .redis_connection import Connection, RedisAddress
from .redis_consumer import RedisConsumer
from .redis_link import ANSWER_TIME, LOST, RedisLink, explain
from .redis_scripts import FIELD, PUBLISH, Argument, Script, prefix_of
from .urls import take_options

logger = logging.getLogger(__name__)

DEFAULT_LEASE: Final = 30.0
DEFAULT_PATIENCE: Final = 10.0
CLOSING_TIME: Final = 2.0


# The mixin's __aexit__ names its three arguments, the one of abc takes any: called by `async with`, they are the same.
class RedisMessageQueue(anyio.AsyncContextManagerMixin, MessageQueue):  # type: ignore[misc]
    """`async with RedisMessageQueue.from_url("redis://:password@host:6379/0") as queue: ...`. Works on Trio and on asyncio.

    A server that is away, or restarts, is waited for: consumers wait as long as it takes and go on, everything else raises
    after `patience`. A subscription whose connection was lost raises, because it may have missed something. A message is
    published in one request and deleted when it is acknowledged; messages that come back are delivered before the others.

    Args:
        address: Of the server, with user, password and database.
        namespace: The topic namespace; messages that cannot be read go to its dead letters.
        lease: Seconds after which what a dead consumer of this queue had open comes back, if another consumes its topic.
            A living consumer keeps what it has for as long as it likes.
        max_messages: Limit of each group of a topic, waiting and open deliveries together; beyond it `publish` raises.
        patience: Seconds for which entering, publishing and the like are tried before `QueueUnavailable` is raised.
        broadcast_buffer: What each subscription keeps for a slow listener; beyond it the oldest is dropped.

    Raises (all methods):
        QueueUnavailable: closed, or the server is away or cannot take anything now.
        SetupError: the server refuses us: a wrong password, a user that may not do this.

    Attributes:
        durable: Whether the server writes what it takes to an append-only file; known when the queue is entered.
    """

    durable = False

    def __init__(
        self,
        address: RedisAddress,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        lease: float = DEFAULT_LEASE,
        max_messages: int = DEFAULT_MAX_MESSAGES,
        patience: float = DEFAULT_PATIENCE,
        broadcast_buffer: int = DEFAULT_BROADCAST_BUFFER,
    ) -> None:
        self.address = address
        self.namespace = namespace
        self.lease = seconds(lease)
        self.patience = seconds(patience)
        self._max_messages = count(max_messages)
        self._link = RedisLink(address, name="command", patience=patience, prepare=self._look, pinged=True)
        self._listeners = _Listeners(address, patience, count(broadcast_buffer), self._check_open)
        self._consumers: set[RedisConsumer] = set()
        self._state = "not entered"
        self._published = self._broadcasts = self._refused = 0

    @classmethod
    def from_url(cls, url: str, *, namespace: str = DEFAULT_NAMESPACE) -> Self:
        """`redis://`, `rediss://` (TLS) or `unix://`, with `?lease=`, `max_messages`, `patience` and `broadcast_buffer`.

        Raises:
            SetupError: something in it cannot be used. The text never repeats the URL.
        """
        known = {"lease": seconds, "max_messages": count, "patience": seconds, "broadcast_buffer": count}
        rest, options = take_options(url, known)
        return cls(RedisAddress.from_url(rest), namespace=namespace, **options)

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncIterator[Self]:
        if self._state != "not entered":
            raise RuntimeError("A RedisMessageQueue can be entered once; make a new one")
        self._state = "closed"
        async with open_support_group() as support:
            try:
                await support.start(self._link.keep, name="Redis link")
                await support.start(self._listeners.link.keep, name="Redis link of subscriptions")
                self._state = "open"
                yield self
            finally:
                self._state = "closed"
                with anyio.move_on_after(CLOSING_TIME, shield=True):
                    await self._close()

    async def _close(self) -> None:
        """Give back what is open, and let everybody go who uses the queue. Blocks that are still entered find it closed."""
        left = tuple(self._consumers)
        with anyio.move_on_after(CLOSING_TIME / 2):
            async with anyio.create_task_group() as tasks:
                for consumer in left:
                    tasks.start_soon(consumer.leave)
        for consumer in left:
            consumer.link.close()
        self._link.close()
        self._listeners.close()
        for consumer in left:  # their connections are theirs until then
            await consumer.ended.wait()

    async def _look(self, connection: Connection) -> None:
        """Whether the server is ready, and how long it keeps what it gets."""
        try:
            answer = await connection.create_request(b"INFO", timeout=ANSWER_TIME)
        except redis.AuthorizationError:
            return  # a user may be kept from it: then nothing is promised
        assert isinstance(answer, bytes)
        told = dict(line.split(b":", 1) for line in answer.splitlines() if b":" in line)
        if told.get(b"loading") == b"1":
            raise redis.BusyLoadingError("it is loading its data")
        if self._state == "open":
            return
        self.durable = told.get(b"aof_enabled") == b"1"
        policy = told.get(b"maxmemory_policy", b"").decode()
        if policy.startswith("allkeys-"):
            logger.warning(
                "Redis at %s drops messages when its memory is full: set its maxmemory-policy to noeviction (it is %s)",
                self.address,
                policy,
            )

    async def publish(self, message: QueueMessage, topic: str) -> None:
        prefix = prefix_of(topic)
        arguments = (prefix, self._max_messages, FIELD, encode(message))
        full = await self.run(PUBLISH, (prefix + b"groups",), *arguments, patience=self.patience)
        if full is not None:
            self._refused += 1
            raise QueueUnavailable(
                f"Topic {topic!r} is full: {full} messages wait or are being worked on",
                hint="Start more consumers of this topic, or raise max_messages of the queue.",
                topic=topic,
                limit=self._max_messages,
            )
        self._published += 1

    @asynccontextmanager
    async def consumer(self, topic: str, group: str = "default") -> AsyncIterator[RedisConsumer]:
        self._check_open()
        consumer = RedisConsumer(self, topic, group)
        async with open_support_group() as support:
            self._consumers.add(consumer)
            try:
                await support.start(consumer.keep, name=f"Redis consumer of {topic}")
                yield consumer
            finally:
                self._consumers.discard(consumer)
                with anyio.move_on_after(CLOSING_TIME, shield=True):
                    await consumer.leave()

    async def broadcast(self, message: QueueMessage, topic: str) -> None:
        await self.ask(b"PUBLISH", self._listeners.channel(topic), encode(message), patience=self.patience)
        self._broadcasts += 1

    @asynccontextmanager
    async def subscribe(self, topic: str) -> AsyncIterator[RedisSubscription]:
        self._check_open()
        subscription = await self._listeners.open(topic)
        try:
            yield subscription
        finally:
            self._listeners.leave(subscription)

    def statistics(self) -> Mapping[str, Any]:
        """What waits is known by the server, not here: `topics` is empty. `reconnects` is over the connections of the queue
        and of the consumers that are open."""
        links = (self._link, self._listeners.link, *(consumer.link for consumer in self._consumers))
        return {
            "topics": {},
            "open": sum(consumer.open for consumer in self._consumers),
            "consumers": len(self._consumers),
            "subscriptions": self._listeners.count,
            "published": self._published,
            "broadcasts": self._broadcasts,
            "refused": self._refused,
            "lost_broadcasts": self._listeners.lost,
            "reconnects": sum(max(0, link.reconnects) for link in links),
        }

    # For consumers

    async def ask(self, command: bytes, *arguments: Argument, patience: float) -> Any:
        """As `RedisLink.ask`."""
        self._check_open()
        return await self._link.ask(command, *arguments, patience=patience)

    async def run(self, script: Script, keys: tuple[bytes, ...], *args: Argument, patience: float) -> Any:
        """A script, with `ask`."""

        async def ask(command: bytes, *arguments: Argument) -> Any:
            return await self.ask(command, *arguments, patience=patience)

        return await script.run(ask, keys, *args)

    def _check_open(self) -> None:
        if self._state != "open":
            raise QueueUnavailable(f"The Redis queue is {self._state}", hint="Use it inside its `async with` block.")


class RedisSubscription(BrokerSubscription):
    """Made by `RedisMessageQueue.subscribe`."""

    def __init__(self, topic: str, channel: bytes, buffer: int, check_open: Callable[[], None]) -> None:
        super().__init__(topic, buffer, check_open)
        self.channel = channel
        self._is_lost = False

    @property
    def is_lost(self) -> bool:
        return self._is_lost

    def lose(self) -> None:
        """Its connection has gone."""
        self._is_lost = True
        self.change()


class _Listeners:
    """The subscriptions of a queue, on one connection. They end with it: others are made on the next."""

    def __init__(self, address: RedisAddress, patience: float, buffer: int, check_open: Callable[[], None]) -> None:
        self.link = RedisLink(address, name="subscription", patience=patience, serve=self._hear, pinged=True)
        self._check_open = check_open
        self._patience = patience
        self._buffer = buffer
        # Dicts as ordered sets: broadcasts reach the listeners in the order in which they came.
        self._channels: dict[bytes, dict[RedisSubscription, None]] = {}

    @property
    def count(self) -> int:
        return sum(map(len, self._channels.values()))

    @property
    def lost(self) -> int:
        return sum(listener.lost for listeners in self._channels.values() for listener in listeners)

    def channel(self, topic: str) -> bytes:
        """Channels know no databases, so the number is in the name."""
        return b"corral:%d:%b" % (self.link.address.db, topic.encode())

    async def open(self, topic: str) -> RedisSubscription:
        """Listen. Returns when the server knows; raises QueueUnavailable after the queue's patience."""
        deadline = anyio.current_time() + self._patience
        while True:
            connection = await self.link.wait_open(deadline)
            subscription = RedisSubscription(topic, self.channel(topic), self._buffer, self._check_open)
            try:
                await self._subscribe(connection, subscription)
            except (redis.RedisError, TimeoutError) as error:
                self.link.drop(connection, error)
                if not isinstance(error, LOST) or anyio.current_time() >= deadline:
                    raise explain(error, self.link.address) from error
            else:
                return subscription

    async def _subscribe(self, connection: Connection, subscription: RedisSubscription) -> None:
        listeners = self._channels.setdefault(subscription.channel, {})
        try:
            if not listeners:
                connection.send_command(b"SUBSCRIBE", subscription.channel)
            listeners[subscription] = None
            # The server answers in order: what it was told before this, it has done.
            await connection.create_request(b"PING", timeout=ANSWER_TIME)
        except BaseException:
            self.leave(subscription)
            raise

    def leave(self, subscription: RedisSubscription) -> None:
        subscription.close()
        listeners = self._channels.get(subscription.channel)
        if listeners is None:
            return  # it ended with its connection
        listeners.pop(subscription, None)
        if not listeners:
            del self._channels[subscription.channel]
            if self.link.connection is not None and self.link.connection.usable:
                self.link.connection.send_command(b"UNSUBSCRIBE", subscription.channel)

    def close(self) -> None:
        self.link.close()
        self._lose_all()

    async def _hear(self, connection: Connection) -> None:
        """Hand on what the server tells, until the connection is lost."""
        try:
            async with aclosing(connection.push_messages) as pushed:
                async for kind, *rest in pushed:
                    if kind == b"message":
                        self._hand_on(*rest)
        except redis.ConnectionError as error:
            logger.debug("subscriptions end with their connection: %s", error)
        finally:
            self._lose_all()

    def _hand_on(self, channel: Any, body: Any) -> None:
        for listener in self._channels.get(channel, ()):
            listener.hear(body)

    def _lose_all(self) -> None:
        channels, self._channels = self._channels, {}
        for listeners in channels.values():
            for listener in listeners:
                listener.lose()

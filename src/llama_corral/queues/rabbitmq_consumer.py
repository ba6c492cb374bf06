"""Receiving from the queues of RabbitMQ.

A server of AMQP 0-9-1 pushes; whoever is subscribed to a queue gets messages, up to its prefetch, whether somebody receives
them or not, and another consumer that has nothing to do does not get those. Asking for single messages instead
(`basic.get`) costs a round trip each, which a quorum queue answers only after its log is written, and cannot wait. So a
consumer is subscribed while somebody receives, for as many as were asked for, and no longer. One that comes back so quickly
that the subscriptions would take most of the time stays subscribed, with a prefetch of what it will take within the
blink of an eye (`LINGER`); whatever lies here longer than that is given back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Protocol

import anyio
from aio_pika.abc import AbstractChannel
from aiormq.abc import AbstractChannel as ClientChannel
from aiormq.abc import DeliveredMessage
from anyio.lowlevel import checkpoint
from pydantic import ValidationError

from ..abc import Consumer, Delivery, Subscription
from ..aio import Bell
from ..aio.client import AsyncioSide
from ..exceptions import CorralError, QueueUnavailable
from ..protocol.messages import QueueMessage
from ..supervision import Backoff
from .rabbitmq_link import CLOSING_TIME, TROUBLE, RabbitMQConnection, RabbitMQLink, explain
from .rabbitmq_topology import BROADCAST, declare_group, topic_key

logger = logging.getLogger(__name__)

LINGER: Final = 0.02
"""Seconds that a message lies here at most while nobody receives it."""
PACES: Final = 4
"""How many times in a row a consumer must have come back quickly to get messages ahead."""
REFRESHED_AFTER: Final = 30.0
"""Seconds without a message after which a subscription is made anew, in case the server has forgotten it (its queue was
deleted). The only backstop."""


class ConsumerHost(Protocol):
    """What a consumer needs of its queue."""

    max_messages: int
    prefetch: int

    @property
    def side(self) -> AsyncioSide: ...

    @property
    def receiving(self) -> RabbitMQLink: ...

    def check_open(self) -> None: ...

    async def bury(self, raw: bytes, topic: str, reason: str) -> None:
        """Put what nobody can read into the dead letters."""


class _Channel:
    """A channel on the asyncio side, with what was received over it and is not settled. Closing it gives that back."""

    def __init__(self, connection: RabbitMQConnection, queue: str, on_lost: Callable[[], None]) -> None:
        self.connection = connection
        self.queue = queue
        self.is_lost = False
        self._on_lost = on_lost
        self._prefetch = 0
        self._channel: AbstractChannel | None = None

    async def open(self) -> None:
        self._channel = await self.connection.open_channel(on_lost=self._lose)

    async def subscribe(self, hear: Callable[[DeliveredMessage], Any], prefetch: int) -> str:
        client = await self._client()
        if prefetch != self._prefetch:
            await client.basic_qos(prefetch_count=prefetch)
            self._prefetch = prefetch
        answer = await client.basic_consume(self.queue, hear)
        return answer.consumer_tag or ""

    async def listen(self, topic: str, buffer: int, hear: Callable[[DeliveredMessage], Any]) -> None:
        """Hear the broadcasts to a topic, by a queue that ends with the channel."""
        assert self._channel is not None
        arguments: dict[str, Any] = {"x-max-length": buffer, "x-overflow": "drop-head"}
        queue = await self._channel.declare_queue(self.queue, exclusive=True, auto_delete=True, arguments=arguments)
        await queue.bind(BROADCAST, topic_key(topic))
        await (await self._client()).basic_consume(self.queue, hear, no_ack=True)

    async def unsubscribe(self, tag: str) -> None:
        """Returns when the last message was heard that the server had sent."""
        await (await self._client()).basic_cancel(tag)

    async def settle(self, tag: int, is_ack: bool) -> None:
        # Not for aio-pika's message: it waits until each of its acks is on the wire.
        with suppress(*TROUBLE):  # then the message comes again
            client = await self._client()
            if is_ack:
                await client.basic_ack(tag, wait=False)
            else:
                await client.basic_nack(tag, requeue=True, wait=False)

    async def close(self) -> None:
        self.is_lost = True
        if self._channel is not None:
            with suppress(*TROUBLE):
                await self._channel.close()

    async def _client(self) -> ClientChannel:
        assert self._channel is not None
        return await self._channel.get_underlay_channel()

    def _lose(self) -> None:
        if not self.is_lost:
            self.is_lost = True
            self._on_lost()


class _Subscription:
    """One consumer at the server, on a channel. `ahead`: it stays while its messages are taken quickly."""

    def __init__(self, channel: _Channel, prefetch: int, *, ahead: bool) -> None:
        self.channel = channel
        self.prefetch = prefetch
        self.ahead = ahead
        self.unsettled = 0

    @property
    def is_full(self) -> bool:
        """Whether nothing more comes before something is settled."""
        return self.unsettled >= self.prefetch


class _Arrived:
    """A message that is not received yet, and since when."""

    __slots__ = ("of", "raw", "since")

    def __init__(self, raw: DeliveredMessage, of: _Subscription) -> None:
        self.raw = raw
        self.of = of
        self.since = time.monotonic()


class _Pace:
    """How quickly a consumer comes back for more."""

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=PACES)
        self._left_at = 0.0
        self._taken = 0

    def come(self) -> None:
        if self._taken:
            self._gaps.append((time.monotonic() - self._left_at) / self._taken)

    def leave(self, taken: int) -> None:
        self.left_at = self._left_at = time.monotonic()
        self._taken = taken

    def taken_within(self, seconds: float) -> int:
        """How many messages it will take, to judge by the slowest of the last times. None is a guess for the first times."""
        if len(self._gaps) < PACES:
            return 0
        return int(seconds / max(*self._gaps, 1e-6))


class RabbitMQDelivery(Delivery):
    """`ack` and `nack` return at once: the server is told without waiting."""

    def __init__(self, message: QueueMessage, arrived: _Arrived, consumer: RabbitMQConsumer) -> None:
        headers = arrived.raw.header.properties.headers or {}
        self.message = message
        self.redelivered = bool(arrived.raw.redelivered or headers.get("x-delivery-count"))
        self.arrived = arrived
        self._consumer = consumer

    async def ack(self) -> None:
        self._consumer.settle(self, is_ack=True)

    async def nack(self) -> None:
        self._consumer.settle(self, is_ack=False)


class RabbitMQConsumer(Consumer):
    """Made by `RabbitMQMessageQueue.consumer`. `receive` waits as long as it takes while the server is away.

    Its other half, `_feed_forever`, runs on the asyncio side.
    """

    def __init__(self, host: ConsumerHost, topic: str, group: str) -> None:
        self._host = host
        self._topic = topic
        self._group = group
        self._bell = Bell()
        self._turn = anyio.Lock()
        self._pace = _Pace()
        self._arrived: deque[_Arrived] = deque()
        self._unreadable: deque[tuple[_Arrived, str]] = deque()
        self._open: dict[RabbitMQDelivery, None] = {}
        self._wanted = 0
        """How many messages somebody waits for."""
        self._left = False
        self._news = asyncio.Event()
        self._channel: _Channel | None = None
        self._subscription: _Subscription | None = None
        self._backoff = Backoff(initial=0.05, maximum=2.0)
        self._failures = 0
        self._feeder: asyncio.Task[None] | None = None

    async def receive(self, max_messages: int = 1) -> list[Delivery]:
        if max_messages < 1:
            raise ValueError(f"max_messages must be at least 1, got {max_messages}")
        async with self._turn:
            self._pace.come()
            taken: list[Delivery] = []
            has_waited = False
            try:
                while True:
                    self._check_open()
                    if taken := self._take(max_messages):
                        return taken
                    if self._unreadable:
                        await self._bury_unreadable()
                        continue
                    has_waited, self._wanted = True, max_messages
                    if self._subscription is None or self._subscription.is_full:
                        self._news.set()
                    await self._bell.wait()
            finally:
                self._wanted = 0
                self._pace.leave(len(taken))
                if has_waited:
                    self._news.set()

    async def attach(self, connection: RabbitMQConnection) -> None:
        """Make the group known to the server. Raises Away and SetupError."""
        await connection.call(self._attach, connection)

    def start(self) -> None:
        """Begin to ask for messages. Ended by `leave`."""
        self._feeder = self._host.side.start_soon(self._feed_forever)
        self._feeder.add_done_callback(self._on_end)

    def change(self) -> None:
        """There is a connection, or none any more; or the queue is closed."""
        self._news.set()
        self._bell.ring()

    async def leave(self) -> None:
        """Give back what is open and send its waiting tasks away. Bounded."""
        if self._left:
            return
        self._left = True
        self._open.clear()
        self._arrived.clear()
        self._unreadable.clear()
        self._bell.ring()
        with anyio.move_on_after(CLOSING_TIME, shield=True), suppress(*TROUBLE):
            await self._host.side.wait_posted()  # what was acked before
            await self._host.side.call(self._end)
            return
        # It does not answer; what is open there comes back when the connection is closed.
        if self._channel is not None:
            self._channel.connection.drop()

    def settle(self, delivery: RabbitMQDelivery, *, is_ack: bool) -> None:
        if delivery in self._open:
            del self._open[delivery]
            self._settle(delivery.arrived, is_ack=is_ack)

    # Parts of receive

    def _take(self, limit: int) -> list[Delivery]:
        taken: list[Delivery] = []
        while self._arrived and len(taken) < limit:
            arrived = self._arrived.popleft()
            if arrived.of.channel.is_lost:
                continue
            try:
                message = QueueMessage.model_validate_json(arrived.raw.body)
            except ValidationError as error:
                self._unreadable.append((arrived, str(error)))
                continue
            delivery = RabbitMQDelivery(message, arrived, self)
            self._open[delivery] = None
            taken.append(delivery)
        return taken

    async def _bury_unreadable(self) -> None:
        while self._unreadable:
            arrived, reason = self._unreadable[0]
            try:
                await self._host.bury(arrived.raw.body, self._topic, reason)
            except CorralError as error:
                logger.warning("the dead letters take nothing of %s: %s", self._topic, error)
                await anyio.sleep(self._backoff.delay(1))
                self._settle(arrived, is_ack=False)
            else:
                self._settle(arrived, is_ack=True)
            # Empty: it was left meanwhile.
            if self._unreadable:
                self._unreadable.popleft()

    def _settle(self, arrived: _Arrived, *, is_ack: bool) -> None:
        arrived.of.unsettled -= 1
        tag = arrived.raw.delivery_tag
        if tag is not None and not arrived.of.channel.is_lost:
            self._host.side.post(arrived.of.channel.settle, tag, is_ack)

    def _check_open(self) -> None:
        self._host.check_open()
        if self._left:
            raise QueueUnavailable(f"The block that received from {self._topic!r} was left", topic=self._topic)

    # On the asyncio side

    async def _feed_forever(self) -> None:
        """See to it that messages arrive while somebody receives."""
        while not self._left:
            if not self._wanted:
                self._give_back()
            if not self._wanted or self._arrived:
                self._bell.ring()
                await self._wait_news()
                continue
            try:
                await self._feed_once()
            except (CorralError, *TROUBLE) as error:
                await self._detach()
                self._failures += 1
                why = error if isinstance(error, CorralError) else explain(error, self._host.receiving.address)
                level = logging.WARNING if self._failures == 1 else logging.DEBUG
                logger.log(level, "receiving from %s again: %s", self._topic, why)
                await self._wait_news(self._backoff.delay(self._failures))
            else:
                self._failures = 0

    async def _feed_once(self) -> None:
        """One subscription, from its beginning to its end."""
        if self._channel is None or self._channel.is_lost:
            connection = self._host.receiving.connection
            if connection is None or connection.is_lost:
                await self._wait_news()
                return
            await self._attach(connection)
        channel = self._channel
        assert channel is not None
        ahead = min(self._host.prefetch, self._pace.taken_within(LINGER / 2))
        subscription = _Subscription(channel, max(ahead, self._wanted), ahead=ahead > self._wanted)

        async def hear(raw: DeliveredMessage) -> None:
            self._hear(_Arrived(raw, subscription))

        tag = await channel.subscribe(hear, subscription.prefetch)
        self._subscription = subscription
        try:
            await self._wait_enough(subscription)
        finally:
            self._subscription = None
        await channel.unsubscribe(tag)

    def _on_end(self, feeder: asyncio.Task[None]) -> None:
        if not feeder.cancelled() and (error := feeder.exception()) is not None:
            logger.error("receiving from %s failed", self._topic, exc_info=error)
        self._left = True
        self._bell.ring()

    def _hear(self, arrived: _Arrived) -> None:
        arrived.of.unsettled += 1
        self._arrived.append(arrived)
        if not arrived.of.ahead:
            # Its receiver is told when the subscription has ended, so that what he acks makes no room for another message.
            self._news.set()
        elif self._wanted:
            self._bell.ring()

    async def _wait_enough(self, subscription: _Subscription) -> None:
        """Return when the subscription is of no more use."""
        refresh_at = time.monotonic() + REFRESHED_AFTER
        while not subscription.channel.is_lost and not self._left:
            if not subscription.ahead:
                if self._arrived or not self._wanted:
                    return
                due = refresh_at
            elif self._arrived:
                due = self._arrived[0].since + LINGER
            elif self._wanted:
                due = 0.0 if subscription.is_full else refresh_at
            else:
                due = self._pace.left_at + LINGER
            seconds = due - time.monotonic()
            if seconds <= 0:
                return
            await self._wait_news(seconds)

    def _give_back(self) -> None:
        while self._arrived:
            self._settle(self._arrived.popleft(), is_ack=False)

    async def _wait_news(self, seconds: float | None = None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()
        self._news.clear()

    async def _attach(self, connection: RabbitMQConnection) -> None:
        await self._detach()
        name = await declare_group(connection, self._topic, self._group, self._host.max_messages)
        self._channel = channel = _Channel(connection, name, self.change)
        await channel.open()

    async def _detach(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def _end(self) -> None:
        self._news.set()
        if self._feeder is not None:
            await asyncio.wait([self._feeder])
        await self._detach()


class RabbitMQSubscription(Subscription):
    """Made by `RabbitMQMessageQueue.subscribe`. `lost` counts what fell out of the full ring here; what a connection cannot
    carry in time falls out at the server."""

    def __init__(self, topic: str, name: str, buffer: int, check_open: Callable[[], None]) -> None:
        self.lost = 0
        self._topic = topic
        self._name = name
        self._ring: deque[QueueMessage] = deque(maxlen=buffer)
        self._check_open = check_open
        self._bell = Bell()
        self._channel: _Channel | None = None
        self._left = False

    async def receive(self) -> QueueMessage:
        await checkpoint()
        while True:
            self._check_open()
            if self._left:
                raise QueueUnavailable(f"The subscription to {self._topic!r} is closed", topic=self._topic)
            if self._channel is None or self._channel.is_lost:
                raise QueueUnavailable(
                    f"The connection of the subscription to {self._topic!r} was lost",
                    hint="Subscribe again, then look at the state: messages may have been missed.",
                    topic=self._topic,
                )
            if self._ring:
                return self._ring.popleft()
            await self._bell.wait()

    async def open(self, connection: RabbitMQConnection) -> None:
        """Begin to listen. Raises Away and SetupError."""
        await connection.call(self._listen, connection)

    def close(self) -> None:
        """Hear nothing more, and send its waiting tasks away."""
        self._left = True
        self._ring.clear()
        self._bell.ring()

    async def leave(self) -> None:
        """`close`, and tell the server. Bounded."""
        self.close()
        channel = self._channel
        if channel is not None and not channel.is_lost:
            with anyio.move_on_after(CLOSING_TIME, shield=True), suppress(*TROUBLE):
                await channel.connection.call(channel.close)
                return
            channel.connection.drop()

    # On the asyncio side

    async def _listen(self, connection: RabbitMQConnection) -> None:
        assert self._ring.maxlen is not None
        channel = _Channel(connection, self._name, self._bell.ring)
        try:
            await channel.open()
            await channel.listen(self._topic, self._ring.maxlen, self._hear)
        except BaseException:
            await channel.close()  # noqa: ASYNC102 - its caller is bounded
            raise
        self._channel = channel

    async def _hear(self, raw: DeliveredMessage) -> None:
        try:
            heard = QueueMessage.model_validate_json(raw.body)
        except ValidationError as error:
            logger.warning("a broadcast to %s that nobody can read: %s", self._topic, error)
            return
        self.lost += len(self._ring) == self._ring.maxlen
        self._ring.append(heard)
        self._bell.ring()

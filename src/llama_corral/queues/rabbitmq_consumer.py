"""Receiving from the queues of RabbitMQ.

AMQP 0-9-1 pushes: whoever is subscribed to a queue gets messages, up to its prefetch, whether somebody receives them or not,
and meanwhile another consumer may have nothing to do. To ask for single messages instead (`basic.get`) costs a round trip
through the log of the quorum queue each time, and cannot wait. So a consumer is subscribed while somebody receives, for as
many as were asked for, and no longer. One that comes back so quickly that subscribing would take most of its time stays
subscribed, with a prefetch of what it takes within the blink of an eye; what lies here longer (`LINGER`) is given back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from contextlib import suppress
from typing import Final, Protocol

import anyio
from aiormq.abc import DeliveredMessage
from pydantic import ValidationError

from ..abc import Consumer, Delivery
from ..aio import Bell, call_asyncio
from ..aio.client import AsyncioSide
from ..exceptions import CorralError, QueueUnavailable
from ..protocol.messages import QueueMessage
from ..supervision import Backoff
from .dead_letter import why_unreadable
from .rabbitmq_link import TROUBLE, RabbitMQConnection, RabbitMQLink, explain
from .rabbitmq_subscription import ReceivingChannel, finish
from .rabbitmq_topology import Declarations

logger = logging.getLogger(__name__)

LINGER: Final = 0.02
"""Seconds that a message lies here at most while nobody receives it."""
PACES: Final = 4
"""How many times in a row a consumer must have come back quickly to get messages ahead."""
REATTACHED_AFTER: Final = 30.0
"""Seconds without a message after which a consumer begins anew. The only backstop: a server may forget to say that a queue
was deleted, if it was declared again at once."""


class ConsumerHost(Protocol):
    """What a consumer needs of its queue."""

    declarations: Declarations
    prefetch: int

    @property
    def side(self) -> AsyncioSide: ...

    @property
    def receiving(self) -> RabbitMQLink: ...

    def check_open(self) -> None: ...

    async def bury(self, raw: bytes, topic: str, reason: str) -> None:
        """Put what nobody can read into the dead letters."""


class _Subscription:
    """One consumer at the server, on a channel. `ahead`: it stays while its messages are taken quickly."""

    def __init__(self, channel: ReceivingChannel, prefetch: int, *, ahead: bool) -> None:
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
        self.left_at = 0.0
        self._gaps: deque[float] = deque(maxlen=PACES)
        self._taken = 0

    def come(self) -> None:
        if self._taken:
            self._gaps.append((time.monotonic() - self.left_at) / self._taken)

    def leave(self, taken: int) -> None:
        self.left_at = time.monotonic()
        self._taken = taken

    def taken_within(self, seconds: float) -> int:
        """How many messages it will take, to judge by the slowest of the last times; none while there were too few."""
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
        self._left = self._has_failed = False
        self._news = asyncio.Event()
        self._channel: ReceivingChannel | None = None
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
        await finish(self._host.side, self._end)

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
                self._unreadable.append((arrived, why_unreadable(error)))
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
        if self._has_failed:
            raise QueueUnavailable(f"Receiving from {self._topic!r} has failed; the log says why", topic=self._topic)

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
                # The client ends what waits on a connection that we close by a cancellation of nobody's.
                await call_asyncio(self._feed_once)
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
        channel, wanted = self._channel, self._wanted
        if channel is None or not wanted:
            return
        ahead = min(self._host.prefetch, self._pace.taken_within(LINGER / 2))
        subscription = _Subscription(channel, max(ahead, wanted), ahead=ahead > wanted)

        async def hear(raw: DeliveredMessage) -> None:  # noqa: ASYNC124 - the client awaits it
            self._hear(_Arrived(raw, subscription))

        tag = await channel.subscribe(hear, subscription.prefetch)
        self._subscription = subscription
        try:
            came = await self._wait_enough(subscription)
        finally:
            self._subscription = None
        await channel.unsubscribe(tag)
        if not came and not self._open and not self._arrived:
            await self._detach()

    def _on_end(self, feeder: asyncio.Task[None]) -> None:
        if not feeder.cancelled() and (error := feeder.exception()) is not None:
            logger.error("receiving from %s failed", self._topic, exc_info=error)
        self._has_failed = True
        self._bell.ring()

    def _hear(self, arrived: _Arrived) -> None:
        arrived.of.unsettled += 1
        self._arrived.append(arrived)
        if not arrived.of.ahead:
            # Its receiver is told when the subscription has ended, so that what he acks makes no room for another message.
            self._news.set()
        elif self._wanted:
            self._bell.ring()

    async def _wait_enough(self, subscription: _Subscription) -> bool:
        """Return when the subscription is of no more use. False: nothing came for so long that it may be forgotten."""
        forgotten_at = time.monotonic() + REATTACHED_AFTER
        while not subscription.channel.is_lost and not self._left:
            if subscription.ahead:
                is_enough, due = self._judge_ahead(subscription)
            else:
                is_enough, due = bool(self._arrived) or not self._wanted, math.inf
            now = time.monotonic()
            if is_enough or due <= now:
                return True
            if due == math.inf and forgotten_at <= now:
                return False
            await self._wait_news(min(due, forgotten_at) - now)
        return True

    def _judge_ahead(self, subscription: _Subscription) -> tuple[bool, float]:
        """Whether it has to end, and if not, when at the latest."""
        if self._arrived:
            return False, self._arrived[0].since + LINGER
        if self._wanted:
            return subscription.is_full, math.inf
        return False, self._pace.left_at + LINGER

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
        name = await self._host.declarations.group(connection, self._topic, self._group)
        self._channel = channel = ReceivingChannel(connection, name, self.change)
        await channel.open()

    async def _detach(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def _end(self) -> None:
        await self._host.side.wait_posted()  # what was acked before
        self._news.set()
        if self._feeder is not None:
            await asyncio.wait([self._feeder])
        await self._detach()

"""Hearing broadcasts, and the channels over which anything is received."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import anyio
from aio_pika.abc import AbstractChannel
from aiormq.abc import AbstractChannel as ClientChannel
from aiormq.abc import DeliveredMessage

from ..aio import SelfCancelled
from ..aio.client import AsyncioSide
from .broker import BrokerSubscription
from .rabbitmq_link import CLOSING_TIME, TROUBLE, RabbitMQConnection
from .rabbitmq_topology import BROADCAST, topic_key

logger = logging.getLogger(__name__)


class ReceivingChannel:
    """A channel on the asyncio side, with what was received over it and is not settled. Closing it gives that back."""

    def __init__(self, connection: RabbitMQConnection, queue: str, on_lost: Callable[[], None]) -> None:
        self.connection = connection
        self.queue = queue
        self._is_lost = False
        self._on_lost = on_lost
        self._prefetch = 0
        self._channel: AbstractChannel | None = None

    @property
    def is_lost(self) -> bool:
        return self._is_lost or self.connection.is_lost

    async def open(self) -> None:
        self._channel = await self.connection.open_channel(on_lost=self._lose)
        # The queue was deleted. A new one of that name is another one, of which this channel hears nothing.
        (await self._client()).on_consumer_cancel_callbacks.add(lambda _: self._lose())

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
        self._is_lost = True
        if self._channel is not None:
            with suppress(*TROUBLE):
                await self._channel.close()

    async def _client(self) -> ClientChannel:
        assert self._channel is not None
        return await self._channel.get_underlay_channel()

    def _lose(self) -> None:
        if not self._is_lost:
            self._is_lost = True
            self._on_lost()


async def finish(side: AsyncioSide, fn: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Have something brought to its end, and return when it is done, or `CLOSING_TIME` is over: then it goes on by itself,
    until the server answers or the connection is lost."""
    done = anyio.Event()

    def on_done(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug("what was left behind at RabbitMQ: %s: %s", type(error).__name__, error)
        done.set()

    with suppress(SelfCancelled):  # the queue is closed
        side.start_soon(fn).add_done_callback(on_done)
        with anyio.move_on_after(CLOSING_TIME, shield=True):
            await done.wait()


class RabbitMQSubscription(BrokerSubscription):
    """Made by `RabbitMQMessageQueue.subscribe`. `lost` counts what fell out of the full ring here; what a connection cannot
    carry in time falls out at the server."""

    def __init__(self, side: AsyncioSide, topic: str, name: str, buffer: int, check_open: Callable[[], None]) -> None:
        super().__init__(topic, buffer, check_open)
        self._side = side
        self._name = name
        self._buffer = buffer
        self._channel: ReceivingChannel | None = None

    @property
    def is_lost(self) -> bool:
        return self._channel is None or self._channel.is_lost

    async def open(self, connection: RabbitMQConnection) -> None:
        """Begin to listen. Raises Away and SetupError."""
        await connection.call(self._listen, connection)

    async def leave(self) -> None:
        """`close`, and tell the server. Bounded."""
        self.close()
        channel = self._channel
        if channel is not None and not channel.is_lost:
            await finish(self._side, channel.close)

    # On the asyncio side

    async def _listen(self, connection: RabbitMQConnection) -> None:
        channel = ReceivingChannel(connection, self._name, self.change)
        try:
            await channel.open()
            await channel.listen(self._topic, self._buffer, self._hear_of)
        except BaseException:
            await channel.close()  # noqa: ASYNC102 - its caller is bounded
            raise
        self._channel = channel

    async def _hear_of(self, raw: DeliveredMessage) -> None:
        self.hear(raw.body)

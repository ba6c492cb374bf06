"""The control plane's own topic: messages of services that report by messages."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import anyio

from ..abc import Delivery, MessageQueue
from ..exceptions import CorralError, QueueUnavailable, Unavailable
from ..protocol import topics
from ..protocol.messages import QueueMessage

logger = logging.getLogger(__name__)

BATCH: Final = 100
FIRST_RETRY: Final = 0.5
LAST_RETRY: Final = 30.0


class Inbound:
    """Consumes the topic in order. What cannot be handled goes to the dead-letter topic; what cannot be handled now is
    given back."""

    def __init__(self, queue: MessageQueue, namespace: str, handle: Callable[[QueueMessage], Awaitable[None]]) -> None:
        self._queue = queue
        self._topic = topics.topic(namespace, topics.CONTROL_PLANE_NAME)
        self._dead_letter = topics.dead_letter(namespace)
        self._handle = handle
        self._retry = FIRST_RETRY

    async def consume_forever(self) -> None:
        while True:
            try:
                async with self._queue.consumer(self._topic) as consumer:
                    while True:
                        for delivery in await consumer.receive(BATCH):
                            await self._take(delivery)
            except Unavailable as error:
                # Leaving the consumer has given back what was open, in order.
                logger.warning("messages of services wait: %s", error)
            await anyio.sleep(self._retry)
            self._retry = min(LAST_RETRY, self._retry * 2)

    async def _take(self, delivery: Delivery) -> None:
        message = delivery.message
        try:
            await self._handle(message)
        except Unavailable:
            raise
        except CorralError as error:
            logger.warning("the message %s (%s) was refused: %s", message.id_, message.action, error)
            await self._bury(message)
        self._retry = FIRST_RETRY
        await delivery.ack()

    async def _bury(self, message: QueueMessage) -> None:
        try:
            await self._queue.publish(message, self._dead_letter)
        except QueueUnavailable as error:
            logger.warning("the message %s did not reach the dead-letter topic: %s", message.id_, error)

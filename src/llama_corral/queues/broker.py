"""What the adapters of brokers have in common: options of URLs, messages as bytes, and the ring of a subscription."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Final

from anyio.lowlevel import checkpoint
from pydantic import ValidationError

from ..abc import Subscription
from ..aio import Bell
from ..exceptions import BadInput, QueueUnavailable
from ..protocol.messages import QueueMessage
from .dead_letter import why_unreadable

logger = logging.getLogger(__name__)

LONGEST: Final = 86_400.0


def seconds(text: str | float) -> float:
    """An option that is a time. Raises ValueError."""
    value = float(text)
    if not 0.1 <= value <= LONGEST:
        raise ValueError(f"seconds must be between 0.1 and {LONGEST:g}, got {text}")
    return value


def count(text: str | int) -> int:
    """An option that is a number of something. Raises ValueError."""
    value = int(text)
    if value < 1:
        raise ValueError(f"a number must be at least 1, got {text}")
    return value


def encode(message: QueueMessage) -> bytes:
    """A message as JSON.

    Raises:
        BadInput: it holds what JSON has not.
    """
    try:
        return message.model_dump_json().encode()
    except ValueError as error:  # a text with a lone surrogate, a value that is not JSON
        raise BadInput(f"the message cannot be sent as JSON: {error}", message_id=message.id_) from error


class BrokerSubscription(Subscription):
    """Listens over a connection, and ends with it. `lost` counts what fell out of the full ring.

    Args:
        buffer: What the ring holds for a slow listener; beyond it the oldest is dropped.
        check_open: Raises QueueUnavailable where the queue is closed.
    """

    def __init__(self, topic: str, buffer: int, check_open: Callable[[], None]) -> None:
        self.lost = 0
        self._topic = topic
        self._ring: deque[QueueMessage] = deque(maxlen=buffer)
        self._check_open = check_open
        self._bell = Bell()
        self._left = False

    @property
    @abstractmethod
    def is_lost(self) -> bool:
        """Whether its connection is lost, so that it may have missed something. `change` is called when it becomes so."""

    async def receive(self) -> QueueMessage:
        await checkpoint()
        while True:
            self._check_open()
            if self._left:
                raise QueueUnavailable(f"The subscription to {self._topic!r} is closed", topic=self._topic)
            if self.is_lost:
                raise QueueUnavailable(
                    f"The connection of the subscription to {self._topic!r} was lost",
                    hint="Subscribe again, then look at the state: messages may have been missed.",
                    topic=self._topic,
                )
            if self._ring:
                return self._ring.popleft()
            await self._bell.wait()

    def hear(self, body: bytes) -> None:
        """A broadcast has come."""
        try:
            message = QueueMessage.model_validate_json(body)
        except ValidationError as error:
            logger.warning("a broadcast to %s that nobody can read: %s", self._topic, why_unreadable(error))
            return
        self.lost += len(self._ring) == self._ring.maxlen
        self._ring.append(message)
        self._bell.ring()

    def change(self) -> None:
        """There is a connection, or none any more."""
        self._bell.ring()

    def close(self) -> None:
        """Hear nothing more, and send its waiting tasks away."""
        self._left = True
        self._ring.clear()
        self._bell.ring()

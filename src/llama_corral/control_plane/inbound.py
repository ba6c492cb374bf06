"""The topics that a control plane itself consumes: messages of services that report by messages, and dead letters."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import anyio
from pydantic import ValidationError

from ..abc import Delivery, MessageQueue, Store
from ..exceptions import CorralError, Unavailable
from ..protocol import topics
from ..protocol.messages import QueueMessage
from ..protocol.records import DeadLetter
from ..queues.dead_letter import MAX_RAW_CHARACTERS, Letter, dead_letter
from .peers import Peers

logger = logging.getLogger(__name__)

BATCH: Final = 100
FIRST_RETRY: Final = 0.5
LAST_RETRY: Final = 30.0
MAX_NAME: Final = 500
MAX_REASON: Final = 2_000


async def consume_forever(
    queue: MessageQueue, topic: str, take: Callable[[QueueMessage], Awaitable[None]], *, what: str
) -> None:
    """Consume a topic in order. Where `take` raises `Unavailable`, the message and what came behind it go back, in order,
    and all of it is tried again later."""
    retry = FIRST_RETRY

    async def take_one(delivery: Delivery) -> None:
        nonlocal retry
        await take(delivery.message)
        retry = FIRST_RETRY
        await delivery.ack()

    while True:
        try:
            async with queue.consumer(topic) as consumer:
                while True:
                    for delivery in await consumer.receive(BATCH):
                        await take_one(delivery)
        except Unavailable as error:
            # Leaving the consumer has given back what was open, in order.
            logger.warning("%s wait: %s", what, error)
        await anyio.sleep(retry)
        retry = min(LAST_RETRY, retry * 2)


class Inbound:
    """Handles what comes on the control plane's own topic, while it is this one's turn: the messages of a task are to be
    handled in order. What cannot be handled is a dead letter."""

    def __init__(
        self,
        queue: MessageQueue,
        namespace: str,
        publisher_id: str,
        peers: Peers,
        handle: Callable[[QueueMessage], Awaitable[None]],
    ) -> None:
        self._queue = queue
        self._topic = topics.topic(namespace, topics.CONTROL_PLANE_NAME)
        self._dead_letters = topics.dead_letter(namespace)
        self._publisher_id = publisher_id
        self._peers = peers
        self._handle = handle

    async def consume_forever(self) -> None:
        while True:
            await self._peers.wait_turn()
            async with anyio.create_task_group() as turn:
                turn.start_soon(self._consume, name="messages of services")
                await self._peers.wait_turn_over()
                turn.cancel_scope.cancel()

    async def _consume(self) -> None:
        await consume_forever(self._queue, self._topic, self._take, what="messages of services")

    async def _take(self, message: QueueMessage) -> None:
        try:
            await self._handle(message)
        except Unavailable:
            raise
        except CorralError as error:
            logger.warning("the message %s (%s) was refused: %s", message.id_, message.action, error)
            letter = dead_letter(message, self._topic, str(error), publisher_id=self._publisher_id)
            await self._queue.publish(letter, self._dead_letters)


class DeadLetters:
    """Moves what nobody could read or handle from its topic into the store, for a person to look at."""

    def __init__(self, store: Store, queue: MessageQueue, namespace: str, now: Callable[[], float]) -> None:
        self._store = store
        self._queue = queue
        self._topic = topics.dead_letter(namespace)
        self._now = now

    async def consume_forever(self) -> None:
        await consume_forever(self._queue, self._topic, self._take, what="dead letters")

    async def _take(self, message: QueueMessage) -> None:
        await self._store.put_dead_letter(parse_letter(message, self._topic, self._now()))


def parse_letter(message: QueueMessage, topic: str, now: float) -> DeadLetter:
    """A message of the dead-letter topic as it is stored; one that is no envelope of ours is kept as it is.

    The stored message is its JSON text, or, where that is larger than `MAX_RAW_CHARACTERS`, a JSON string with the
    beginning of it.
    """
    try:
        letter = Letter.model_validate(message.data)
    except ValidationError:
        letter = Letter(
            topic=topic, reason="It is no envelope of a dead letter.", message=message.model_dump(mode="json")
        )
    text = _storable(json.dumps(letter.raw if letter.message is None else letter.message, ensure_ascii=False))
    if len(text) > MAX_RAW_CHARACTERS:
        text = json.dumps(text[:MAX_RAW_CHARACTERS], ensure_ascii=False)
    return DeadLetter(_storable(letter.topic[:MAX_NAME]), _storable(letter.reason[:MAX_REASON]), text, now)


def _storable(text: str) -> str:
    """Without lone surrogates and NUL, which not every store and answer takes: whatever came, a person is to see it."""
    return text.encode("utf-8", errors="replace").decode().replace("\0", "?")

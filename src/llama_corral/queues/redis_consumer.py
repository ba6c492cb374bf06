"""A consumer of a topic in Redis: what it reads, what it has in hand, and what it tells the server about it."""

from __future__ import annotations

import logging
import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.abc
from coredis import exceptions as redis
from pydantic import ValidationError

from ..abc import Consumer, Delivery
from ..exceptions import CorralError, QueueUnavailable, SetupError
from ..protocol import topics
from ..protocol.messages import QueueMessage, new_id
from ..supervision import open_support_group
from .dead_letter import dead_letter, why_unreadable
from .redis_connection import Connection
from .redis_link import ANSWER_TIME, LOST, RedisLink, explain
from .redis_scripts import ACK, FIELD, JOIN, NACK, RELEASE, SWEEP, Argument, Keys

if TYPE_CHECKING:
    from .redis import RedisMessageQueue

logger = logging.getLogger(__name__)

POLL: Final = 10.0
"""Seconds that one blocking read lasts."""
READ_ANSWER_TIME: Final = POLL + ANSWER_TIME / 2
MAX_BATCH: Final = 1_000
"""The most entries in one command."""
FORGET_AFTER: Final = 120.0
"""Seconds of silence after which the name of a consumer that has nothing open is removed. One that lives after all is
known again with its next read."""

MOST_LETTERS: Final = 100
"""Messages that cannot be read and wait for a place among the dead letters; with so many, no more are received."""

_FRESH: Final = b"1"
_RETURNED: Final = b"2"


class RedisDelivery(Delivery):
    """`ack` and `nack` return at once: the server is told with the next request of the consumer's support task."""

    def __init__(self, consumer: RedisConsumer, entry: bytes, message: QueueMessage) -> None:
        self.message = message
        self.redelivered = entry.startswith(_RETURNED)
        self._entry = entry
        self._consumer: RedisConsumer | None = consumer

    async def ack(self) -> None:
        if self._consumer is not None:
            self._consumer.settle_soon(self._entry, ack=True)
            self._consumer = None

    async def nack(self) -> None:
        if self._consumer is not None:
            self._consumer.settle_soon(self._entry, ack=False)
            self._consumer = None


@dataclass(slots=True)
class _Read:
    """A read whose answer nobody has taken yet."""

    connection: Connection
    request: Any


class RedisConsumer(Consumer):
    """Made by `RedisMessageQueue.consumer`. `receive` waits as long as it takes while the server is away.

    It reads over a connection of its own, and tells the server the rest over the queue's. An entry is named by the stream
    that it is in and its id, in one word. What is in hand is renewed in time; what is not, because its consumer died or
    because the answer with it was lost on the way, is moved by the first consumer to see that its lease is over.
    """

    def __init__(self, queue: RedisMessageQueue, topic: str, group: str) -> None:
        self.topic = topic
        self.ended = anyio.Event()
        self.link = RedisLink(queue.address, name=f"consumer of {topic}", patience=queue.patience, prepare=self._join)
        self._queue = queue
        self._keys = Keys.of(topic, group)
        self._group = group.encode()
        # With its lease, so that whoever finds its deliveries knows when they are overdue.
        self._name = b"%b:%d" % (new_id().encode(), math.ceil(queue.lease * 1000))
        self._in_hand: set[bytes] = set()
        self._acked: list[bytes] = []
        self._nacked: list[bytes] = []
        self._letters: deque[tuple[bytes, bytes, str]] = deque()
        self._buried = anyio.Event()
        self._news = anyio.Event()
        self._abandoned = anyio.Event()
        self._receiving = anyio.Lock(fast_acquire=True)
        self._settling = anyio.Lock(fast_acquire=True)
        self._reading: _Read | None = None
        self._returned_first = False
        self._left = False

    @property
    def open(self) -> int:
        """How many deliveries are open, as the server sees it."""
        return len(self._in_hand)

    # Receiving

    async def receive(self, max_messages: int = 1) -> list[Delivery]:
        if max_messages < 1:
            raise ValueError(f"max_messages must be at least 1, got {max_messages}")
        try:
            async with self._receiving:
                return await self._receive(max_messages)
        finally:
            # Whoever leaves last says so: while others wait for their turn, the read may still be theirs.
            if self._reading is not None:
                self._abandoned.set()

    async def _receive(self, max_messages: int) -> list[Delivery]:
        while True:
            self._check_open()
            if len(self._letters) >= MOST_LETTERS:
                await self._buried.wait()
                continue
            connection = self.link.connection or await self.link.wait_open()
            try:
                # One that was abandoned may have brought something, or may be about to.
                reading = self._reading or self._read(connection, max_messages)
                connection = reading.connection
                answer = await reading.request
            except (redis.RedisError, TimeoutError) as error:
                self._reading = None
                await self._read_failed(connection, error)
            else:
                # From here to the return there is no checkpoint at which a message could be lost.
                self._reading = None
                if deliveries := self._take(answer, max_messages):
                    return deliveries

    def _read(self, connection: Connection, max_messages: int) -> _Read:
        """Ask for entries. A read of two streams may bring `max_messages` of each, so after one that brought some of what
        came back the next asks for these alone: there is a surplus once, not as long as there are any."""
        reader = (b"GROUP", self._group, self._name, b"COUNT", min(max_messages, MAX_BATCH))
        command: tuple[Argument, ...] = (*reader, b"STREAMS", self._keys.returned, b">")
        if not self._returned_first:
            streams = (b"STREAMS", self._keys.returned, self._keys.fresh, b">", b">")
            command = (*reader, b"BLOCK", int(POLL * 1000), *streams)
        request = connection.create_request(b"XREADGROUP", *command, timeout=READ_ANSWER_TIME)
        self._reading = _Read(connection, request)
        return self._reading

    async def _read_failed(self, connection: Connection, error: Exception) -> None:
        """Put right what made a read fail, or raise."""
        if isinstance(error, LOST):
            self.link.drop(connection, error)
        elif isinstance(error, redis.UnblockedError | redis.StreamConsumerGroupError):
            logger.warning("the server has lost %s and its group: %s", self.topic, error)
            try:
                await self._join(connection)
            except (redis.RedisError, TimeoutError) as join_error:
                if not isinstance(join_error, LOST):
                    raise explain(join_error, self.link.address) from join_error
                self.link.drop(connection, join_error)
        else:
            raise explain(error, self.link.address) from error

    def _take(self, answer: Any, max_messages: int) -> list[Delivery]:
        """The deliveries of an answer. What is more than asked for goes back; what cannot be read, to the dead letters."""
        streams = answer or {}
        returned, fresh = streams.get(self._keys.returned, ()), streams.get(self._keys.fresh, ())
        self._returned_first = bool(returned)
        deliveries: list[Delivery] = []
        for mark, (entry_id, fields) in _marked(returned, fresh):
            entry = mark + entry_id
            self._in_hand.add(entry)
            if len(deliveries) == max_messages:
                self.settle_soon(entry, ack=False)
                continue
            raw = _raw(fields)
            try:
                message = QueueMessage.model_validate_json(raw)
            except ValidationError as error:
                self._letters.append((entry, raw, why_unreadable(error)))
                self._news.set()
            else:
                deliveries.append(RedisDelivery(self, entry, message))
        return deliveries

    def settle_soon(self, entry: bytes, *, ack: bool) -> None:
        """Let the server know. After the consumer has left it does nothing: what was open is back by then."""
        if not self._left:
            (self._acked if ack else self._nacked).append(entry)
            self._news.set()

    def _check_open(self) -> None:
        if self._left:
            raise QueueUnavailable(
                f"The consumer of {self.topic!r} or its queue is closed",
                hint="Use it inside its `async with` block.",
                topic=self.topic,
            )

    # Its support, and its end

    async def keep(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Everything that the consumer does beside receiving. Started when it has joined its group; ends after `leave`."""
        try:
            async with open_support_group() as support:
                await support.start(self.link.keep, name=f"Redis link of a consumer of {self.topic}")
                support.start_soon(self._withdraw_forever, name=f"abandoned reads of {self.topic}")
                task_status.started()
                await self._tend()
        finally:
            self.ended.set()

    async def leave(self) -> None:
        """Give back what is open and receive no more. What the server cannot be told comes back after the lease."""
        if self._left:
            return
        self._left = True
        self._news.set()
        self._buried.set()
        reading = self._reading
        is_blocked = reading is not None and not reading.request.complete
        self.link.close()
        try:
            if reading is not None and is_blocked:
                # Else it might bring something when everything else is back already.
                await self._end_read(reading, b"CLIENT KILL", b"ID")
            await self._settle(patience=0)
            await self._queue.run(RELEASE, self._keys[2:], self._group, self._name, 1, patience=0)
        except CorralError as error:
            logger.debug("what a consumer of %s had open comes back later: %s", self.topic, error)

    async def _join(self, connection: Connection) -> None:
        """Make the group known. What the server handed out to us over a connection that was lost comes back."""

        async def ask(command: bytes, *arguments: Argument) -> Any:
            return await connection.create_request(command, *arguments, timeout=ANSWER_TIME)

        await JOIN.run(ask, self._keys, self._group, self._name, int(FORGET_AFTER * 1000))
        await RELEASE.run(ask, self._keys[2:], self._group, self._name, 0, *self._in_hand)

    async def _tend(self) -> None:
        """Settle what has gathered, in as few requests as it takes. Some times in a lease, renew what is in hand and look
        for what is overdue."""
        due = anyio.current_time()
        while not self._left:
            with anyio.CancelScope(deadline=due):
                await self._news.wait()
            self._news = anyio.Event()
            if is_due := anyio.current_time() >= due:
                due = anyio.current_time() + self._queue.lease / 3 * random.uniform(0.75, 1.25)
            try:
                await self._settle(patience=math.inf)
                if is_due:
                    await self._renew()
                    await self._sweep()
                await self._bury()
            except (QueueUnavailable, SetupError) as error:
                if not self._left:
                    logger.error("deliveries of %s cannot be settled now: %s", self.topic, error)

    async def _settle(self, *, patience: float) -> None:
        """Tell the server what has gathered; returns when it has it."""
        async with self._settling:
            while acked := self._acked[:MAX_BATCH]:
                fresh, returned = _ids(acked, _FRESH), _ids(acked, _RETURNED)
                await self._queue.run(
                    ACK, self._keys[2:], self._group, len(fresh), *fresh, *returned, patience=patience
                )
                del self._acked[: len(acked)]
                self._in_hand.difference_update(acked)
            while nacked := self._nacked[:MAX_BATCH]:
                # What is given back together keeps its order.
                ordered = sorted(nacked, key=_age)
                await self._queue.run(NACK, self._keys[2:], self._group, *ordered, patience=patience)
                del self._nacked[: len(nacked)]
                self._in_hand.difference_update(nacked)

    async def _renew(self) -> None:
        for mark, key in ((_FRESH, self._keys.fresh), (_RETURNED, self._keys.returned)):
            ids = _ids(self._in_hand, mark)
            for start in range(0, len(ids), MAX_BATCH):
                batch = ids[start : start + MAX_BATCH]
                reader = (key, self._group, self._name, 0)
                await self._queue.ask(b"XCLAIM", *reader, *batch, b"JUSTID", patience=math.inf)

    async def _sweep(self) -> None:
        """Give back what dead consumers had open."""
        lease = math.ceil(self._queue.lease * 1000)
        while moved := await self._queue.run(SWEEP, self._keys[2:], self._group, lease, MAX_BATCH, patience=math.inf):
            logger.info("%d deliveries of %s come again: their consumer was silent", moved, self.topic)

    async def _bury(self) -> None:
        while self._letters:
            entry, raw, reason = self._letters[0]
            letter = dead_letter(raw, self.topic, reason)
            await self._queue.publish(letter, topics.dead_letter(self._queue.namespace))
            logger.error("a message of %s that cannot be read went to the dead letters: %s", self.topic, reason)
            self._letters.popleft()
            self._buried.set()
            self._buried = anyio.Event()
            self.settle_soon(entry, ack=True)

    async def _withdraw_forever(self) -> None:
        """End reads that nobody waits for any more before they bring something; give back what they have brought."""
        while True:
            await self._abandoned.wait()
            self._abandoned = anyio.Event()
            reading = self._reading
            if reading is None or self._receiving.locked():
                continue
            if not reading.request.complete:
                await self._end_read(reading, b"CLIENT UNBLOCK")
            try:
                answer = await reading.request
            except (redis.RedisError, TimeoutError) as error:
                answer = None
                self.link.drop(reading.connection, error)
            # Else it belongs to somebody who has begun to receive in the meantime.
            if self._reading is reading and not self._receiving.locked():
                self._reading = None
                self._take(answer, 0)

    async def _end_read(self, reading: _Read, command: bytes, *arguments: bytes) -> None:
        """End a read in the server. Its user may not be allowed to: then what the read brings waits for the next receive,
        or for the end of the lease."""
        client_id = reading.connection.client_id
        assert client_id is not None
        try:
            await self._queue.ask(command, *arguments, client_id, patience=0)
        except CorralError as error:
            logger.debug("a read of %s could not be ended: %s", self.topic, error)


def _marked(returned: Sequence[Any], fresh: Sequence[Any]) -> Iterator[tuple[bytes, Any]]:
    for entry in returned:
        yield _RETURNED, entry
    for entry in fresh:
        yield _FRESH, entry


def _ids(entries: Any, mark: bytes) -> list[bytes]:
    return [entry[1:] for entry in entries if entry.startswith(mark)]


def _age(entry: bytes) -> tuple[bool, list[int]]:
    """To sort by: what had come back before comes first, then by id."""
    return entry.startswith(_FRESH), [int(part) for part in entry[1:].split(b"-")]


def _raw(fields: Sequence[bytes] | None) -> bytes:
    """The message of an entry; of an entry that another program made, everything that is in it."""
    pairs = list(fields or ())
    return pairs[1] if pairs[:1] == [FIELD] else b" ".join(pairs)

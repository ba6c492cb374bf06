"""Receiving from JetStream and from core NATS.

A message is asked for only while somebody waits for one, so that none lies here that another consumer could work on. What
arrives when nobody waits any more is given back at once.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from functools import partial
from typing import Final, Protocol

import anyio
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as ClientSubscription
from pydantic import ValidationError

from ..abc import Consumer, Delivery
from ..aio import Bell
from ..exceptions import CorralError, QueueUnavailable, SetupError
from ..protocol.messages import QueueMessage
from ..supervision import Backoff
from .broker import BrokerSubscription
from .dead_letter import why_unreadable
from .nats_connection import Away, NatsConnection, status_of
from .nats_link import NatsLink
from .nats_stream import ConsumerName, Stream, nanoseconds

logger = logging.getLogger(__name__)

POLL: Final = 30.0
"""Seconds that a request for a message waits at the server."""
EXTENDED_AFTER: Final = 0.4
"""Part of its lease after which an open delivery gets a new one."""
GRACE: Final = 5.0
"""Seconds after which a request that should have been answered counts as lost."""

ACK: Final = b"+ACK"
NAK: Final = b"-NAK"
WORKING: Final = b"+WPI"

_ACK_SUBJECT: Final = "$JS.ACK."
_SHORT: Final = 9
"""Tokens of it, where it has neither domain nor account."""
_TIMES: Final = 2
_LEFT: Final = 6
_INTERIM: Final = "100"
_NOTHING_CAME: Final = ("404", "408")


class ConsumerHost(Protocol):
    """What a consumer needs of its queue."""

    stream: Stream
    lease: float

    @property
    def link(self) -> NatsLink: ...

    def check_open(self) -> None: ...

    def settle(self, reply: str, verdict: bytes) -> None:
        """Tell the server, now or when it is there again."""

    async def bury(self, raw: bytes, topic: str, reason: str) -> None:
        """Put what nobody can read into the dead letters."""


class NatsDelivery(Delivery):
    """`ack` and `nack` return at once: the server is told without waiting for its answer."""

    def __init__(self, message: QueueMessage, reply: str, consumer: NatsConsumer) -> None:
        self.message = message
        self.redelivered = times_delivered(reply) > 1
        self.reply = reply
        self.since = anyio.current_time()
        self._consumer = consumer

    async def ack(self) -> None:
        self._consumer.settle(self, ACK)

    async def nack(self) -> None:
        self._consumer.settle(self, NAK)


def times_delivered(reply: str) -> int:
    return int(_tokens(reply)[_TIMES])


def _tokens(reply: str) -> list[str]:
    """Of the subject where a message is acked: `$JS.ACK.(DOMAIN.ACCOUNT.)STREAM.CONSUMER.TIMES.SEQ.SEQ.TIME.LEFT`, and
    perhaps more. From STREAM on."""
    tokens = reply.split(".")
    return tokens[2 if len(tokens) == _SHORT else 4 :]


class _Attachment:
    """A consumer at the server, over one connection. At most one request for messages is on its way: then whatever
    arrives is counted against it, which need not say to which request it belongs."""

    def __init__(self, connection: NatsConnection, consumer: ConsumerName) -> None:
        self.connection = connection
        self.consumer = consumer
        self.inbox = connection.new_inbox()
        self.subscription: ClientSubscription | None = None
        self.token: str | None = None
        """Of the request on its way."""
        self.deadline = 0.0
        self.backlog = 1
        """How many messages the server had left for this group when it sent the last one."""
        self.is_broken = False
        self._left = 0
        self._requests = 0

    @property
    def is_waiting(self) -> bool:
        """Whether something will still come: a message, or word that none will."""
        return self.token is not None and not self.is_useless

    @property
    def is_useless(self) -> bool:
        return self.is_broken or self.connection.is_lost

    def ask(self, subject: str, batch: int, wait: float) -> None:
        """Ask for up to `batch` messages, for `wait` seconds; with 0 for what is there."""
        self._requests += 1
        self.token = str(self._requests)
        self._left = batch
        self.deadline = anyio.current_time() + wait + GRACE
        body = {"batch": batch, "expires": nanoseconds(wait)} if wait else {"batch": batch, "no_wait": True}
        self.connection.post(subject, json.dumps(body).encode(), f"{self.inbox}.{self.token}")

    def count_message(self, reply: str) -> None:
        self.backlog = int(_tokens(reply)[_LEFT])
        self._left -= 1
        if self._left == 0:
            self.token = None

    def hear_status(self, message: Msg) -> None:
        status = status_of(message)
        if status == _INTERIM or message.subject != f"{self.inbox}.{self.token}":
            return
        self.token = None
        self.backlog = 0
        if status not in _NOTHING_CAME:  # the consumer is deleted, the server stops, ...
            self.is_broken = True
            logger.debug("a request for messages ended: %s", message.headers)


class NatsConsumer(Consumer):
    """Made by `NatsMessageQueue.consumer`. `receive` waits as long as it takes while the server is away."""

    def __init__(self, host: ConsumerHost, topic: str, group: str) -> None:
        self.bell = Bell()
        """Rings when something has arrived, and is rung by the queue when its connection changes or it is closed."""
        self._host = host
        self._topic = topic
        self._group = group
        self._attachment: _Attachment | None = None
        self._arrived: deque[Msg] = deque()
        self._unreadable: deque[tuple[Msg, str]] = deque()
        self._open: dict[NatsDelivery, None] = {}
        self._turn = anyio.Lock()
        self._is_receiving = False
        self._backoff = Backoff(initial=0.05, maximum=2.0)
        self._failures = 0
        self._is_first = True  # until the server says otherwise
        self._left = False

    async def receive(self, max_messages: int = 1) -> list[Delivery]:
        if max_messages < 1:
            raise ValueError(f"max_messages must be at least 1, got {max_messages}")
        async with self._turn:
            self._is_receiving = True
            try:
                while True:
                    self._check_open()
                    if taken := self._take(max_messages):
                        return taken
                    if self._unreadable:
                        await self._bury_unreadable()
                    else:
                        await self._fetch(max_messages)
            finally:
                self._is_receiving = False
                while self._arrived:
                    self._host.settle(self._arrived.popleft().reply, NAK)

    async def attach(self, connection: NatsConnection) -> _Attachment:
        """Make the group known to the server, and hear what it sends. Raises Away and SetupError."""
        consumer = await self._host.stream.ensure_consumer(
            connection, self._topic, self._group, self._host.lease, may_be_first=self._is_first
        )
        self._is_first = consumer.is_first
        found = _Attachment(connection, consumer)
        found.subscription = await connection.subscribe(f"{found.inbox}.*", partial(self._hear, found), flush=False)
        self._attachment = found
        if self._left:  # meanwhile
            await self._detach()
        return found

    async def leave(self) -> None:
        """Give back what is open and send its waiting tasks away. Bounded."""
        if self._left:
            return
        self._left = True
        for delivery in self._open:
            self._host.settle(delivery.reply, NAK)
        for raw, _ in self._unreadable:
            self._host.settle(raw.reply, NAK)
        self._open.clear()
        self._unreadable.clear()
        self.bell.ring()
        await self._detach()

    def settle(self, delivery: NatsDelivery, verdict: bytes) -> None:
        if delivery in self._open:
            del self._open[delivery]
            self._host.settle(delivery.reply, verdict)

    @property
    def lease(self) -> float:
        """As the server has it."""
        return self._host.lease if self._attachment is None else self._attachment.consumer.lease

    def extend(self) -> None:
        """Tell the server that what is open for long is still being worked on."""
        old = anyio.current_time() - self.lease * EXTENDED_AFTER
        for delivery in self._open:
            if delivery.since < old:
                self._host.settle(delivery.reply, WORKING)

    # Parts of receive

    def _take(self, limit: int) -> list[Delivery]:
        taken: list[Delivery] = []
        while self._arrived and len(taken) < limit:
            raw = self._arrived.popleft()
            try:
                message = QueueMessage.model_validate_json(raw.data)
            except ValidationError as error:
                self._unreadable.append((raw, why_unreadable(error)))
                continue
            delivery = NatsDelivery(message, raw.reply, self)
            self._open[delivery] = None
            taken.append(delivery)
        return taken

    async def _bury_unreadable(self) -> None:
        while self._unreadable:
            raw, reason = self._unreadable[0]
            try:
                await self._host.bury(raw.data, self._topic, reason)
            except CorralError as error:
                # It comes again when its lease has ended.
                logger.warning("the dead letters take nothing of %s: %s", self._topic, error)
            else:
                self._host.settle(raw.reply, ACK)
            # Empty: it was left meanwhile.
            if self._unreadable:
                self._unreadable.popleft()

    async def _fetch(self, limit: int) -> None:
        """Ask for messages and wait, sometimes in vain."""
        try:
            attachment = self._attachment
            if attachment is None or attachment.is_useless:
                await self._detach()
                attachment = await self.attach(await self._wait_connection())
            subject = self._host.stream.next_subject(attachment.consumer)
            if limit > 1 and attachment.backlog and not attachment.is_waiting:
                attachment.ask(subject, limit, 0)
                await self._wait_answer(attachment)
            if not self._arrived and not attachment.is_useless:
                if not attachment.is_waiting:
                    attachment.ask(subject, 1, POLL)
                await self._wait_answer(attachment)
            if attachment.is_broken and not self._arrived:
                raise Away("the server does not hand out messages")
            self._failures = 0
        except (Away, SetupError) as error:
            self._failures += 1
            level = logging.WARNING if self._failures == 1 else logging.DEBUG
            logger.log(level, "receiving from %s again: %s", self._topic, error)
            await self._pause(self._backoff.delay(self._failures))

    async def _wait_answer(self, attachment: _Attachment) -> None:
        with anyio.CancelScope(deadline=attachment.deadline):
            while attachment.is_waiting:
                await self.bell.wait()
                self._check_open()
            return
        attachment.is_broken = True  # not even an end of the request: perhaps the server knows the consumer no more

    async def _wait_connection(self) -> NatsConnection:
        while (found := self._host.link.connection) is None or found.is_lost:
            await self.bell.wait()
            self._check_open()
        return found

    async def _pause(self, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            while True:
                await self.bell.wait()
                self._check_open()

    async def _detach(self) -> None:
        attachment, self._attachment = self._attachment, None
        if attachment is not None and attachment.subscription is not None:
            await attachment.connection.unsubscribe(attachment.subscription)

    def _check_open(self) -> None:
        self._host.check_open()
        if self._left:
            raise QueueUnavailable(f"The block that received from {self._topic!r} was left", topic=self._topic)

    # On the asyncio side

    async def _hear(self, attachment: _Attachment, message: Msg) -> None:
        if not message.reply.startswith(_ACK_SUBJECT):
            attachment.hear_status(message)
        else:
            attachment.count_message(message.reply)
            if self._is_receiving and not self._left:
                self._arrived.append(message)
            else:
                self._host.settle(message.reply, NAK)
        self.bell.ring()


class NatsSubscription(BrokerSubscription):
    """Made by `NatsMessageQueue.subscribe`."""

    connection: NatsConnection | None = None

    @property
    def is_lost(self) -> bool:
        return self.connection is None or self.connection.is_lost

    async def hear_of(self, message: Msg) -> None:
        """On the asyncio side."""
        self.hear(message.data)

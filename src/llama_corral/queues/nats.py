"""A queue in a NATS server or cluster: JetStream for tickets, core NATS for broadcasts.

`nats_stream.py` says how a topic is kept there, `nats_consumer.py` how it is consumed, `nats_link.py` how the one
connection of a queue is kept (`nats_connection.py`). It works with nats-server from 2.9 on.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, Self, TypeVar
from uuid import uuid4

import anyio

from ..abc import MessageQueue
from ..aio import Bell
from ..aio.client import open_asyncio_side
from ..exceptions import QueueUnavailable, TooLarge
from ..protocol import topics
from ..protocol.messages import QueueMessage
from ..protocol.topics import DEFAULT_NAMESPACE
from ..supervision import Backoff, open_support_group
from .broker import count, encode, seconds
from .dead_letter import dead_letter
from .memory import DEFAULT_BROADCAST_BUFFER
from .nats_address import NatsAddress
from .nats_connection import Away, NatsConnection, NoResponders, Pending
from .nats_consumer import EXTENDED_AFTER, NatsConsumer, NatsSubscription
from .nats_link import NatsLink
from .nats_stream import ApiError, Stream, read_answer, token_of
from .urls import take_options

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_STREAM: Final = "corral"
DEFAULT_LEASE: Final = 30.0
DEFAULT_PATIENCE: Final = 10.0
DEFAULT_MAX_MESSAGES: Final = 1_000_000
CLOSING_TIME: Final = 4.0
HEADER_BYTES: Final = len(b"NATS/1.0\r\nNats-Msg-Id: \r\n\r\n")
LATE_VERDICTS: Final = 10_000
"""Acks and nacks that wait for the connection; of more, the oldest are forgotten, and their messages come again."""


def _name(text: str) -> str:
    if not (text and text.isascii() and text.replace("-", "").replace("_", "").isalnum()):
        raise ValueError("a name of a stream has letters, digits, - and _ only")
    return text


# The mixin's __aexit__ names its three arguments, the one of abc takes any: called by `async with`, they are the same.
class NatsMessageQueue(anyio.AsyncContextManagerMixin, MessageQueue):  # type: ignore[misc]
    """`async with NatsMessageQueue.from_url("nats://user:password@host:4222") as queue: ...`. Works on Trio and on asyncio.

    A server that is away, or restarts, is waited for: consumers wait as long as it takes and go on, everything else raises
    after `patience`. A subscription whose connection was lost raises, because it may have missed something. Publishing
    takes one round trip; messages that come back are delivered before the others.

    The stream is created where it is missing, and never deleted or changed. All queues of one stream share its limit.

    Args:
        address: Of the servers, with credentials.
        namespace: The topic namespace; messages that cannot be read go to its dead letters.
        stream: Name of the stream, and first token of its subjects.
        domain: The JetStream domain, if it is not the server's own.
        lease: Seconds after which what a dead consumer had open comes back. It is kept at the server with each group, from
            its first consumer on. A living consumer keeps what it has for as long as it likes.
        max_messages: Limit of the stream when it is created, over all topics; beyond it `publish` raises.
        replicas: Servers of a cluster that keep the stream, when it is created.
        patience: Seconds for which entering, publishing and the like are tried before `QueueUnavailable` is raised.
        broadcast_buffer: What each subscription keeps for a slow listener; beyond it the oldest is dropped.

    Raises (all methods):
        QueueUnavailable: closed, or the server is away or cannot take anything now.
        SetupError: the operator must change something: wrong credentials, no JetStream, a stream that is not ours.
        TooLarge: a message is larger than the server takes.

    Attributes:
        durable: Whether the stream is kept in files; known when the queue is entered.
    """

    durable = True

    def __init__(
        self,
        address: NatsAddress,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        stream: str = DEFAULT_STREAM,
        domain: str | None = None,
        lease: float = DEFAULT_LEASE,
        max_messages: int = DEFAULT_MAX_MESSAGES,
        replicas: int = 1,
        patience: float = DEFAULT_PATIENCE,
        broadcast_buffer: int = DEFAULT_BROADCAST_BUFFER,
    ) -> None:
        self.address = address
        self.namespace = namespace
        self.lease = seconds(lease)
        self.patience = seconds(patience)
        self.stream = Stream(_name(stream), domain=domain, max_messages=count(max_messages), replicas=count(replicas))
        self._broadcast_buffer = count(broadcast_buffer)
        self._link: NatsLink | None = None
        self._bell = Bell()
        self._backoff = Backoff(initial=0.05, maximum=1.0)
        self._consumers: set[NatsConsumer] = set()
        self._subscriptions: set[NatsSubscription] = set()
        self._late: deque[tuple[str, bytes]] = deque(maxlen=LATE_VERDICTS)
        self._state = "not entered"
        self._id = uuid4().hex
        self._number = self._published = self._broadcasts = self._refused = 0

    @classmethod
    def from_url(cls, url: str, *, namespace: str = DEFAULT_NAMESPACE) -> Self:
        """`nats://` or, where TLS is a must, `tls://`; several servers of a cluster with commas between them. Options:
        `lease`, `patience`, `max_messages`, `replicas`, `stream`, `domain`, `broadcast_buffer`, `creds`, `ca`.

        Raises:
            SetupError: something in it cannot be used. The text never repeats the URL.
        """
        known: dict[str, Callable[[str], Any]] = {
            "lease": seconds,
            "patience": seconds,
            "max_messages": count,
            "replicas": count,
            "stream": _name,
            "domain": _name,
            "broadcast_buffer": count,
        }
        rest, options = take_options(url, known)
        return cls(NatsAddress.from_url(rest), namespace=namespace, **options)

    @property
    def link(self) -> NatsLink:
        self.check_open()
        assert self._link is not None
        return self._link

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncIterator[Self]:
        if self._state != "not entered":
            raise RuntimeError("A NatsMessageQueue can be entered once; make a new one")
        self._state = "closed"
        async with open_asyncio_side("NATS") as side, open_support_group() as support:
            self._link = NatsLink(
                side, self.address, patience=self.patience, prepare=self._prepare, on_change=self._on_change
            )
            try:
                await support.start(self._link.keep, name="NATS link")
                support.start_soon(self._extend_forever, name="leases of NATS")
                self._state = "open"
                yield self
            finally:
                self._state = "closed"
                with anyio.move_on_after(CLOSING_TIME, shield=True):
                    await self._close()

    async def _close(self) -> None:
        """Give back what is open, and let everybody go who uses the queue. Blocks that are still entered find it closed."""
        for subscription in self._subscriptions:
            subscription.close()
        async with anyio.create_task_group() as tasks:
            for consumer in tuple(self._consumers):
                tasks.start_soon(consumer.leave)
        self._bell.ring()

    # Tickets

    async def publish(self, message: QueueMessage, topic: str) -> None:
        self._number += 1
        publication = _Publication(self.stream, topic, encode(message), f"{self._id}.{self._number}")
        try:
            await self._patiently(publication.attempt)
        except Away:
            raise
        except QueueUnavailable:
            self._refused += 1
            raise
        self._published += 1

    @asynccontextmanager
    async def consumer(self, topic: str, group: str = "default") -> AsyncIterator[NatsConsumer]:
        consumer = NatsConsumer(self, topic, group)
        self._consumers.add(consumer)
        try:
            await self._patiently(consumer.attach)
            yield consumer
        finally:
            self._consumers.discard(consumer)
            await consumer.leave()  # noqa: ASYNC102 - shielded and bounded there

    # Broadcasts

    async def broadcast(self, message: QueueMessage, topic: str) -> None:
        body, subject = encode(message), self.stream.broadcast_subject(topic)

        async def send(connection: NatsConnection) -> None:
            _check_size(connection, len(body), topic)
            await connection.publish(subject, body)

        await self._patiently(send)
        self._broadcasts += 1

    @asynccontextmanager
    async def subscribe(self, topic: str) -> AsyncIterator[NatsSubscription]:
        subscription = NatsSubscription(topic, self._broadcast_buffer, self.check_open)
        subject = self.stream.broadcast_subject(topic)

        async def start(connection: NatsConnection) -> Any:
            subscription.connection = connection
            return await connection.subscribe(subject, subscription.hear_of, flush=True)

        self._subscriptions.add(subscription)
        try:
            at_client = await self._patiently(start)
            try:
                yield subscription
            finally:
                subscription.close()
                assert subscription.connection is not None
                await subscription.connection.unsubscribe(at_client)  # noqa: ASYNC102 - shielded and bounded there
        finally:
            self._subscriptions.discard(subscription)

    def statistics(self) -> Mapping[str, Any]:
        """What waits is known by the server, not here: `topics` is empty."""
        link = self._link
        return {
            "topics": {},
            "connected": link is not None and link.connection is not None,
            "reconnects": 0 if link is None else max(0, link.reconnects),
            "consumers": len(self._consumers),
            "subscriptions": len(self._subscriptions),
            "published": self._published,
            "broadcasts": self._broadcasts,
            "refused": self._refused,
            "lost_broadcasts": sum(subscription.lost for subscription in self._subscriptions),
        }

    # For consumers, subscriptions and the link

    def check_open(self) -> None:
        if self._state != "open":
            raise QueueUnavailable(
                f"The queue at NATS at {self.address} is {self._state}", hint="Use it inside its `async with` block."
            )

    def settle(self, reply: str, verdict: bytes) -> None:
        connection = None if self._link is None else self._link.connection
        if connection is None or connection.is_lost:
            self._late.append((reply, verdict))
        else:
            connection.post(reply, verdict)

    async def bury(self, raw: bytes, topic: str, reason: str) -> None:
        logger.warning("a message of %s cannot be read and goes to the dead letters: %s", topic, reason)
        await self.publish(dead_letter(raw, topic, reason), topics.dead_letter(self.namespace))

    async def _prepare(self, connection: NatsConnection) -> None:
        await self.stream.prepare(connection)
        self.durable = self.stream.is_durable

    def _on_change(self) -> None:
        if self._link is not None and self._link.connection is not None:
            late, self._late = self._late, deque(maxlen=LATE_VERDICTS)
            for reply, verdict in late:
                self.settle(reply, verdict)
        self._bell.ring()
        for consumer in self._consumers:
            consumer.bell.ring()
        for subscription in self._subscriptions:
            subscription.change()

    async def _extend_forever(self) -> None:
        while True:
            shortest = min((consumer.lease for consumer in self._consumers), default=self.lease)
            await anyio.sleep(min(shortest, self.lease) * EXTENDED_AFTER / 2)
            for consumer in self._consumers:
                consumer.extend()

    async def _patiently(self, fn: Callable[[NatsConnection], Awaitable[T]]) -> T:
        """Try until it is done, for `patience` seconds at most."""
        last: Away | None = None
        failures = 0
        with anyio.move_on_after(self.patience):
            while True:
                try:
                    return await fn(await self._wait_connection())
                except Away as error:
                    last = error
                failures += 1
                await anyio.sleep(self._backoff.delay(failures))
        connection = self.link.connection
        raise last or (self.link.away() if connection is None else connection.no_answer(lost=connection.is_lost))

    async def _wait_connection(self) -> NatsConnection:
        while (found := self.link.connection) is None or found.is_lost:
            await self._bell.wait()
        return found


class _Publication:
    """One message on its way to each group of a topic, over as many attempts as it takes.

    The id is that of the publication, not of the message: publishing a message again, after it was worked on, is another
    publication, and would otherwise be dropped by the server without a word.
    """

    def __init__(self, stream: Stream, topic: str, body: bytes, id_: str) -> None:
        self._stream = stream
        self._topic = topic
        self._token = token_of(topic)
        self._body = body
        self._id = id_
        self._done: set[str | None] = set()

    async def attempt(self, connection: NatsConnection) -> None:
        marks = self._stream.marks(self._token)
        while not marks.known or self._missing(marks.groups):
            sent: dict[str | None, Pending] = {}
            asked: Pending | None = None
            is_lost = False
            try:
                for group in self._missing(marks.groups):
                    sent[group] = await self._send(connection, group)
                if not marks.known:
                    asked = await self._stream.ask_marks(connection, self._token)
                for group, pending in sent.items():
                    read_answer(await pending.answer())
                    self._done.add(group)
                if asked is not None:
                    self._stream.learn_marks(marks, await asked.answer())
            except NoResponders:
                is_lost = True
            except ApiError as error:
                raise self._stream.explain(error, connection, self._topic) from error
            finally:
                for pending in (*sent.values(), *([] if asked is None else [asked])):
                    pending.forget()
            if is_lost:
                await self._stream.restore(connection)
                raise Away(f"The stream {self._stream.name} was lost")

    def _missing(self, groups: set[str]) -> set[str | None]:
        return {None, *groups} - self._done

    async def _send(self, connection: NatsConnection, group: str | None) -> Pending:
        headers = {"Nats-Msg-Id": f"{self._id}/{group or ''}"}
        _check_size(connection, len(self._body) + HEADER_BYTES + len(headers["Nats-Msg-Id"]), self._topic)
        return await connection.ask(self._stream.subject(self._token, group), self._body, headers)


def _check_size(connection: NatsConnection, size: int, topic: str) -> None:
    # The server ends the connection of whoever sends more.
    if size > connection.max_payload:
        raise TooLarge(
            f"A message for {topic!r} has {size} bytes, and the NATS server takes {connection.max_payload}",
            hint="Send less, or raise max_payload of the server.",
            topic=topic,
            limit=connection.max_payload,
        )

"""The message queue of a control plane in another process: a client of its routes below `/queue`.

Everything that waits is on the server; here is what a client must remember so that nothing is lost on the way. Of several
control planes, which share a broker, one holds a consumer. If it fails its client opens another one elsewhere, and what was
in hand comes back to the broker when the first one misses its client.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, Self, TypeVar

import anyio
import anyio.lowlevel
from pydantic import SecretStr, TypeAdapter
from pydantic_core import to_json

from ..abc import Consumer, Delivery, MessageQueue, Subscription
from ..exceptions import BadInput, Conflict, CorralError, QueueUnavailable, UsageError
from ..http_link import HttpLink
from ..protocol import queue_calls as calls
from ..protocol.messages import QueueMessage
from ..supervision import Backoff, open_support_group

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_PATIENCE: Final = 10.0
DEFAULT_LEASE: Final = 15.0
POLL: Final = 20.0
"""Seconds that one long poll lasts."""
CLOSING_TIME: Final = 2.0
DRAIN_PAUSE: Final = 0.5
"""Seconds before a server that stops is asked again; by then it has usually closed its door."""
BROADCASTS_AT_ONCE: Final = 64
MOVE_AFTER: Final = 2.0
"""Seconds for which a server that holds a lease is asked before the lease is given up for another server."""

_NOTHING: Final[TypeAdapter[Any]] = TypeAdapter(Any)
_LEASE: Final = TypeAdapter(calls.Lease)
_RECEIVED: Final = TypeAdapter(calls.ReceiveAnswer)
_SETTLED: Final = TypeAdapter(calls.SettleAnswer)


class HttpMessageQueue(MessageQueue):
    """`async with HttpMessageQueue("http://core:8000", token=token) as queue: ...`. Works on Trio and on asyncio.

    A server that is away, or restarts, is waited for: consumers wait as long as it takes and go on, everything else raises
    after `patience`. A subscription that the server forgot raises, because it may have missed something.

    Args:
        url: Of the control plane, or several of them as `HttpLink` takes them.
        token: Its bearer token.
        link: An open connection pool to it, to be used instead of one of its own; its owner closes it.
        patience: Seconds for which a request is repeated before `QueueUnavailable` is raised.
        lease: Seconds of silence after which the server takes this client for dead, and gives what it had open to others;
            None: as the server has it.

    Raises (all methods):
        QueueUnavailable: closed, or the server is away.
        UsageError: the server refused, and will again: Unauthorized, NotFound (it is no control plane), TooLarge.
    """

    durable = False

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        token: str | SecretStr | None = None,
        link: HttpLink | None = None,
        patience: float = DEFAULT_PATIENCE,
        lease: float | None = None,
    ) -> None:
        self._owns_link = link is None
        self.link = HttpLink(url, token) if link is None else link
        self.lease = lease
        self._patience = patience
        self._backoff = Backoff(initial=0.05, maximum=2.0)
        self._state = "not entered"
        self._calls: set[anyio.CancelScope] = set()
        self._none_left = anyio.Event()
        self._leases: dict[_Leased, None] = {}

    async def __aenter__(self) -> Self:
        await anyio.lowlevel.checkpoint()
        if self._state != "not entered":
            raise RuntimeError("An HttpMessageQueue can be entered once; make a new one")
        self._state = "open"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._state = "closed"
        for scope in self._calls:
            scope.cancel()
        with anyio.move_on_after(CLOSING_TIME, shield=True):
            while self._calls:  # their connections are theirs until they have noticed
                await self._none_left.wait()
            await self._say_goodbye(list(self._leases))
        if self._owns_link:
            await self.link.__aexit__(*exc_info)  # noqa: ASYNC102 - shielded and bounded there

    async def publish(self, message: QueueMessage, topic: str) -> None:
        await self.ask(calls.PUBLISH, calls.PublishCall(topic, message), _NOTHING)

    async def broadcast(self, message: QueueMessage, topic: str) -> None:
        await self.ask(calls.BROADCAST, calls.PublishCall(topic, message), _NOTHING)

    @asynccontextmanager
    async def consumer(self, topic: str, group: str = "default") -> AsyncIterator[HttpConsumer]:
        async with self._hold(HttpConsumer(self, topic, group)) as consumer:
            yield consumer

    @asynccontextmanager
    async def subscribe(self, topic: str) -> AsyncIterator[HttpSubscription]:
        async with self._hold(HttpSubscription(self, topic)) as subscription:
            yield subscription

    def statistics(self) -> Mapping[str, Any]:
        """What waits is known by the server, not here: `topics` is empty. `requests` and `failed` are those of the link."""
        return {"topics": {}, "leases": len(self._leases), **self.link.statistics()}

    # For consumers and subscriptions

    async def ask(
        self,
        path: str,
        call: Any,
        answer: TypeAdapter[T],
        *,
        wait: float = 0.0,
        patience: float | None = None,
        at: str | None = None,
        on_answer: Callable[[str], None] | None = None,
    ) -> T:
        """Ask until there is an answer, for `patience` seconds at most. It ends when the queue is closed.

        Args:
            at: The server that holds the lease in question. Where there are others, it is not asked for long.
        """
        try:
            body = to_json(call, inf_nan_mode="null")
        except ValueError as error:  # a text with a lone surrogate, a value that is not JSON
            raise BadInput(f"the message cannot be sent as JSON: {error}") from error
        self.check_open()
        with anyio.CancelScope() as scope:
            self._calls.add(scope)
            try:
                once = partial(
                    self.link.ask,
                    "POST",
                    path,
                    answer.validate_json,
                    body=body,
                    wait=wait,
                    away=QueueUnavailable,
                    at=at,
                    on_answer=on_answer,
                )
                patience = self._patience if patience is None else patience
                if at is not None and len(self.link.urls) > 1:
                    patience = min(patience, MOVE_AFTER)
                return await self._repeat(path, once, patience)
            finally:
                self._calls.discard(scope)
                if not self._calls:
                    self._none_left.set()
                    self._none_left = anyio.Event()
        raise self._gone()

    async def _repeat(self, path: str, once: Callable[[], Awaitable[T]], patience: float) -> T:
        failures = 0
        give_up = math.inf
        while True:
            try:
                found = await once()
            except QueueUnavailable as error:
                failures += 1
                give_up = min(give_up, anyio.current_time() + patience)
                delay = self._backoff.delay(failures)
                if anyio.current_time() + delay > give_up:
                    raise
                logger.log(logging.WARNING if failures == 1 else logging.DEBUG, "asking %s again: %s", path, error)
                await anyio.sleep(delay)
            else:
                return found

    @asynccontextmanager
    async def _hold(self, leased: L) -> AsyncIterator[L]:
        self._leases[leased] = None
        try:
            await leased.open(self._patience)
            async with open_support_group() as support:
                support.start_soon(leased.keep_forever, name=f"lease on {leased.topic}")
                yield leased
        finally:
            del self._leases[leased]
            if self._state == "open":
                with anyio.move_on_after(CLOSING_TIME, shield=True):
                    await self._say_goodbye([leased])

    async def _say_goodbye(self, leases: list[_Leased]) -> None:
        """Tell the servers that leases are over, instead of letting them find out."""
        ends: dict[str, list[calls.SettleCall]] = {}
        for leased in leases:
            if (end := leased.end()) is not None:
                ends.setdefault(leased.server, []).append(end)
        async with anyio.create_task_group() as servers:
            for server, over in ends.items():
                servers.start_soon(self._close, calls.CloseCall(tuple(over)), server)

    async def _close(self, call: calls.CloseCall, server: str) -> None:
        try:
            await self.link.ask("POST", calls.CLOSE, _NOTHING.validate_json, body=to_json(call), at=server)
        except CorralError as error:
            logger.debug("the server will find out by itself that %d leases are over: %s", len(call.leases), error)

    def check_open(self) -> None:
        if self._state != "open":
            raise self._gone()

    def _gone(self) -> QueueUnavailable:
        return QueueUnavailable(
            f"The queue at {self.link.url} is {self._state}", hint="Use it inside its `async with` block."
        )


class _Leased(ABC):
    """A lease on the server, as its client sees it. `keep_forever` is its support task.

    `_lease` is None before it is opened, when the server has forgotten it, so that what was open came back there, and when
    it was given up because the server is away and there is another one.
    """

    def __init__(self, queue: HttpMessageQueue, topic: str) -> None:
        self.topic = topic
        self.server = ""
        self._queue = queue
        self._lease: calls.Lease | None = None
        self._seq = 1
        self._acked: list[int] = []
        self._nacked: list[int] = []
        self._abandoned: int | None = None
        self._news = anyio.Event()
        self._settling = anyio.Lock()
        self._receiving = anyio.Lock()
        self._polling = False
        self._left = False

    @abstractmethod
    async def open(self, patience: float) -> None:
        """Get a lease from the server."""

    async def keep_forever(self) -> None:
        """Settle what has gathered, in as few requests as it takes, and be heard of before the lease ends."""
        while True:
            with anyio.move_on_after((self._lease.seconds if self._lease else DEFAULT_LEASE) / 3):
                await self._news.wait()
            if self._acked or self._nacked or self._abandoned or not self._polling:
                try:
                    await self._settle()
                except QueueUnavailable:
                    return  # it is closed
                except UsageError as error:
                    # Whoever receives is told the same.
                    logger.error("the queue refuses to settle deliveries of %s: %s", self.topic, error)

    def end(self) -> calls.SettleCall | None:
        """Use the lease no more. What is to be said to the server at the end; None if it has nothing of ours."""
        self._left = True
        lease, self._lease = self._lease, None
        return None if lease is None else calls.SettleCall(lease.lease_id, tuple(self._acked), tuple(self._nacked))

    def _check_open(self) -> None:
        self._queue.check_open()
        if self._left:
            raise QueueUnavailable(f"The block that received from {self.topic!r} was left", topic=self.topic)

    async def _open(self, path: str, call: calls.OpenCall, patience: float) -> None:
        def on_answer(server: str) -> None:
            self.server = server

        self._lease = await self._queue.ask(path, call, _LEASE, patience=patience, on_answer=on_answer)
        self._seq = 1
        self._acked, self._nacked, self._abandoned = [], [], None

    async def _settle(self) -> None:
        """Tell the server what has gathered; returns when it has it, or has forgotten the lease."""
        async with self._settling:
            lease, self._news = self._lease, anyio.Event()
            if lease is None:
                return
            acked, nacked, abandoned = tuple(self._acked), tuple(self._nacked), self._abandoned
            call = calls.SettleCall(lease.lease_id, acked, nacked, abandoned)
            try:
                answer = await self._queue.ask(calls.SETTLE, call, _SETTLED, patience=math.inf, at=self.server)
            except QueueUnavailable as error:
                self._give_up(lease, error)
                return
            if self._lease is not lease:
                return
            if not answer.known:
                self._lease = None
            del self._acked[: len(acked)]
            del self._nacked[: len(nacked)]
            if self._abandoned == abandoned:
                self._abandoned = None

    async def _poll(self, lease: calls.Lease, max_messages: int) -> Sequence[calls.Received]:
        """Wait for messages for a while. None came, or the lease is lost."""
        call = calls.ReceiveCall(lease.lease_id, self._seq, max_messages, POLL)
        self._polling = True
        try:
            answer = await self._queue.ask(calls.RECEIVE, call, _RECEIVED, wait=POLL, patience=math.inf, at=self.server)
        except Conflict:  # another server process with a lease of that name: not ours
            answer = calls.ReceiveAnswer(known=False)
        except QueueUnavailable as error:
            self._give_up(lease, error)
            return ()
        finally:
            self._polling = False
        if answer.messages:
            self._seq += 1
        elif answer.draining and len(self._queue.link.urls) > 1:
            self._queue.link.avoid(self.server)
            self._give_up(lease, None)
        elif answer.draining:
            await anyio.sleep(DRAIN_PAUSE)
        elif not answer.known and self._lease is lease:
            self._lease = None
        return answer.messages

    def _give_up(self, lease: calls.Lease, error: QueueUnavailable | None) -> None:
        """Do without a lease whose server is away: another one gives a new lease.

        Raises:
            QueueUnavailable: the queue was closed.
        """
        self._queue.check_open()
        if self._lease is lease:
            self._lease = None
            logger.info("leaving %s for another control plane: %s", self.server, error or "it stops")


L = TypeVar("L", bound=_Leased)


class HttpDelivery(Delivery):
    """`ack` and `nack` return at once: the server is told with the next request of the consumer's support task."""

    def __init__(self, consumer: HttpConsumer, lease: calls.Lease, received: calls.Received) -> None:
        self.message = received.message
        self.redelivered = received.redelivered
        self.lease = lease
        self.number = received.number
        self._consumer = consumer
        self._settled = False

    async def ack(self) -> None:
        if not self._settled:
            self._settled = True
            self._consumer.settle_soon(self, ack=True)

    async def nack(self) -> None:
        if not self._settled:
            self._settled = True
            self._consumer.settle_soon(self, ack=False)


class HttpConsumer(_Leased, Consumer):
    """Made by `HttpMessageQueue.consumer`. `receive` waits as long as it takes while the server is away."""

    def __init__(self, queue: HttpMessageQueue, topic: str, group: str) -> None:
        super().__init__(queue, topic)
        self._group = group

    async def open(self, patience: float) -> None:
        call = calls.OpenCall(self.topic, self._group, self._queue.lease)
        await self._open(calls.CONSUME, call, patience)

    async def receive(self, max_messages: int = 1) -> list[Delivery]:
        if max_messages < 1:
            raise ValueError(f"max_messages must be at least 1, got {max_messages}")
        async with self._receiving:
            while True:
                self._check_open()
                if self._abandoned is not None:
                    await self._settle()
                if self._lease is None:
                    await self.open(math.inf)
                lease = self._lease
                assert lease is not None
                try:
                    received = await self._poll(lease, max_messages)
                except anyio.get_cancelled_exc_class():
                    # The server may have answered: what it gave goes back.
                    self._abandoned = self._seq
                    self._seq += 1
                    self._news.set()
                    raise
                if received:
                    return [HttpDelivery(self, lease, each) for each in received]

    def settle_soon(self, delivery: HttpDelivery, *, ack: bool) -> None:
        if delivery.lease is self._lease:
            (self._acked if ack else self._nacked).append(delivery.number)
            self._news.set()


class HttpSubscription(_Leased, Subscription):
    """Made by `HttpMessageQueue.subscribe`."""

    def __init__(self, queue: HttpMessageQueue, topic: str) -> None:
        super().__init__(queue, topic)
        self._heard: deque[QueueMessage] = deque()

    async def open(self, patience: float) -> None:
        await self._open(calls.SUBSCRIBE, calls.OpenCall(self.topic, lease=self._queue.lease), patience)

    async def receive(self) -> QueueMessage:
        async with self._receiving:
            while not self._heard:
                self._check_open()
                if self._lease is None:
                    raise QueueUnavailable(
                        f"The server has forgotten the subscription to {self.topic!r}",
                        hint="Subscribe again, then look at the state: messages may have been missed.",
                        topic=self.topic,
                    )
                received = await self._poll(self._lease, BROADCASTS_AT_ONCE)
                self._heard.extend(each.message for each in received)
            return self._heard.popleft()

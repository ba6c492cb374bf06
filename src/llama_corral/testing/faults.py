"""A message queue whose links a test breaks by name. Nothing happens by chance: tests say what, where and how often."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, Final, Literal, Self, TypeVar

import anyio
from anyio.lowlevel import checkpoint

from ..abc import Consumer, Delivery, MessageQueue, Subscription
from ..exceptions import QueueUnavailable
from ..protocol.messages import QueueMessage

T = TypeVar("T")

Operation = Literal["publish", "broadcast", "consumer", "subscribe", "receive", "hear", "ack", "nack"]
"""Where a fault can strike. `receive` is a consumer's, `hear` a subscription's."""


class FaultKind(StrEnum):
    DROP = "drop"
    DUPLICATE = "duplicate"
    DELAY = "delay"
    REFUSE = "refuse"
    LOSE_ANSWER = "lose_answer"


@dataclass(eq=False, slots=True)
class Fault:
    """A planned fault. `applied` counts how often it struck; `stop()` ends it."""

    kind: FaultKind
    operation: Operation
    topic: str | None
    times: float
    applied: int = 0

    def matches(self, operation: Operation, topic: str) -> bool:
        return self.operation == operation and self.topic in (None, topic) and self.applied < self.times

    def stop(self) -> None:
        self.times = 0


@dataclass(eq=False, slots=True)
class Hang:
    """An operation that does not return: `await hang.reached.wait()` until somebody is caught in it."""

    operation: Operation
    topic: str | None
    reached: anyio.Event = field(default_factory=anyio.Event)
    released: anyio.Event = field(default_factory=anyio.Event)


_SETTLING: Final = frozenset({"publish", "broadcast", "ack", "nack"})
_TRANSFORMS: Final = {
    FaultKind.DROP: _SETTLING,
    FaultKind.DUPLICATE: _SETTLING,
    FaultKind.DELAY: frozenset({"publish", "broadcast"}),
}

Held = tuple[Literal["publish", "broadcast"], QueueMessage, str]


class FaultyMessageQueue(MessageQueue):
    """Wraps a queue and passes everything on until a test plans a fault.

        queue = FaultyMessageQueue(MemoryMessageQueue())
        queue.drop("publish", times=2)              # the next two are taken and lost
        queue.duplicate("publish", topic="t")       # the next one of this topic arrives twice
        queue.lose_answer("publish")                # the next one arrives, and its publisher is told that it did not
        queue.refuse("ack")                         # the next ack raises and has no effect
        queue.delay("publish", times=3); ...; await queue.release(order="reversed")
        with queue.hang("receive") as hang: await hang.reached.wait(); ...
        await queue.disconnect(); ...; queue.reconnect()

    Faults are tried in the order in which they were planned; the first that matches strikes. `topic=None` means any.
    """

    def __init__(self, inner: MessageQueue) -> None:
        self.inner = inner
        self.durable = inner.durable
        self.connected = True
        self.held: list[Held] = []
        self._faults: list[Fault] = []
        self._hangs: list[Hang] = []
        self._in_flight: set[anyio.CancelScope] = set()
        self._consumers: set[_FaultyConsumer] = set()
        self._generation = 0  # of the connection; what was opened under an earlier one is broken for good

    async def __aenter__(self) -> Self:
        await self.inner.__aenter__()
        return self

    def __aexit__(self, *exc_info: object) -> Coroutine[Any, Any, None]:
        return self.inner.__aexit__(*exc_info)

    # What a test plans

    def drop(self, operation: Operation = "publish", *, topic: str | None = None, times: float = 1) -> Fault:
        """Taken and lost without an error."""
        return self._plan(FaultKind.DROP, operation, topic, times)

    def duplicate(self, operation: Operation = "publish", *, topic: str | None = None, times: float = 1) -> Fault:
        """Done twice."""
        return self._plan(FaultKind.DUPLICATE, operation, topic, times)

    def refuse(self, operation: Operation = "publish", *, topic: str | None = None, times: float = 1) -> Fault:
        """Not done; raises QueueUnavailable."""
        return self._plan(FaultKind.REFUSE, operation, topic, times)

    def lose_answer(self, operation: Operation = "publish", *, topic: str | None = None, times: float = 1) -> Fault:
        """Done; raises QueueUnavailable all the same."""
        return self._plan(FaultKind.LOSE_ANSWER, operation, topic, times)

    def delay(
        self,
        operation: Literal["publish", "broadcast"] = "publish",
        *,
        topic: str | None = None,
        times: float = float("inf"),
    ) -> Fault:
        """Kept in `held` until `release`; the publisher sees a success."""
        return self._plan(FaultKind.DELAY, operation, topic, times)

    async def release(self, *, order: Literal["kept", "reversed"] | int = "kept", count: int | None = None) -> int:
        """Let delayed messages go: the `count` oldest (None: all), as they were kept, reversed, or shuffled with the
        seed that `order` is then. Answers how many went. The faults that delayed them stay until they are stopped."""
        going, self.held = self.held[:count], ([] if count is None else self.held[count:])
        if order == "reversed":
            going.reverse()
        elif isinstance(order, int):
            random.Random(order).shuffle(going)
        for operation, message, topic in going:
            await (self.inner.publish if operation == "publish" else self.inner.broadcast)(message, topic)
        return len(going)

    @contextmanager
    def hang(self, operation: Operation, *, topic: str | None = None) -> Iterator[Hang]:
        """Within the block the operation does not begin and does not return; those caught in it go on afterwards."""
        hang = Hang(operation, topic)
        self._hangs.append(hang)
        try:
            yield hang
        finally:
            self._hangs.remove(hang)
            hang.released.set()

    async def disconnect(self) -> None:
        """Cut the connection: what is under way raises QueueUnavailable, and so does everything until `reconnect`. Open
        deliveries go back to the broker. Consumers and subscriptions stay broken and must be opened again."""
        self.connected = False
        self._generation += 1
        for scope in tuple(self._in_flight):
            scope.cancel()
        for consumer in tuple(self._consumers):
            await consumer.give_back()

    def reconnect(self) -> None:
        """Calls work again; consumers and subscriptions from before do not."""
        self.connected = True

    # The seam

    async def publish(self, message: QueueMessage, topic: str) -> None:
        await self._send("publish", self.inner.publish, message, topic)

    async def broadcast(self, message: QueueMessage, topic: str) -> None:
        await self._send("broadcast", self.inner.broadcast, message, topic)

    @asynccontextmanager
    async def consumer(self, topic: str, group: str = "default") -> AsyncIterator[Consumer]:
        await self.run("consumer", topic, _nothing)
        async with self.inner.consumer(topic, group) as inner:
            consumer = _FaultyConsumer(self, inner, topic)
            self._consumers.add(consumer)
            try:
                yield consumer
            finally:
                self._consumers.remove(consumer)

    @asynccontextmanager
    async def subscribe(self, topic: str) -> AsyncIterator[Subscription]:
        await self.run("subscribe", topic, _nothing)
        async with self.inner.subscribe(topic) as inner:
            yield _FaultySubscription(self, inner, topic)

    def statistics(self) -> Mapping[str, Any]:
        """Those of the wrapped queue, and under `faults` how often each kind struck."""
        faults: dict[str, int] = {}
        for fault in self._faults:
            faults[fault.kind.value] = faults.get(fault.kind.value, 0) + fault.applied
        return {**self.inner.statistics(), "faults": faults, "held": len(self.held)}

    # How faults strike

    def _plan(self, kind: FaultKind, operation: Operation, topic: str | None, times: float) -> Fault:
        if kind in _TRANSFORMS and operation not in _TRANSFORMS[kind]:
            raise ValueError(f"{kind.value} means nothing for {operation}")
        fault = Fault(kind, operation, topic, times)
        self._faults.append(fault)
        return fault

    def _strike(self, operation: Operation, topic: str) -> FaultKind | None:
        fault = next((each for each in self._faults if each.matches(operation, topic)), None)
        if fault is None:
            return None
        fault.applied += 1
        return fault.kind

    async def _send(
        self,
        operation: Literal["publish", "broadcast"],
        send: Callable[[QueueMessage, str], Awaitable[None]],
        message: QueueMessage,
        topic: str,
    ) -> None:
        async def once() -> None:
            await send(message, topic)

        def hold() -> None:
            self.held.append((operation, message, topic))

        await self.run(operation, topic, once, hold=hold)

    async def run(
        self,
        operation: Operation,
        topic: str,
        act: Callable[[], Awaitable[T]],
        *,
        hold: Callable[[], None] | None = None,
        generation: int | None = None,
    ) -> T | None:
        """Do something over the link, with whatever is planned for it. None: it was dropped or is held."""
        self._check(self._generation if generation is None else generation)
        with anyio.CancelScope() as link:
            self._in_flight.add(link)
            try:
                await self._hang_at(operation, topic)
                kind = self._strike(operation, topic)
                if kind is FaultKind.REFUSE:
                    raise QueueUnavailable(f"Refused by a planned fault: {operation} on {topic!r}")
                if kind is FaultKind.DROP or kind is FaultKind.DELAY:
                    await checkpoint()
                    if kind is FaultKind.DELAY and hold is not None:
                        hold()
                    return None
                result = await act()
                if kind is FaultKind.DUPLICATE:
                    await act()
                if kind is FaultKind.LOSE_ANSWER:
                    raise QueueUnavailable(f"The answer was lost by a planned fault: {operation} on {topic!r}")
                return result
            finally:
                self._in_flight.remove(link)
        raise QueueUnavailable(f"The connection was cut during {operation} on {topic!r}")

    async def _hang_at(self, operation: Operation, topic: str) -> None:
        for hang in tuple(self._hangs):
            if hang.operation == operation and hang.topic in (None, topic):
                hang.reached.set()
                await hang.released.wait()

    def _check(self, generation: int) -> None:
        if not self.connected or generation != self._generation:
            raise QueueUnavailable("The connection is cut by a planned fault")

    @property
    def generation(self) -> int:
        return self._generation


class _FaultyConsumer(Consumer):
    def __init__(self, queue: FaultyMessageQueue, inner: Consumer, topic: str) -> None:
        self.queue = queue
        self.topic = topic
        self.generation = queue.generation
        self.open: dict[_FaultyDelivery, None] = {}
        self._inner = inner

    async def receive(self, max_messages: int = 1) -> list[Delivery]:
        receive = partial(self._inner.receive, max_messages)
        taken = await self.queue.run("receive", self.topic, receive, generation=self.generation)
        deliveries = [_FaultyDelivery(self, delivery) for delivery in taken or ()]
        self.open.update(dict.fromkeys(deliveries))
        return list(deliveries)

    async def give_back(self) -> None:
        for delivery in tuple(self.open):
            await delivery.inner.nack()
        self.open.clear()


class _FaultyDelivery(Delivery):
    def __init__(self, consumer: _FaultyConsumer, inner: Delivery) -> None:
        self.message = inner.message
        self.redelivered = inner.redelivered
        self.inner = inner
        self._consumer = consumer

    async def ack(self) -> None:
        await self._settle("ack", self.inner.ack)

    async def nack(self) -> None:
        await self._settle("nack", self.inner.nack)

    async def _settle(self, operation: Literal["ack", "nack"], act: Callable[[], Awaitable[None]]) -> None:
        async def settle() -> None:
            await act()
            self._consumer.open.pop(self, None)

        await self._consumer.queue.run(operation, self._consumer.topic, settle, generation=self._consumer.generation)


class _FaultySubscription(Subscription):
    def __init__(self, queue: FaultyMessageQueue, inner: Subscription, topic: str) -> None:
        self._queue = queue
        self._inner = inner
        self._topic = topic
        self._generation = queue.generation

    async def receive(self) -> QueueMessage:
        message = await self._queue.run("hear", self._topic, self._inner.receive, generation=self._generation)
        assert message is not None  # nothing can be dropped or held here
        return message


async def _nothing() -> None:
    await checkpoint()

"""What carries messages in `benchmarks.messages`: a queue of this project, and the client of its broker alone.

A client alone publishes with a confirmation, gives each message to one of the consumers and acknowledges it. That is the
least that any adapter costs: it knows no topics, leases, reconnects, dead letters or broadcasts.
"""

from __future__ import annotations

import itertools
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import anyio

Ack = Callable[[], Awaitable[Any]]
Receive = Callable[[int], Awaitable[Sequence[tuple[int, Ack]]]]
"""Waits for messages and returns up to so many, each as its number and what acknowledges it."""

HOSTED = ("nats", "rabbitmq")
"""Clients that need asyncio: on Trio only the adapter runs, in an asyncio loop that Trio hosts."""


class Carrier(ABC):
    """Entered once; `publish` from several tasks, a consumer for each task that receives."""

    @abstractmethod
    async def publish(self, number: int) -> None:
        """Returns when the other side has it."""

    @abstractmethod
    def consumer(self) -> AbstractAsyncContextManager[Receive]:
        """One of the competing consumers."""


def open_carrier(kind: str, *, floor: bool, url: str, name: str, messages: int) -> AbstractAsyncContextManager[Carrier]:
    """The adapter of `kind`, with a topic in the namespace `name`, or the client alone, which calls what it makes `name`."""
    if not floor:
        return _adapter(url, name)
    if kind == "memory":
        return _memory(messages)
    return {"http": _http, "redis": _redis, "nats": _nats, "rabbitmq": _rabbitmq}[kind](url, name)


async def _nothing() -> None:
    pass


# This project


class _Adapter(Carrier):
    def __init__(self, queue: Any, topic: str) -> None:
        self._queue, self._topic = queue, topic

    async def publish(self, number: int) -> None:
        await self._queue.publish(_message(number), self._topic)

    @asynccontextmanager
    async def consumer(self) -> AsyncIterator[Receive]:
        async with self._queue.consumer(self._topic) as consumer:

            async def receive(most: int) -> list[tuple[int, Ack]]:
                return [(one.message.data["number"], one.ack) for one in await consumer.receive(most)]

            yield receive


@asynccontextmanager
async def _adapter(url: str, name: str) -> AsyncIterator[Carrier]:
    from llama_corral.queues import open_queue

    async with open_queue(url, namespace=name) as queue:
        yield _Adapter(queue, f"{name}.bench")


def _message(number: int) -> Any:
    """As large as a ticket."""
    from llama_corral.protocol.messages import ActionTypes, QueueMessage

    data = {"task_id": str(uuid.UUID(int=number)), "number": number}
    return QueueMessage(type="bench", action=ActionTypes.NEW_TASK, data=data)


# Clients alone. A body is as long as a message of ours, and begins with its number.


def _sizes() -> int:
    return len(_message(0).model_dump_json())


def _body(number: int, size: int) -> bytes:
    return f"{number} ".encode().ljust(size, b".")


def _number(body: bytes) -> int:
    return int(body.partition(b" ")[0])


class _Floor(Carrier):
    """Made of two functions."""

    def __init__(
        self, publish: Callable[[bytes], Awaitable[Any]], consumer: Callable[[], AbstractAsyncContextManager[Receive]]
    ) -> None:
        self._publish, self._consumer, self._size = publish, consumer, _sizes()

    async def publish(self, number: int) -> None:
        await self._publish(_body(number, self._size))

    def consumer(self) -> AbstractAsyncContextManager[Receive]:
        return self._consumer()


@asynccontextmanager
async def _memory(messages: int) -> AsyncIterator[Carrier]:
    """A memory object stream of AnyIO."""
    send, take = anyio.create_memory_object_stream[bytes](messages)

    @asynccontextmanager
    async def consumer() -> AsyncIterator[Receive]:
        async def receive(_most: int) -> list[tuple[int, Ack]]:
            return [(_number(await take.receive()), _nothing)]

        yield receive

    with send, take:
        yield _Floor(send.send, consumer)


@asynccontextmanager
async def _http(url: str, name: str) -> AsyncIterator[Carrier]:
    """One POST a message to the cheapest route that takes one, and nothing else: there is no client of others."""
    import httpx

    send, take = anyio.create_memory_object_stream[bytes](1_000_000)

    @asynccontextmanager
    async def consumer() -> AsyncIterator[Receive]:
        async def receive(_most: int) -> list[tuple[int, Ack]]:
            return [(_number(await take.receive()), _nothing)]

        yield receive

    async with httpx.AsyncClient(base_url=url) as client:

        async def publish(body: bytes) -> None:
            (await client.post(f"/topics/{name}")).raise_for_status()
            send.send_nowait(body)

        with send, take:
            yield _Floor(publish, consumer)


@asynccontextmanager
async def _redis(url: str, name: str) -> AsyncIterator[Carrier]:
    """XADD, XREADGROUP, XACK."""
    import coredis

    names = itertools.count()
    client: coredis.Redis[bytes] = coredis.Redis.from_url(url)
    async with client:
        await client.xgroup_create(name, "group", identifier="0", mkstream=True)

        async def publish(body: bytes) -> None:
            await client.xadd(name, {"body": body})

        @asynccontextmanager
        async def consumer() -> AsyncIterator[Receive]:
            own = f"consumer {next(names)}"

            async def receive(most: int) -> list[tuple[int, Ack]]:
                found = None
                while not found:
                    found = await client.xreadgroup("group", own, {name: ">"}, count=most, block=5_000)
                return [
                    (_number(entry.field_values[b"body"]), acked(entry.identifier))
                    for entries in found.values()
                    for entry in entries
                ]

            yield receive

        def acked(identifier: bytes) -> Ack:
            async def ack() -> None:
                await client.xack(name, "group", [identifier])

            return ack

        try:
            yield _Floor(publish, consumer)
        finally:
            with anyio.move_on_after(5, shield=True):
                await client.delete([name])


@asynccontextmanager
async def _nats(url: str, name: str) -> AsyncIterator[Carrier]:
    """A work-queue stream in a file, with a consumer to which the server pushes. (`fetch` of a pull consumer may keep a
    message for as long as it waits for the rest of a batch.)"""
    import nats
    from nats.js.api import RetentionPolicy

    connection = await nats.connect(url)
    stream = connection.jetstream()
    await stream.add_stream(name=name, subjects=[name], retention=RetentionPolicy.WORK_QUEUE)

    async def publish(body: bytes) -> None:
        await stream.publish(name, body)

    @asynccontextmanager
    async def consumer() -> AsyncIterator[Receive]:
        subscription = await stream.subscribe(name, queue="group", manual_ack=True)

        async def receive(_most: int) -> list[tuple[int, Ack]]:
            one = await subscription.next_msg(timeout=None)
            return [(_number(one.data), one.ack)]

        yield receive

    try:
        yield _Floor(publish, consumer)
    finally:
        with anyio.move_on_after(5, shield=True):
            await stream.delete_stream(name)
            await connection.close()


@asynccontextmanager
async def _rabbitmq(url: str, name: str) -> AsyncIterator[Carrier]:
    """A quorum queue, mandatory publishing with confirms, eight messages in hand."""
    import aio_pika

    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(await aio_pika.connect(url))
        publishing = await connection.channel(publisher_confirms=True)
        queue = await publishing.declare_queue(name, durable=True, arguments={"x-queue-type": "quorum"})

        async def publish(body: bytes) -> None:
            message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
            await publishing.default_exchange.publish(message, name, mandatory=True)

        @asynccontextmanager
        async def consumer() -> AsyncIterator[Receive]:
            channel = await connection.channel()
            await channel.set_qos(prefetch_count=8)
            send, take = anyio.create_memory_object_stream[Any](8)
            own = await channel.get_queue(name)
            tag = await own.consume(send.send)

            async def receive(most: int) -> list[tuple[int, Ack]]:
                got = [await take.receive()]
                while len(got) < most:
                    try:
                        got.append(take.receive_nowait())
                    except anyio.WouldBlock:
                        break
                return [(_number(one.body), one.ack) for one in got]

            try:
                with send, take:
                    yield receive
            finally:
                with anyio.move_on_after(5, shield=True):
                    await own.cancel(tag)
                    await channel.close()

        try:
            yield _Floor(publish, consumer)
        finally:
            with anyio.move_on_after(5, shield=True):
                await queue.delete(if_unused=False, if_empty=False)

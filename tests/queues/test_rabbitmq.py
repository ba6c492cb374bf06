"""The queue in RabbitMQ: the contract of every broker, against real servers, and what it promises beyond that."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import aio_pika
import anyio
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from llama_corral.abc import MessageQueue
from llama_corral.aio.client import open_asyncio_side
from llama_corral.queues import open_queue
from llama_corral.queues.rabbitmq_topology import TICKETS, queue_name, topic_key
from llama_corral.testing.brokers import BrokerContract
from llama_corral.testing.servers import RabbitMQServer

from .servers import own_server, shared_url

pytestmark = pytest.mark.anyio

VARIABLE = "CORRAL_TEST_RABBITMQ_URL"


class Node:
    """A node for all tests that break one: it takes seconds to boot. It lives in an event loop of its own, from the first
    test on that needs it."""

    def __init__(self, portal: BlockingPortal, stack: contextlib.ExitStack) -> None:
        self._portal = portal
        self._stack = stack
        self._server: RabbitMQServer | None = None

    @property
    def server(self) -> RabbitMQServer:
        assert self._server is not None
        return self._server

    @property
    def url(self) -> str:
        return self.server.url

    async def ensure(self) -> None:
        """Running, and ready."""
        if self._server is None:
            await anyio.to_thread.run_sync(self._make)
        elif not self._server.running:
            await self.start()

    async def start(self) -> None:
        await self._call(self.server.start)

    async def restart(self) -> None:
        await self._call(self.server.restart)

    def kill(self) -> None:
        self.server.kill()

    async def wait_exit(self) -> int:
        return int(await self._call(self.server.wait_exit))

    async def _call(self, fn: Callable[[], Awaitable[Any]]) -> Any:
        return await anyio.to_thread.run_sync(self._portal.call, fn)

    def _make(self) -> None:
        context = own_server(RabbitMQServer, VARIABLE)
        self._server = self._stack.enter_context(self._portal.wrap_async_context_manager(context))


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with start_blocking_portal("trio") as portal, contextlib.ExitStack() as stack:
        yield Node(portal, stack)


@pytest.fixture
def url() -> str:
    return shared_url("RabbitMQ", VARIABLE, "amqp://guest:guest@127.0.0.1:5672/")


@asynccontextmanager
async def client(url: str) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """aio-pika, as another program would use it: `await do(function of a channel)`."""
    async with open_asyncio_side("raw") as side:
        connection = await side.call(partial(aio_pika.connect, url))

        async def use(fn: Callable[[Any], Awaitable[Any]]) -> Any:
            async with connection.channel() as channel:
                return await fn(channel)

        try:
            yield partial(side.call, use)
        finally:
            await side.call(connection.close)  # noqa: ASYNC102 - of a server that is there


@pytest.mark.promise("P2", "P6", "P8", "P12")
class TestContract(BrokerContract):
    @pytest.fixture(autouse=True)
    async def _use(self, url: str, node: Node) -> AsyncIterator[None]:
        self.url = url
        self.node = node
        self.queues: list[str] = []
        self.topics: list[str] = []
        yield
        async with client(url) as do:
            for name in self.queues:
                await do(partial(_delete, name))

    def topic(self, name: str = "numbered") -> str:
        topic = super().topic(name)
        dead = f"{topic.removesuffix('.numbered')}.dead_letter"
        self.queues += [
            queue_name(each, group) for each in (topic, dead) for group in ("default", "a", "b", "stays", "leaves")
        ]
        self.topics.append(topic)
        return topic

    def make_queue(self, url: str) -> MessageQueue:
        return open_queue(url) if url == self.url else self._make_settled(url)  # type: ignore[return-value]

    @asynccontextmanager
    async def _make_settled(self, url: str) -> AsyncIterator[MessageQueue]:
        """A queue on the node that is killed. RabbitMQ writes down which quorum queues it has when nothing has changed for
        half a second; killed before, it never finds a leader for those that are missing there."""
        async with open_queue(f"{url}?patience=3") as queue:
            for topic in self.topics:
                async with queue.consumer(topic):
                    pass
            await anyio.sleep(1)
            yield queue

    @asynccontextmanager
    async def open_server(self) -> AsyncIterator[Node]:
        await self.node.ensure()
        yield self.node

    async def publish_raw(self, topic: str, body: bytes) -> bool:
        async def publish(channel: Any) -> None:
            exchange = await channel.get_exchange(TICKETS, ensure=False)
            await exchange.publish(aio_pika.Message(body), topic_key(topic))

        async with client(self.url) as do:
            await do(publish)
        return True


async def _delete(name: str, channel: Any) -> None:
    await channel.queue_delete(name)

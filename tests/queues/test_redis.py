"""The queue in Redis: the contract of every broker, against real servers, and what it promises beyond that."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio
import pytest

from llama_corral.abc import MessageQueue
from llama_corral.queues import open_queue
from llama_corral.queues.redis_connection import Connection, RedisAddress, run_connection
from llama_corral.queues.redis_scripts import FIELD, Keys, prefix_of
from llama_corral.testing.brokers import BrokerContract
from llama_corral.testing.servers import RedisServer

from .servers import own_server, shared_url

pytestmark = pytest.mark.anyio

VARIABLE = "CORRAL_TEST_REDIS_URL"


def redis_server(**options: Any) -> AbstractAsyncContextManager[RedisServer]:
    return own_server(RedisServer, VARIABLE, **options)


@asynccontextmanager
async def connect(url: str) -> AsyncIterator[Connection]:
    """A connection past the adapter."""
    async with anyio.create_task_group() as tasks:
        yield await tasks.start(run_connection, RedisAddress.from_url(url))
        tasks.cancel_scope.cancel()


@pytest.fixture
async def url(anyio_backend: str) -> str:
    return shared_url("Redis", VARIABLE, "redis://127.0.0.1:6379")


@pytest.mark.promise("P2", "P6", "P8", "P12")
class TestContract(BrokerContract):
    @pytest.fixture(autouse=True)
    async def _use(self, url: str) -> AsyncIterator[None]:
        self.url = f"{url}?lease=2"
        self.topics: list[str] = []
        yield
        async with connect(url) as connection:
            for topic in self.topics:
                for key in await connection.create_request(b"KEYS", prefix_of(topic) + b"*"):
                    await connection.create_request(b"DEL", key)

    def topic(self, name: str = "numbered") -> str:
        topic = super().topic(name)
        self.topics += [topic, f"{topic.removesuffix('.numbered')}.dead_letter"]
        return topic

    def make_queue(self, url: str) -> MessageQueue:
        return open_queue(url if "lease" in url else f"{url}?lease=2")

    def open_server(self) -> AbstractAsyncContextManager[RedisServer]:
        return redis_server()

    async def publish_raw(self, topic: str, body: bytes) -> bool:
        async with connect(self.url.partition("?")[0]) as connection:
            await connection.create_request(b"XADD", Keys.of(topic, "default").fresh, b"*", FIELD, body)
        return True

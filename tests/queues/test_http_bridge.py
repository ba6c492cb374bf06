"""The queue over HTTP where the server itself has a broker: the contract of every queue, and what the original's clients
get.

What of it depends on the client's backend is tested in test_http.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import pytest

from llama_corral.abc import MessageQueue
from llama_corral.queues import open_queue
from llama_corral.queues.http import HttpMessageQueue
from llama_corral.testing.queues import MessageQueueContract, numbered
from llama_corral.testing.servers import RedisServer

from ..threaded import Threaded, open_core
from .servers import own_server

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "trio"


@pytest.fixture
async def core(anyio_backend: str) -> AsyncIterator[Threaded]:
    async with own_server(RedisServer, "CORRAL_TEST_REDIS_URL") as server:
        async with open_core(queue=open_queue(server.url), queue_url=server.url, count=2) as core:
            yield core


@pytest.mark.promise("P2", "P6", "P8", "P12")
class TestContract(MessageQueueContract):
    """Each queue has a control plane of its own, so that what one publishes is received through the other."""

    quiet = 0.2
    core: Threaded
    opened = 0

    @pytest.fixture(autouse=True)
    def _use(self, core: Threaded) -> None:
        self.core = core

    @asynccontextmanager
    async def open_queue(self) -> AsyncIterator[MessageQueue]:
        self.opened += 1
        async with HttpMessageQueue(self.core.urls[self.opened % 2]) as queue:
            yield queue

    def open_peer(self, queue: MessageQueue) -> Any:
        return self.open_queue()


async def test_the_routes_of_the_original_at_either_of_them(core: Threaded) -> None:
    message = numbered(1).model_dump(mode="json")
    async with httpx.AsyncClient() as client:
        one, other = core.urls
        assert (await client.post(f"{one}/topics/news")).status_code == 200
        assert (await client.post(f"{other}/messages/news", json=message)).status_code == 200
        assert (await client.get(f"{one}/messages/news")).json() == message
        assert (await client.get(f"{other}/messages/news")).json() is None
        assert (await client.post(f"{one}/messages/{'x' * 300}", json=message)).status_code == 422
        config = (await client.get(f"{other}/queue_config")).json()
        assert list(config) == ["SimpleMessageQueueConfig", "RedisMessageQueueConfig"]
        assert config["SimpleMessageQueueConfig"]["port"] == core.ones[1].port


@pytest.mark.promise("P2")
async def test_what_one_held_comes_back_when_it_is_gone(core: Threaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_corral.queues.http.MOVE_AFTER", 0.2)
    async with HttpMessageQueue(core.urls) as queue, queue.consumer("t") as consumer:
        await queue.publish(numbered(1), "t")
        (delivery,) = await consumer.receive()
        await core.ones[0].kill()
        with anyio.fail_after(20):
            (again,) = await consumer.receive()
        assert again.message == delivery.message
        await again.ack()

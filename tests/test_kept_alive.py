"""One connection for many requests: what asks often does not connect often."""

from __future__ import annotations

import anyio
import pytest

from llama_corral.client import Client
from llama_corral.protocol.messages import QueueMessage
from llama_corral.queues.http import HttpMessageQueue
from llama_corral.web import connections

from .threaded import open_core

pytestmark = pytest.mark.anyio


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The connections that servers of this process accepted."""
    found: list[object] = []

    class Counted(connections.Connection):
        async def run(self) -> None:
            found.append(self)
            await super().run()

    monkeypatch.setattr(connections, "Connection", Counted)
    return found


async def test_the_client(opened: list[object]) -> None:
    async with open_core() as core, Client(core.url) as client:
        for number in range(20):
            await client.sessions.create(f"s{number}")
        assert len(opened) == 1


async def test_the_queue(opened: list[object]) -> None:
    with anyio.fail_after(20):
        async with open_core() as core, HttpMessageQueue(core.url) as queue, queue.consumer("t") as consumer:
            for _ in range(20):
                await queue.publish(QueueMessage(), "t")
                for delivery in await consumer.receive():
                    await delivery.ack()
            assert len(opened) <= 4

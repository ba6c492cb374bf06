"""The queue over HTTP: the contract of every queue, against a real server, and what it promises beyond that."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from llama_corral.abc import MessageQueue
from llama_corral.queues.http import HttpMessageQueue
from llama_corral.testing.queues import MessageQueueContract

from ..threaded import Threaded, open_core

pytestmark = pytest.mark.anyio


@pytest.fixture
async def core(anyio_backend: str) -> AsyncIterator[Threaded]:
    async with open_core(token="secret") as core:
        yield core


@pytest.mark.promise("P2", "P6", "P8", "P12")
class TestContract(MessageQueueContract):
    quiet = 0.15
    core: Threaded

    @pytest.fixture(autouse=True)
    def _use(self, core: Threaded) -> None:
        self.core = core

    @asynccontextmanager
    async def open_queue(self) -> AsyncIterator[MessageQueue]:
        async with HttpMessageQueue(self.core.url, token="secret") as queue:
            yield queue

    def open_peer(self, queue: MessageQueue):
        return self.open_queue()

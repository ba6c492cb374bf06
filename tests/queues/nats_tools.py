"""What the tests of the queue in NATS have in common."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from urllib.parse import urlencode

import anyio
from nats.aio.client import Client

from llama_corral.abc import Consumer
from llama_corral.aio.client import AsyncioSide, open_asyncio_side
from llama_corral.protocol.messages import QueueMessage
from llama_corral.queues.nats import NatsMessageQueue
from llama_corral.testing.servers import NatsServer

from .servers import own_server, shared_url

VARIABLE = "CORRAL_TEST_NATS_URL"


def shared() -> str:
    """The URL of the server that all tests share."""
    return shared_url("NATS", VARIABLE, "nats://127.0.0.1:4222")


def nats_server(**options: Any) -> AbstractAsyncContextManager[NatsServer]:
    return own_server(NatsServer, VARIABLE, **options)


class RawClient:
    """nats-py, as another program would use it."""

    def __init__(self, side: AsyncioSide) -> None:
        self.side = side
        self.client = Client()

    async def call(self, subject: str, body: bytes = b"", headers: dict[str, str] | None = None) -> dict[str, Any]:
        """What JetStream answers."""

        async def request() -> bytes:
            return (await self.client.request(subject, body, timeout=5, headers=headers)).data

        found: dict[str, Any] = json.loads(await self.side.call(request))
        return found


@asynccontextmanager
async def client(url: str) -> AsyncIterator[RawClient]:
    async with open_asyncio_side("raw") as side:
        raw = RawClient(side)

        async def connect() -> None:
            await raw.client.connect(url)

        await side.call(connect)
        try:
            yield raw
        finally:
            await side.call(raw.client.close)  # noqa: ASYNC102 -- of a server that is there


def nats_queue(url: str, **options: Any) -> NatsMessageQueue:
    return NatsMessageQueue.from_url(f"{url}?{urlencode({'lease': 2, 'patience': 3, **options})}")


def numbered(number: int) -> QueueMessage:
    return QueueMessage(data={"number": number})


async def take(consumer: Consumer, count: int, seconds: float = 5) -> list[int]:
    got: list[int] = []
    with anyio.fail_after(seconds):
        while len(got) < count:
            for delivery in await consumer.receive(count - len(got)):
                got.append(delivery.message.data["number"])
                await delivery.ack()
    return got


async def take_nothing(consumer: Consumer, seconds: float = 0.2) -> None:
    with anyio.move_on_after(seconds):
        raise AssertionError(await consumer.receive())


def shown(error: BaseException) -> str:
    """All that a log or an answer may show of an error and what caused it."""
    own = f"{error!r} {error} {getattr(error, 'hint', '')} {getattr(error, 'fields', '')}"
    return own if error.__cause__ is None else f"{own} {shown(error.__cause__)}"

"""Queues in a NATS server: what every broker must do, and what is peculiar to this one."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import pytest
from nats.aio.client import Client

from llama_corral.aio.client import AsyncioSide, open_asyncio_side
from llama_corral.queues.nats_stream import token_of
from llama_corral.supervision import open_support_group
from llama_corral.testing.brokers import BrokerContract
from llama_corral.testing.servers import NatsServer, ServerMissingError

URL = os.environ.get("CORRAL_TEST_NATS_URL", "nats://127.0.0.1:4222")


def _needs_nats() -> None:
    parts = urlsplit(URL)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 4222), timeout=2).close()
    except OSError:
        pytest.skip(f"no NATS at {parts.hostname}:{parts.port}: set CORRAL_TEST_NATS_URL")


@asynccontextmanager
async def open_server(**options: object) -> AsyncIterator[NatsServer]:
    with TemporaryDirectory() as folder:
        async with open_support_group() as group:
            try:
                server = NatsServer(group, Path(folder), **options)  # type: ignore[arg-type]
            except ServerMissingError:
                pytest.skip("no nats-server to start: install it, beside CORRAL_TEST_NATS_URL")
            await server.start()
            yield server


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
async def client(url: str = URL) -> AsyncIterator[RawClient]:
    async with open_asyncio_side("raw") as side:
        raw = RawClient(side)

        async def connect() -> None:
            await raw.client.connect(url)

        await side.call(connect)
        try:
            yield raw
        finally:
            await side.call(raw.client.close)  # noqa: ASYNC102 -- of a server that is there


@pytest.mark.anyio
class TestContract(BrokerContract):
    url = f"{URL}?lease=2&patience=3"

    @pytest.fixture(autouse=True)
    def shared_server(self) -> None:
        _needs_nats()

    def open_server(self):
        return open_server()

    def _url_of(self, server: NatsServer) -> str:
        return f"{server.url}?lease=2&patience=3"

    async def publish_raw(self, topic: str, body: bytes) -> bool:
        async with client() as raw:
            await raw.call(f"corral.q.{token_of(topic)}", body)
        return True

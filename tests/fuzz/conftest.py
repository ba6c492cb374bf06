"""Servers that are fuzzed: each in a thread with a Trio of its own, so that the tests are plain blocking code, as
hypothesis and schemathesis want it.

`CORRAL_FUZZ=N` makes every test of this folder N times as thorough; without it the folder takes a minute.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import hypothesis
import pytest
import trio
from anyio.from_thread import BlockingPortal, start_blocking_portal

from llama_corral.deploy import Deployment, DeployOptions, deploy_all
from llama_corral.protocol import topics
from llama_corral.queues.memory import MemoryMessageQueue
from llama_corral.services import WorkflowService, WorkflowServiceConfig
from llama_corral.settings import ServerSettings

from .flows import AskFlow, EchoFlow

DEPTH = int(os.environ.get("CORRAL_FUZZ", "1"))
PATIENCE = 10.0
"""Seconds after which a request counts as hanging."""
BODY_LIMIT = 10_000_000


def thorough(examples: int, **options: Any) -> Callable[[Any], Any]:
    """hypothesis settings: the same examples each time, unless a deep run is asked for. What fails is not made smaller:
    here, failing often means waiting."""
    return hypothesis.settings(
        max_examples=examples * DEPTH,
        derandomize=DEPTH == 1,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
        **options,
    )


@dataclass
class Served:
    """A server and a way into its event loop."""

    url: str
    portal: BlockingPortal
    inner: Any

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE)


@contextmanager
def in_a_thread(opened: Callable[[], Any]) -> Iterator[Served]:
    with start_blocking_portal("trio") as portal, portal.wrap_async_context_manager(opened()) as (url, inner):
        yield Served(url, portal, inner)


@asynccontextmanager
async def open_plane(**server: Any) -> AsyncIterator[tuple[str, Deployment]]:
    """All of `corral serve` but its signals. Arguments are those of `ServerSettings`."""
    options = DeployOptions(
        store_url="sqlite://",
        settings=ServerSettings(port=0, graceful_timeout=2, body_limit=BODY_LIMIT, **server),
        drain_timeout=1,
    )
    flows = {"echo": EchoFlow(), "ask": AskFlow(timeout=1)}
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        deployment: Deployment = await nursery.start(partial(deploy_all, flows, options, stop=stop))
        yield deployment.url, deployment
        stop.set()


@asynccontextmanager
async def open_service() -> AsyncIterator[tuple[str, WorkflowService]]:
    """A service with its own server on a bare queue; somebody takes what it publishes."""
    async with MemoryMessageQueue() as queue, trio.open_nursery() as nursery:

        async def take_everything(task_status: trio.TaskStatus[None]) -> None:
            async with queue.consumer(topics.topic(topics.DEFAULT_NAMESPACE, topics.CONTROL_PLANE_NAME)) as consumer:
                task_status.started()
                while True:
                    for delivery in await consumer.receive(100):
                        await delivery.ack()

        await nursery.start(take_everything)
        config = WorkflowServiceConfig(service_name="ask", port=0)
        service = WorkflowService(AskFlow(timeout=1), queue, config, drain_timeout=1)
        url: str = await nursery.start(service.launch_server)
        yield url, service
        service.stop()
        nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def _nothing_unexpected(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No error in the log, but those of workflows that were told to fail."""
    yield
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.getMessage() for record in errors if record.name != "llama_corral.services.outcome"] == []


@pytest.fixture(scope="module")
def plane() -> Iterator[Served]:
    with in_a_thread(open_plane) as served:
        yield served


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with in_a_thread(open_service) as served:
        yield served

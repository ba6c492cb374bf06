"""A corral far away, behind real HTTP in a Trio thread of its own; and a control plane here, whose services call it."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
from anyio.from_thread import BlockingPortal, start_blocking_portal

from llama_corral.client import Client
from llama_corral.deploy import Deployment, DeployOptions, deploy_all
from llama_corral.settings import ServerSettings

from ..moments import living_tasks
from ..services.rig import Rig, open_rig
from .flows import FAR

CONFIGURATIONS = {
    "trio-anyio": ("trio", "anyio"),
    "trio-asyncio": ("trio", "asyncio"),
    "asyncio": ("asyncio", "anyio"),
}


@pytest.fixture(params=list(CONFIGURATIONS))
def configuration(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def anyio_backend(configuration: str) -> str:
    return CONFIGURATIONS[configuration][0]


@pytest.fixture
def flavour(configuration: str) -> Any:
    """The step flavour of the configuration."""
    return CONFIGURATIONS[configuration][1]


@asynccontextmanager
async def corral() -> AsyncIterator[Deployment]:
    options = DeployOptions(
        store_url="sqlite://",
        settings=ServerSettings(port=0, graceful_timeout=0.2),
        step_flavour="anyio",
        drain_timeout=0.1,
    )
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        deployment: Deployment = await nursery.start(partial(deploy_all, FAR, options, stop=stop))
        yield deployment
        stop.set()


@pytest.fixture(scope="session")
def trio_thread() -> Iterator[BlockingPortal]:
    with start_blocking_portal("trio") as portal:
        yield portal


@pytest.fixture(scope="session")
def url(trio_thread: BlockingPortal) -> Iterator[str]:
    with trio_thread.wrap_async_context_manager(corral()) as deployment:
        yield deployment.url


@pytest.fixture
async def nothing_left(anyio_backend: str) -> AsyncIterator[None]:
    """No task outlives the test (P6)."""
    before = living_tasks()
    yield
    left = {task for task in living_tasks() - before if "_call_in_runner_task" not in repr(task)}  # the plugin's own
    assert not left, f"left behind: {left}"


@pytest.fixture
async def client(url: str, nothing_left: None) -> AsyncIterator[Client]:
    """A client of the corral far away."""
    async with Client(url) as client:
        yield client


@pytest.fixture
async def rig(flavour: Any, nothing_left: None) -> AsyncIterator[Rig]:
    """A control plane here; `rig.serve(workflow)` puts services on it."""
    async with open_rig(flavour) as opened:
        yield opened


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port on which nothing listens: it is bound, so that nobody else gets it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]

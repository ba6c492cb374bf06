"""Clients whose server stops and comes back at the same address, on the same store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from llama_corral.client import Client, SyncClient
from llama_corral.deploy import Deployment, DeployOptions, deploy_all
from llama_corral.settings import ServerSettings

from .conftest import WORKFLOWS

pytestmark = pytest.mark.trio
EVENTS = 3


@asynccontextmanager
async def served(folder: Path, port: int = 0) -> AsyncIterator[str]:
    """A corral until the block is left; it then stops as it does at SIGTERM."""
    options = DeployOptions(
        store_url=f"sqlite:///{folder}/corral.db",
        settings=ServerSettings(port=port, graceful_timeout=5),
        step_flavour="anyio",
        drain_timeout=5,
    )
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        deployment: Deployment = await nursery.start(partial(deploy_all, WORKFLOWS, options, stop=stop))
        yield deployment.url
        stop.set()


async def with_client(url: str, asked: Callable[[], None], answered: trio.Event) -> list[int]:
    async with Client(url) as client:
        task = await client.start("ticking", events=EVENTS, hold=True)
        indexes = []
        async with task.events() as events:
            async for event in events:
                indexes.append(event.index)
                if event.index == EVENTS:  # the question
                    asked()
                    await answered.wait()
                    await task.send_event("HumanResponseEvent", {"response": "yes"})
        assert events.record is not None
        assert events.record.value == {"events": EVENTS, "answer": "yes"}
        return indexes


async def with_sync_client(url: str, asked: Callable[[], None], answered: trio.Event) -> list[int]:
    def use() -> list[int]:
        with SyncClient(url, backend="trio") as client:
            task = client.start("ticking", events=EVENTS, hold=True)
            indexes = []
            with task.events() as events:
                for event in events:
                    indexes.append(event.index)
                    if event.index == EVENTS:
                        trio.from_thread.run_sync(asked)
                        trio.from_thread.run(answered.wait)
                        task.send_event("HumanResponseEvent", {"response": "yes"})
            assert task.result() == {"events": EVENTS, "answer": "yes"}
            return indexes

    return await trio.to_thread.run_sync(use)


@pytest.mark.promise("P3", "P7")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("use", [with_client, with_sync_client])
async def test_a_stream_goes_on_when_its_server_has_come_back(tmp_path: Path, use: Callable[..., object]) -> None:
    asked, answered, ended = trio.Event(), trio.Event(), trio.Event()
    results: list[list[int]] = []
    async with trio.open_nursery() as nursery:
        async with served(tmp_path) as url:

            async def run() -> None:
                results.append(await use(url, asked.set, answered))  # type: ignore[misc]
                ended.set()

            nursery.start_soon(run)
            await asked.wait()
        async with served(tmp_path, int(url.rpartition(":")[2])):
            answered.set()
            with trio.fail_after(40):
                await ended.wait()
    assert results[0] == list(range(len(results[0])))
    assert len(results[0]) > EVENTS + 1

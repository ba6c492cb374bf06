from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import anyio
import pytest

from llama_corral.aio import SelfCancelled, call_asyncio, open_asyncio_loop
from llama_corral.aio.client import POSTED_AT_ONCE, AsyncioSide, open_asyncio_side

pytestmark = pytest.mark.anyio

pause = asyncio.sleep  # noqa: TID251 -- the code that is hosted


async def double(number: int) -> int:
    await pause(0)
    return number * 2


async def fail() -> None:
    await pause(0)
    raise ValueError("no")


class Noticing:
    """An asyncio function that waits for ever and notices how it ends."""

    def __init__(self) -> None:
        self.started = anyio.Event()
        self.ended: list[str] = []

    async def __call__(self) -> None:
        self.started.set()
        try:
            await pause(3600)
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise


async def test_calls(anyio_backend: str) -> None:
    async with open_asyncio_side("test") as side:
        assert await side.call(double, 2) == 4
        with pytest.raises(ValueError, match="no"):
            await side.call(fail)
    with pytest.raises(SelfCancelled):
        await side.call(double, 2)


@pytest.mark.promise("P6")
async def test_a_cancelled_call_unwinds(anyio_backend: str) -> None:
    noticing = Noticing()
    async with open_asyncio_side("test") as side, anyio.create_task_group() as tasks:
        tasks.start_soon(side.call, noticing)
        await noticing.started.wait()
        tasks.cancel_scope.cancel()
    assert noticing.ended == ["cancelled"]


@pytest.mark.promise("P6")
async def test_what_is_left_ends_with_the_block(anyio_backend: str) -> None:
    """Also for who still waits for it."""
    noticing = Noticing()

    async def wait(side: AsyncioSide) -> None:
        with pytest.raises(SelfCancelled):
            await side.call(noticing)
        ended.set()

    ended = anyio.Event()
    async with anyio.create_task_group() as tasks:
        async with open_asyncio_side("test") as side:
            tasks.start_soon(wait, side)  # noqa: ASYNC111 -- it sees the end of the block
            await noticing.started.wait()
        assert noticing.ended == ["cancelled"]
        await ended.wait()


async def test_tasks_that_were_started_outside_of_the_block(anyio_backend: str) -> None:
    """They do not inherit the loop that Trio hosts; the side knows it."""
    opened: list[AsyncioSide] = []
    ready, done = anyio.Event(), anyio.Event()

    async def own() -> None:
        async with open_asyncio_side("test") as side:
            opened.append(side)
            ready.set()
            await done.wait()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(own)
        await ready.wait()
        assert await opened[0].call(double, 4) == 8
        done.set()


async def test_what_a_call_starts_belongs_to_the_block(anyio_backend: str) -> None:
    """As the reader of a connection that a call opened."""
    reading = Noticing()

    async def connect() -> asyncio.Task[None]:
        return asyncio.create_task(reading())

    async def step(side: AsyncioSide) -> asyncio.Task[None]:
        """Somebody else's call, which ends what it leaves behind."""
        return await side.call(connect)

    async with open_asyncio_loop():
        async with open_asyncio_side("test") as side:
            task = await call_asyncio(step, side)
            await reading.started.wait()
            assert not task.done()
            if anyio_backend == "asyncio":  # there a client ends its own tasks
                task.cancel()
        assert reading.ended == ["cancelled"]


async def test_posted_in_order(anyio_backend: str, caplog: pytest.LogCaptureFixture) -> None:
    got: list[int] = []

    async def append(number: int) -> None:
        await pause(0)
        got.append(number)
        if number == 3:
            raise ValueError("three")

    async with open_asyncio_side("test") as side:
        for number in range(10):
            side.post(append, number)
        await side.wait_posted()
        assert len(got) == 10
    side.post(append, 99)
    with pytest.raises(SelfCancelled):
        await side.wait_posted()
    assert got == list(range(10))
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        "a posted call of test failed"
    ]


@pytest.mark.promise("P12")
async def test_sending_waits_for_room(anyio_backend: str) -> None:
    sent = 0
    gate: list[asyncio.Future[None]] = []
    opened, more = anyio.Event(), anyio.Event()

    async def block() -> None:
        gate.append(asyncio.get_running_loop().create_future())
        opened.set()
        await gate[0]

    async def nothing() -> None: ...

    async def flood(side: AsyncioSide) -> None:
        nonlocal sent
        while True:
            await side.send(nothing)
            sent += 1
            if sent > POSTED_AT_ONCE:
                more.set()

    async with open_asyncio_side("test") as side, anyio.create_task_group() as tasks:
        side.post(block)
        await opened.wait()
        tasks.start_soon(flood, side)
        await anyio.wait_all_tasks_blocked()
        assert sent == POSTED_AT_ONCE
        gate[0].set_result(None)
        await more.wait()
        tasks.cancel_scope.cancel()


@pytest.mark.promise("P6")
async def test_a_client_that_swallows_its_cancellation(anyio_backend: str, caplog: pytest.LogCaptureFixture) -> None:
    started = anyio.Event()

    async def swallow() -> None:
        started.set()
        with contextlib.suppress(asyncio.CancelledError):  # as clients do
            await pause(3600)

    with anyio.fail_after(3):
        async with open_asyncio_side("test") as side:
            side.post(swallow)
            await started.wait()
    assert not caplog.records


@contextlib.asynccontextmanager
async def failing() -> AsyncIterator[None]:
    async with open_asyncio_side("test"):
        yield


async def test_an_error_of_the_body_comes_out_as_it_is(anyio_backend: str) -> None:
    with pytest.raises(KeyError):
        async with failing():
            raise KeyError("body")


async def test_a_client_that_cancels_itself(anyio_backend: str, caplog: pytest.LogCaptureFixture) -> None:
    """As clients do to what waits on a connection that is closed: what is posted afterwards is done all the same."""

    async def cancelled() -> None:
        raise asyncio.CancelledError

    with anyio.fail_after(3):
        async with open_asyncio_side("test") as side:
            side.post(cancelled)
            await side.wait_posted()
    assert [record.message for record in caplog.records] == ["a posted call of test failed"]

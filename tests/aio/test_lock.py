"""One lock for Trio tasks and asyncio-flavoured code."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import trio

from llama_corral.aio import FlavourLock, call_asyncio, open_asyncio_loop


@pytest.mark.anyio
async def test_it_excludes_and_is_fair(anyio_backend):
    lock = FlavourLock()
    order = []

    async def work(n):
        async with lock.acquire_write():
            order.append(n)
            await anyio.lowlevel.checkpoint()
            order.append(n)

    async with anyio.create_task_group() as group:
        for n in range(5):
            group.start_soon(work, n)
    assert order[::2] == order[1::2]
    assert sorted(order[::2]) == list(range(5))


@pytest.mark.anyio
async def test_the_holder_gets_an_error_and_keeps_the_lock(anyio_backend):
    lock = FlavourLock()
    async with lock.acquire_write():
        with pytest.raises(RuntimeError, match="edit_state"):
            async with lock.acquire_write():
                pass
        async with anyio.create_task_group() as group:
            group.start_soon(_acquire, lock)
            group.start_soon(_acquire, lock)
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
    await _acquire(lock)


async def _acquire(lock):
    async with lock.acquire_write():
        await anyio.lowlevel.checkpoint()


@pytest.mark.trio
async def test_both_libraries_share_it():
    lock = FlavourLock()
    inside = 0
    done = []

    async def work(name):
        nonlocal inside
        async with lock.acquire_write():
            inside += 1
            assert inside == 1
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
            inside -= 1
            done.append(name)

    async with open_asyncio_loop(), trio.open_nursery() as nursery:
        for n in range(10):
            nursery.start_soon(work, f"trio {n}")
            nursery.start_soon(call_asyncio, work, f"asyncio {n}")
    assert len(done) == 20


@pytest.mark.promise("P6")
@pytest.mark.trio
async def test_cancelled_waiters_pass_it_on():
    lock = FlavourLock()
    got = []

    async def work(name, scope, *, hosted):
        async def hold():
            async with lock.acquire_write():
                got.append(name)
                await anyio.lowlevel.checkpoint()

        with scope:
            await (call_asyncio(hold) if hosted else hold())

    async with open_asyncio_loop():
        for cancel_first in (True, False):
            got.clear()
            scopes = [trio.CancelScope() for _ in range(8)]
            async with trio.open_nursery() as nursery:
                async with lock.acquire_write():
                    for n, scope in enumerate(scopes):
                        nursery.start_soon(lambda n=n, scope=scope: work(n, scope, hosted=n % 2))
                    await trio.testing.wait_all_tasks_blocked()
                    if cancel_first:
                        for scope in scopes[::3]:
                            scope.cancel()
                if not cancel_first:  # the lock was handed to the first one in this very moment
                    for scope in scopes[::3]:
                        scope.cancel()
            assert set(got) >= {n for n in range(8) if n % 3}
            async with lock.acquire_write():
                pass


@pytest.mark.anyio
async def test_loops_of_other_threads_share_it(anyio_backend):
    """As a sync step's thread does that runs a loop around the store."""
    lock = FlavourLock()
    inside = 0
    done = []

    async def work(name):
        nonlocal inside
        for _ in range(20):
            async with lock.acquire_write():
                inside += 1
                assert inside == 1
                await anyio.lowlevel.checkpoint()
                inside -= 1
        done.append(name)

    async with anyio.create_task_group() as group:
        for n in range(3):
            group.start_soon(work, f"task {n}")
            for backend in ("trio", "asyncio"):
                group.start_soon(
                    anyio.to_thread.run_sync, lambda n=n, b=backend: anyio.run(work, f"{b} {n}", backend=b)
                )
    assert len(done) == 9

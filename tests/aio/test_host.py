"""asyncio code hosted on Trio."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
import trio
import trio.lowlevel

from llama_corral.aio import (
    SelfCancelled,
    await_in,
    call_asyncio,
    call_native,
    caller_library,
    has_asyncio_loop,
    in_foreign_library,
    library_clock,
    open_asyncio_loop,
)

pause = asyncio.sleep  # noqa: TID251 -- the code that is hosted


@pytest.mark.anyio
async def test_calls_return_and_raise(anyio_backend):
    async def add(a, b):
        await pause(0)
        return a + b

    async def fail():
        await pause(0)
        raise LookupError("plain")

    async with open_asyncio_loop():
        assert await call_asyncio(add, 1, 2) == 3
        with pytest.raises(LookupError, match="plain"):
            await call_asyncio(fail)


@pytest.mark.anyio
@pytest.mark.parametrize("error", [LookupError("x"), KeyboardInterrupt()])
async def test_errors_of_the_block_are_not_wrapped(anyio_backend, error):
    with pytest.raises(type(error)) as caught:
        async with open_asyncio_loop():
            raise error
    assert caught.value is error


@pytest.mark.trio
async def test_without_a_loop_the_error_says_what_to_do():
    assert not has_asyncio_loop()
    with pytest.raises(RuntimeError, match="open_asyncio_loop"):
        await call_asyncio(pause, 0)


@pytest.mark.anyio
async def test_self_cancellation_is_an_error(anyio_backend):
    async def give_up():
        raise asyncio.CancelledError

    async with open_asyncio_loop():
        with pytest.raises(SelfCancelled):
            await call_asyncio(give_up)


@pytest.mark.promise("P6")
@pytest.mark.trio
async def test_cancellation_reaches_the_code_and_its_tasks():
    seen = []

    async def child():
        try:
            await asyncio.Event().wait()
        finally:
            seen.append("child")

    async def work():
        task = asyncio.create_task(child())
        try:
            await asyncio.Event().wait()
        finally:
            seen.append("work")
            assert not task.done()

    async with open_asyncio_loop():
        with trio.move_on_after(0.01) as scope:
            await call_asyncio(work)
        assert scope.cancelled_caught
        assert seen == ["work", "child"]


@pytest.mark.promise("P6")
@pytest.mark.trio
async def test_tasks_are_ended_even_if_the_call_is_cancelled_meanwhile():
    seen = []
    go_on = None

    async def slow_to_end():
        try:
            await asyncio.Event().wait()
        finally:
            await go_on.wait()  # noqa: ASYNC102
            seen.append("ended")

    async def leave():
        nonlocal go_on
        go_on = asyncio.Event()
        asyncio.create_task(slow_to_end())  # noqa: RUF006, ASYNC300 -- the habit under test
        await pause(0)

    async with open_asyncio_loop():
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call_asyncio, leave)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
                nursery.start_soon(_open, lambda: go_on.set())
        assert seen == ["ended"]


async def _open(gate):
    with trio.CancelScope(shield=True):
        await trio.testing.wait_all_tasks_blocked()
    gate()


@pytest.mark.trio
async def test_a_task_that_never_ends_is_given_up(monkeypatch, caplog):
    monkeypatch.setattr("llama_corral.aio.host.ORPHAN_GRACE", 0.02)
    stop = False

    async def stubborn():
        while not stop:
            try:
                await pause(0.005)
            except asyncio.CancelledError:  # noqa: ASYNC103
                continue  # noqa: ASYNC104

    async def leave():
        asyncio.create_task(stubborn(), name="stubborn")  # noqa: RUF006, ASYNC300 -- the habit under test
        await pause(0)

    async with open_asyncio_loop():
        await call_asyncio(leave)
        stop = True
        await call_asyncio(pause, 0.01)
    assert "'stubborn' was left behind" in caplog.text


@pytest.mark.trio
async def test_a_loop_that_somebody_else_opened_ties_tasks_too():
    import trio_asyncio

    left = []

    async def leave():
        left.append(asyncio.create_task(asyncio.Event().wait()))
        await pause(0)

    async with trio_asyncio.open_loop():
        await call_asyncio(leave)
        assert left[0].cancelled()


@pytest.mark.trio
async def test_native_code_ends_the_asyncio_tasks_that_it_made():
    left = []

    async def leave():
        left.append(asyncio.get_running_loop().create_task(asyncio.Event().wait()))
        await trio.lowlevel.checkpoint()
        return 5

    async with open_asyncio_loop():
        assert await call_native(leave) == 5
        assert left[0].cancelled()


@pytest.mark.trio
async def test_who_is_calling():
    async def hosted():
        return caller_library(), in_foreign_library("trio"), in_foreign_library("asyncio"), library_clock()()

    assert caller_library() == "trio"
    assert not in_foreign_library("trio")
    assert in_foreign_library("asyncio")
    async with open_asyncio_loop():
        library, to_trio, to_asyncio, now = await call_asyncio(hosted)
    assert (library, to_trio, to_asyncio) == ("asyncio", True, False)
    assert now == pytest.approx(trio.current_time(), abs=5)
    assert await trio.to_thread.run_sync(caller_library) is None


def test_importing_the_package_leaves_asyncio_alone():
    code = (
        "import asyncio, sys\n"
        "before = asyncio.get_running_loop, asyncio.new_event_loop\n"
        "import llama_corral.runtime\n"
        "assert (asyncio.get_running_loop, asyncio.new_event_loop) == before\n"
        "assert 'trio_asyncio' not in sys.modules\n"
        "import trio\n"
        "from llama_corral.aio import open_asyncio_loop, call_asyncio\n"
        "async def where(): return asyncio.get_running_loop()\n"
        "async def main():\n"
        "    async with open_asyncio_loop():\n"
        "        return await call_asyncio(where)\n"
        "assert 'trio' in type(trio.run(main)).__module__\n"
        "assert 'trio' not in type(asyncio.run(where())).__module__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)


@pytest.mark.promise("P12")
@pytest.mark.trio
async def test_cancelled_timers_do_not_pile_up_and_the_others_stay_in_order():
    came: list[int] = []
    done = asyncio.Event()

    async def many():
        loop = asyncio.get_running_loop()
        now = loop.time()
        for number in reversed(range(5)):
            loop.call_at(now + 0.02 + number / 1000, came.append, number)
        loop.call_at(now + 0.04, done.set)
        for number in range(2000):
            async with asyncio.timeout(3600 + number):
                await pause(0)
        left = len(loop._timers)
        await done.wait()
        return left

    async with open_asyncio_loop():
        assert await call_asyncio(many) < 250
    assert came == [0, 1, 2, 3, 4]


@pytest.mark.anyio
async def test_awaiting_in_the_library_that_drives_the_thread(anyio_backend):
    async def where(_):
        return caller_library()

    async def from_asyncio(backend):
        return await await_in(backend, where, 1)

    async with open_asyncio_loop():
        assert await await_in(anyio_backend, where, 1) == anyio_backend
        assert await call_asyncio(from_asyncio, anyio_backend) == anyio_backend
        assert await await_in("asyncio", where, 1) == "asyncio"

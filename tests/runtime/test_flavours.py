"""Step flavours: what works in each, what is named where it does not, and what asyncio code leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from typing import Annotated

import anyio
import anyio.lowlevel
import httpx
import pytest
import trio
import trio.lowlevel
from workflows import Context, Workflow, step
from workflows.events import StartEvent, StopEvent
from workflows.resource import Resource
from workflows.retry_policy import retry_policy, stop_after_attempt, wait_fixed

from llama_corral.aio import has_asyncio_loop, open_asyncio_loop
from llama_corral.exceptions import FlavourError
from llama_corral.runtime import open_run, run_workflow

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]

pause = asyncio.sleep  # noqa: TID251 -- what users write in their steps


@contextlib.contextmanager
def unawaited(coroutine):
    """Closed at the end, without a warning where it was refused."""
    try:
        yield coroutine
    except (RuntimeError, TypeError, AttributeError):
        if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED and not asyncio_has(coroutine):
            coroutine.close()
        raise


def asyncio_has(coroutine):
    tasks = asyncio.tasks
    scheduled = (
        tasks._scheduled_tasks if hasattr(tasks, "_scheduled_tasks") else tasks._all_tasks
    )  # since and before 3.12
    return any(task.get_coro() is coroutine for task in scheduled)


async def bare_yield():
    await pause(0)


async def future():
    await pause(0.001)


async def timeout():
    async with asyncio.timeout(10):
        await pause(0)


async def gather():
    with unawaited(pause(0)) as one:
        await asyncio.gather(one)


async def task_group():
    with unawaited(pause(0)) as one:
        async with asyncio.TaskGroup() as group:
            group.create_task(one)
            await pause(0)


async def wait_for():
    with unawaited(asyncio.Event().wait()) as one:
        await asyncio.wait_for(one, 0.001)


async def to_thread():
    await asyncio.to_thread(int)


async def queue():
    empty = asyncio.Queue()
    asyncio.get_running_loop().call_later(0.001, empty.put_nowait, 1)
    assert await empty.get() == 1


class Calls(Workflow):
    @step(retry_policy=retry_policy(wait=wait_fixed(0), stop=stop_after_attempt(5)))
    async def call(self, ctx: Context, ev: StartEvent) -> StopEvent:
        self.calls = getattr(self, "calls", 0) + 1
        with contextlib.suppress(TimeoutError):
            await ev.get("function")()
        return StopEvent(result="done")


ASYNCIO_CALLS = [bare_yield, future, timeout, gather, task_group, wait_for, to_thread, queue]


@pytest.mark.parametrize("hosted", [False, True])
@pytest.mark.parametrize("function", ASYNCIO_CALLS)
async def test_asyncio_calls(configuration, flavour, function, hosted):
    workflow = Calls()

    async def work():
        return await run_workflow(workflow, start_event=StartEvent(function=function), flavour=flavour)

    async def attempt():
        if hosted:
            async with open_asyncio_loop():
                return await work()
        return await work()

    if configuration != "trio-anyio":
        assert await attempt() == "done"
        return
    with pytest.raises(FlavourError, match=r"step 'call'.*'anyio' flavour") as caught:
        await attempt()
    assert "flavour='asyncio'" in caught.value.hint
    assert caught.value.fields == {"step": "call", "flavour": "anyio"}
    assert caught.value.__cause__ is not None
    assert workflow.calls == 1  # no retry makes it right


async def trio_sleep():
    await trio.lowlevel.checkpoint()


async def trio_wait():
    await trio.Event().wait()


@pytest.mark.parametrize("function", [trio_sleep, trio_wait])
async def test_trio_calls(configuration, flavour, function):
    start = StartEvent(function=function)
    if configuration == "trio-anyio" and function is trio_sleep:
        assert await run_workflow(Calls(), start_event=start, flavour=flavour) == "done"
    elif configuration != "trio-anyio":
        with pytest.raises(FlavourError, match=r"step 'call'.*Trio") as caught:
            await run_workflow(Calls(), start_event=start, flavour=flavour)
        expected = "flavour='anyio'" if configuration == "trio-asyncio" else "on Trio"
        assert expected in caught.value.hint


async def anyio_all():
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep, 0)
        await anyio.lowlevel.checkpoint()
    with anyio.move_on_after(0.001):
        await anyio.sleep_forever()
    assert await anyio.to_thread.run_sync(int) == 0
    with anyio.CancelScope(shield=True):
        await anyio.lowlevel.checkpoint()


async def http():
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text="ok"))
    async with httpx.AsyncClient(transport=transport) as client:
        assert (await client.get("http://x/")).text == "ok"


@pytest.mark.parametrize("function", [anyio_all, http])
async def test_neutral_calls_work_everywhere(flavour, function):
    assert await run_workflow(Calls(), start_event=StartEvent(function=function), flavour=flavour) == "done"


class Leaves(Workflow):
    """Leaves an asyncio task behind."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.orphan_ended = None
        self.late = 0

    async def orphan(self):
        try:
            await asyncio.Event().wait()
        finally:
            self.orphan_ended = "cancelled"
            await pause(0)  # noqa: ASYNC102 -- cancelled once
            self.late = asyncio.create_task(self.second())

    async def second(self):
        await asyncio.Event().wait()

    @step
    async def leave(self, ctx: Context, ev: StartEvent) -> StopEvent:
        self.task = asyncio.get_running_loop().create_task(self.orphan())
        await anyio.lowlevel.checkpoint()
        if ev.get("then") == "fail":
            raise LookupError
        if ev.get("then") == "hang":
            await anyio.sleep_forever()
        return StopEvent(result="left")


@pytest.mark.promise("P6")
@pytest.mark.parametrize("then", ["return", "fail", "hang"])
async def test_asyncio_tasks_end_with_their_step(configuration, flavour, then):
    if configuration == "asyncio":
        pytest.skip("plain asyncio ties no tasks to whoever created them")
    workflow = Leaves()
    async with open_asyncio_loop():  # in anyio flavour too: native code finds the hosted loop
        async with open_run(workflow, then=then, flavour=flavour) as run:
            await anyio.wait_all_tasks_blocked()
            assert run.is_done == (then != "hang")
        assert workflow.task.done()
        if workflow.late:
            assert workflow.late.done()


class Client:
    """Lives by a task of its own, as clients of brokers and databases do."""

    def __init__(self):
        self.questions = asyncio.Queue()
        self.task = asyncio.create_task(self.serve())

    async def serve(self):
        while True:
            answer = await self.questions.get()
            answer.set_result("alive")

    async def ask(self):
        answer = asyncio.get_running_loop().create_future()
        await self.questions.put(answer)
        return await answer


clients = []


async def connect() -> Client:
    await pause(0)
    clients.append(Client())
    return clients[-1]


class Asks(Workflow):
    @step
    async def ask(self, ev: StartEvent, client: Annotated[Client, Resource(connect)]) -> StopEvent:
        return StopEvent(result=await client.ask())


async def test_a_shared_resource_keeps_its_tasks_until_the_loop_ends(configuration, flavour):
    if configuration != "trio-asyncio":
        pytest.skip("hosted asyncio only")
    clients.clear()
    workflow = Asks()
    async with open_asyncio_loop():
        for _ in range(3):
            assert await run_workflow(workflow, flavour=flavour) == "alive"
    assert len(clients) == 1
    assert clients[0].task.cancelled()


class FailingOrphan(Workflow):
    @step
    async def leave(self, ev: StartEvent) -> StopEvent:
        async def orphan():
            try:
                await asyncio.Event().wait()
            finally:
                raise LookupError("while unwinding")

        self.task = asyncio.create_task(orphan())
        await pause(0)
        return StopEvent()


async def test_the_error_of_an_orphan_is_logged(configuration, flavour, caplog):
    if configuration != "trio-asyncio":
        pytest.skip("hosted asyncio only")
    with caplog.at_level(logging.WARNING):
        await run_workflow(FailingOrphan(), flavour=flavour)
    assert "left behind" in caplog.text
    assert "while unwinding" in caplog.text


class Forgets(Workflow):
    @step
    async def forget(self, ev: StartEvent) -> StopEvent:
        asyncio.get_running_loop().call_exception_handler({"message": "forgotten", "exception": LookupError("x")})
        return StopEvent(result="fine")


async def test_an_error_that_asyncio_only_logs_ends_no_loop(configuration, flavour, caplog):
    if configuration != "trio-asyncio":
        pytest.skip("hosted asyncio only")
    async with open_asyncio_loop():
        for _ in range(2):
            assert await run_workflow(Forgets(), flavour=flavour) == "fine"
            await anyio.wait_all_tasks_blocked()
    assert "forgotten" in caplog.text


async def test_a_run_uses_the_loop_that_is_there(configuration):
    if configuration != "trio-asyncio":
        pytest.skip("hosted asyncio only")
    assert not has_asyncio_loop()
    loops = []

    class Which(Workflow):
        @step
        async def which(self, ev: StartEvent) -> StopEvent:
            loops.append(asyncio.get_running_loop())
            return StopEvent()

    async with open_asyncio_loop():
        assert has_asyncio_loop()
        for _ in range(2):
            await run_workflow(Which(), flavour="asyncio")
        async with open_run(Which(), flavour="asyncio") as run:
            await run.result()
    await run_workflow(Which(), flavour="asyncio")
    assert loops[0] is loops[1] is loops[2]
    assert loops[3] is not loops[0]
    assert not has_asyncio_loop()


async def test_the_asyncio_backend_is_plain_asyncio(configuration):
    """trio-asyncio, once imported, would replace the loops of asyncio.run()."""
    if configuration != "asyncio":
        pytest.skip("the asyncio backend only")
    assert "trio_asyncio" not in type(asyncio.get_running_loop()).__module__

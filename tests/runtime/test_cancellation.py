"""Cancellation is real: whatever a run started has unwound when its block is left (P6)."""

from __future__ import annotations

import asyncio
import threading

import anyio
import anyio.lowlevel
import pytest
from workflows import Context, Workflow, step
from workflows.errors import WorkflowCancelledByUser
from workflows.events import Event, HumanResponseEvent, StartEvent, StopEvent, WorkflowCancelledEvent
from workflows.retry_policy import retry_policy, stop_after_attempt, wait_fixed

from llama_corral.aio import open_asyncio_loop
from llama_corral.exceptions import RunClosed
from llama_corral.runtime import RunHooks, make_run, open_run, run_workflow

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left"), pytest.mark.promise("P6")]


class Next(Event):
    pass


class Sleeper(Workflow):
    def __init__(self, **kwargs):
        super().__init__(timeout=None, **kwargs)
        self.cleaned = 0
        self.started = anyio.Event()

    @step
    async def sleep(self, ctx: Context, ev: StartEvent) -> StopEvent:
        self.started.set()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                for _ in range(3):
                    await anyio.lowlevel.checkpoint()
                await ctx.store.set("cleaned", True)
            self.cleaned += 1
        return StopEvent()


async def test_leaving_the_block_early(flavour):
    workflow = Sleeper()
    async with open_run(workflow, flavour=flavour) as run:
        await anyio.wait_all_tasks_blocked()
    assert workflow.cleaned == 1
    assert await run.context.store.get("cleaned") is True
    with pytest.raises(RunClosed):
        await run.result()
    assert run.is_done


async def test_leaving_the_block_before_anything_ran(flavour):
    workflow = Sleeper()
    async with open_run(workflow, flavour=flavour) as run:
        pass
    assert run.is_done
    assert workflow.cleaned in (0, 1)


async def test_an_error_in_the_block_cancels_the_run(flavour):
    workflow = Sleeper()

    async def work():
        async with open_run(workflow, flavour=flavour):
            await anyio.wait_all_tasks_blocked()
            raise LookupError

    with pytest.raises(LookupError):
        await work()
    assert workflow.cleaned == 1


@pytest.mark.parametrize("way", ["open_run", "run_workflow", "drive"])
async def test_cancelling_the_scope_around(flavour, way):
    workflow = Sleeper()

    async def work():
        if way == "run_workflow":
            await run_workflow(workflow, flavour=flavour)
        elif way == "drive":
            await make_run(workflow).drive()
        else:
            async with open_run(workflow, flavour=flavour) as run:
                await run.result()

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(work)
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert workflow.cleaned == 1


async def test_a_deadline_around(flavour):
    workflow = Sleeper()
    with pytest.raises(TimeoutError):
        with anyio.fail_after(0.5):
            await run_workflow(workflow, flavour=flavour)
    assert workflow.cleaned == 1


@pytest.mark.parametrize("when", ["before", "working"])
async def test_cancelling_the_run(flavour, when):
    workflow = Sleeper()
    async with open_run(workflow, flavour=flavour) as run:
        if when == "working":
            await anyio.wait_all_tasks_blocked()
        run.cancel()
        run.cancel()
        with pytest.raises(WorkflowCancelledByUser):
            await run.result()
        assert workflow.cleaned == (1 if when == "working" else 0)
        assert isinstance([event async for event in run.events()][-1], WorkflowCancelledEvent)


class Idle(Workflow):
    @step
    async def wait(self, ctx: Context, ev: StartEvent) -> StopEvent:
        await ctx.wait_for_event(HumanResponseEvent)
        return StopEvent()


class Retrying(Workflow):
    @step(retry_policy=retry_policy(wait=wait_fixed(1e6), stop=stop_after_attempt(3)))
    async def fail(self, ev: StartEvent) -> StopEvent:
        raise ConnectionError


@pytest.mark.parametrize("workflow", [Idle, Retrying])
async def test_cancelling_a_run_that_waits(flavour, workflow):
    for _ in range(2):
        with anyio.move_on_after(30) as scope:
            async with open_run(workflow(), flavour=flavour) as run:
                await anyio.wait_all_tasks_blocked()
                assert run.is_idle
                scope.cancel()
                await run.result()
        assert scope.cancelled_caught
        with pytest.raises(RunClosed):
            _ = run.stop_event


async def test_cancelled_in_a_hook(flavour):
    class Stuck(RunHooks):
        async def before_step(self, step):
            await anyio.sleep_forever()

    workflow = Sleeper()
    async with open_run(workflow, hooks=Stuck(), flavour=flavour):
        await anyio.wait_all_tasks_blocked()
    assert workflow.cleaned == 0


class Stubborn(Workflow):
    """Turns its cancellation into an ordinary event."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.went_on = False

    @step
    async def first(self, ev: StartEvent) -> Next:
        try:
            await anyio.sleep_forever()
        except BaseException:  # noqa: ASYNC103 -- the bad habit under test
            return Next()  # noqa: ASYNC104

    @step
    async def second(self, ev: Next) -> StopEvent:
        self.went_on = True
        return StopEvent()


async def test_a_step_that_swallows_cancellation_starts_nothing_new(flavour):
    workflow = Stubborn()
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: run_workflow(workflow, flavour=flavour))
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
    assert not workflow.went_on


class SelfCancel(Workflow):
    @step
    async def fail(self, ev: StartEvent) -> StopEvent:
        if ev.get("how") == "raise":
            raise asyncio.CancelledError
        asyncio.current_task().cancel()
        await anyio.lowlevel.checkpoint()
        return StopEvent()


@pytest.mark.parametrize("how", ["raise", "cancel"])
async def test_a_step_that_cancels_itself_fails(flavour, configuration, how):
    if configuration == "trio-anyio":
        pytest.skip("asyncio's error means nothing there")
    with pytest.raises(RuntimeError, match="cancel"):
        await run_workflow(SelfCancel(), how=how, flavour=flavour)


class Outer(Workflow):
    def __init__(self, inner, flavour):
        super().__init__()
        self.inner = inner
        self.flavour = flavour

    @step
    async def call(self, ev: StartEvent) -> StopEvent:
        return StopEvent(result=await run_workflow(self.inner, flavour=self.flavour))


async def test_nested_runs_unwind_with_their_parent(flavour):
    inner = Sleeper()
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: run_workflow(Outer(inner, flavour), flavour=flavour))
            await inner.started.wait() if flavour == "anyio" else await anyio.wait_all_tasks_blocked()
            scope.cancel()
    assert inner.cleaned == 1


async def test_a_thousand_runs_cancelled_at_once(flavour):
    workflow = Sleeper()
    async with anyio.create_task_group() as group:

        async def one():
            async with open_run(workflow, flavour=flavour) as run:
                await run.result()

        async def all_of_them():
            async with open_asyncio_loop(), anyio.create_task_group() as runs:
                for _ in range(1000):
                    runs.start_soon(one)

        group.start_soon(all_of_them)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert workflow.cleaned == 1000


async def test_a_running_sync_step_is_abandoned(flavour):
    entered, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    class Blocked(Workflow):
        @step
        def block(self, ctx: Context, ev: StartEvent) -> StopEvent:
            entered.set()
            go_on.wait(30)
            ctx.send_event(Next())
            ended.set()
            return StopEvent()

    async with open_run(Blocked(), flavour=flavour):
        await anyio.to_thread.run_sync(entered.wait)
    go_on.set()
    await anyio.to_thread.run_sync(ended.wait)


@pytest.mark.parametrize("how", ["cancel", "timeout"])
async def test_asyncios_own_cancellation_of_the_caller(configuration, how):
    if configuration != "asyncio":
        pytest.skip("the asyncio backend only")
    workflow = Sleeper()

    async def work():
        async with open_run(workflow) as run:
            await run.result()

    if how == "timeout":
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(work(), 0.5)
    else:
        task = asyncio.create_task(work())
        await workflow.started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert workflow.cleaned == 1


class BrokenCleanUp(Workflow):
    @step
    async def work(self, ev: StartEvent) -> StopEvent:
        async def child():
            try:
                await anyio.sleep_forever()
            finally:
                raise LookupError("the clean-up broke")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)
            await anyio.sleep_forever()
        return StopEvent()


async def test_a_cancelled_step_whose_children_fail_to_clean_up(anyio_backend):
    async with open_run(BrokenCleanUp(timeout=None)) as run:
        await anyio.wait_all_tasks_blocked()
        run.cancel()
        with pytest.raises(WorkflowCancelledByUser):
            await run.result()
    async with open_run(BrokenCleanUp(timeout=None)):
        await anyio.wait_all_tasks_blocked()

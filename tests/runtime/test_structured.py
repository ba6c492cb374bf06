"""Plain `workflow.run()` inside of `async with StructuredRuntime()`: upstream's usage, with nothing left behind."""

from __future__ import annotations

import asyncio

import anyio
import anyio.lowlevel
import pytest
from workflows import Context, Workflow, step
from workflows.errors import WorkflowCancelledByUser, WorkflowRuntimeError
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StepStateChanged, StopEvent

from llama_corral.exceptions import FlavourError, RunClosed
from llama_corral.runtime import StructuredRuntime

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left"), pytest.mark.promise("P6")]


@pytest.fixture(params=["asyncio"])
def configuration(request):
    """On Trio there is no plain run(); `test_on_trio_it_says_what_to_use` is the test of that."""
    return request.param


class Progress(Event):
    n: int


class Counts(Workflow):
    @step
    async def count(self, ctx: Context, ev: StartEvent) -> StopEvent:
        for n in range(3):
            ctx.write_event_to_stream(Progress(n=n))
            await anyio.lowlevel.checkpoint()
        await ctx.store.set("count", await ctx.store.get("count", 0) + 1)
        return StopEvent(result=await ctx.store.get("count"))


class Asks(Workflow):
    @step
    async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
        answer = await ctx.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent(prefix="?"))
        return StopEvent(result=answer.response)


class Hangs(Workflow):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.unwound = 0

    @step
    async def hang(self, ctx: Context, ev: StartEvent) -> StopEvent:
        ctx.write_event_to_stream(Progress(n=0))
        try:
            await asyncio.Event().wait()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            self.unwound += 1
        return StopEvent()


class Fails(Workflow):
    @step
    async def fail(self, ev: StartEvent) -> StopEvent:
        raise LookupError("gone")


async def test_upstreams_usage(configuration):
    async with StructuredRuntime() as runtime:
        workflow = Counts(runtime=runtime)
        handler = workflow.run()
        events = [event async for event in handler.stream_events()]
        assert [type(event).__name__ for event in events] == ["Progress"] * 3 + ["StopEvent"]
        assert await handler == 1
        assert handler.is_done()
        assert handler.get_stop_event().result == 1
        with pytest.raises(WorkflowRuntimeError, match="already been consumed"):
            await anext(handler.stream_events())
        # and again, with its context
        assert await workflow.run(ctx=handler.ctx) == 2


async def test_internal_events_for_who_asks(configuration):
    async with StructuredRuntime() as runtime:
        handler = Counts(runtime=runtime).run()
        events = [event async for event in handler.stream_events(expose_internal=True)]
    assert any(isinstance(event, StepStateChanged) for event in events)


async def test_registering(configuration):
    async with StructuredRuntime() as runtime:
        with runtime.registering():
            workflow = Asks()
        assert workflow.runtime is runtime
        handler = workflow.run(run_id="mine")
        assert handler.run_id == "mine"
        async for event in handler.stream_events():
            if isinstance(event, InputRequiredEvent):
                handler.ctx.send_event(HumanResponseEvent(response="yes"))
        assert await handler == "yes"


async def test_what_a_workflow_raises_and_who_cancels_it(configuration):
    async with StructuredRuntime() as runtime:
        with pytest.raises(LookupError, match="gone"):
            await Fails(runtime=runtime).run()
        workflow = Hangs(runtime=runtime)
        handler = workflow.run()
        await anext(handler.stream_events())
        await handler.cancel_run()
        with pytest.raises(WorkflowCancelledByUser):
            await handler
        assert workflow.unwound == 1


@pytest.mark.parametrize("how", ["leave", "raise", "cancel"])
async def test_leaving_the_block_leaves_nothing_behind(configuration, how):
    before = asyncio.all_tasks()
    workflows, handlers = [], []
    with anyio.CancelScope() as scope:
        try:
            async with StructuredRuntime() as runtime:
                for _ in range(20):
                    workflows.append(Hangs(runtime=runtime))
                    handlers.append(workflows[-1].run())
                await anyio.wait_all_tasks_blocked()
                if how == "raise":
                    raise KeyError("mine")
                if how == "cancel":
                    scope.cancel()
                    await anyio.lowlevel.checkpoint()
        except KeyError:
            assert how == "raise"
    assert asyncio.all_tasks() == before
    assert all(workflow.unwound == 1 for workflow in workflows)
    for handler in handlers:
        assert handler.is_done()
        with pytest.raises(RunClosed):
            await handler


async def test_a_run_that_never_started_is_closed_too(configuration):
    async with StructuredRuntime() as runtime:
        handler = Counts(runtime=runtime).run()
    with pytest.raises(RunClosed):
        await handler


class Outer(Workflow):
    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    @step
    async def call(self, ev: StartEvent) -> StopEvent:
        return StopEvent(result=await self.inner.run())


async def test_nested_runs_end_with_their_parent(configuration):
    async with StructuredRuntime() as runtime:
        inner = Hangs(runtime=runtime)
        handler = Outer(inner, runtime=runtime).run()
        await anyio.wait_all_tasks_blocked()
        assert inner.unwound == 0
        await handler.cancel_run()
        assert inner.unwound == 1
        assert await Outer(Counts(), runtime=runtime).run() == 1


async def test_a_closed_runtime_says_so(configuration):
    runtime = StructuredRuntime()
    workflow = Counts(runtime=runtime)
    with pytest.raises(RunClosed, match="not open"):
        workflow.run()
    async with runtime:
        assert await workflow.run() == 1
        with pytest.raises(RuntimeError, match="already been entered"):
            async with runtime:
                pass
    with pytest.raises(RunClosed, match="not open"):
        workflow.run()
    async with runtime:  # it may be opened again
        assert await workflow.run() == 1


async def test_one_id_one_run(configuration):
    async with StructuredRuntime() as runtime:
        workflow = Asks(runtime=runtime)
        workflow.run(run_id="one")
        with pytest.raises(RuntimeError, match="one"):
            workflow.run(run_id="one")
        adapter = runtime.get_external_adapter("one")
        await adapter.cancel()
        with pytest.raises(WorkflowCancelledByUser):
            await adapter.get_result()
        with pytest.raises(RuntimeError, match="one"):
            runtime.get_external_adapter("one")


async def test_launching_it_as_upstreams_is_launched(configuration):
    async with StructuredRuntime() as runtime:
        workflow = Counts(runtime=runtime)
        await runtime.launch()
        assert runtime.is_launched
        assert await workflow.run() == 1


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_on_trio_it_says_what_to_use(anyio_backend):
    with pytest.raises(FlavourError, match="asyncio") as raised:
        async with StructuredRuntime():
            pass
    assert "open_run" in raised.value.hint

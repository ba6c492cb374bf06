"""What a step may know and say of something that works elsewhere: its own name, that it only waits, that it is handed on."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from workflows import Context, Workflow, step
from workflows.errors import WorkflowCancelledByUser
from workflows.events import Event, HumanResponseEvent, StartEvent, StopEvent
from workflows.retry_policy import retry_policy, stop_after_attempt, wait_fixed

from llama_corral.aio import caller_library
from llama_corral.runtime import (
    RunHandler,
    RunHooks,
    Slot,
    SlotHooks,
    current_activity,
    new_context,
    open_run,
    run_workflow,
    speaks,
    start_child_run,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left"), pytest.mark.promise("P6")]


class Named(RunHooks):
    identity = "task 7"

    def __init__(self) -> None:
        self.handed_on = False
        self.idle = anyio.Event()

    def on_idle(self) -> None:
        self.idle.set()

    def is_handed_on(self) -> bool:
        return self.handed_on


def here() -> Any:
    activity = current_activity()
    assert activity is not None
    return activity.run


class Leaf(Workflow):
    @step
    async def work(self, ev: StartEvent) -> StopEvent:
        return StopEvent(result=here().identity)


class Part(Event):
    n: int = 0


class Parts(Workflow):
    """Runs leaves from several calls of its steps, one of which is tried again."""

    def __init__(self, seen: list[str | None]) -> None:
        super().__init__(timeout=None)
        self.seen = seen

    @step
    async def split(self, ev: StartEvent) -> list[Part]:
        for _ in range(2):
            self.seen.append(await run_workflow(Leaf()))
        return [Part(n=0), Part(n=1)]

    @step(retry_policy=retry_policy(wait=wait_fixed(0), stop=stop_after_attempt(2)))
    async def each(self, ctx: Context, ev: Part) -> StopEvent | None:
        self.seen.append(await run_workflow(Leaf()))
        if not ev.n and not ctx.retry_info().retry_number:
            raise ValueError
        done = await ctx.store.get("done", default=0) + 1
        await ctx.store.set("done", done)
        return StopEvent() if done == 2 else None


async def test_every_run_of_a_step_has_a_name_of_its_own(flavour):
    seen: list[str | None] = []
    await run_workflow(Parts(seen), hooks=Named(), flavour=flavour)
    assert len(set(seen)) == len(seen) == 5
    assert all(name is not None and name.startswith("task 7/") for name in seen)
    again: list[str | None] = []
    await run_workflow(Parts(again), hooks=Named(), flavour=flavour)
    assert sorted(again, key=str) == sorted(seen, key=str)
    without: list[str | None] = []
    await run_workflow(Parts(without), flavour=flavour)
    assert without == [None] * 5


async def test_runs_inside_of_runs_inside_of_runs(flavour):
    class Middle(Workflow):
        @step
        async def work(self, ev: StartEvent) -> StopEvent:
            return StopEvent(result=[here().identity, await run_workflow(Leaf())])

    class Outer(Workflow):
        @step
        async def work(self, ev: StartEvent) -> StopEvent:
            first = await run_workflow(Middle())
            async with open_run(Leaf(), hooks=SlotHooks(Slot(anyio.CapacityLimiter(1)))) as run:
                return StopEvent(result=[here().identity, *first, await run.result()])

    outer, middle, inner, second = await run_workflow(Outer(), hooks=Named(), flavour=flavour)
    assert outer == "task 7"
    assert middle.startswith("task 7/work/")
    assert inner.startswith(f"{middle}/work/")
    assert second.startswith("task 7/work/")
    assert second != middle


class Waits(Workflow):
    def __init__(self, seen: list[str]) -> None:
        super().__init__(timeout=None)
        self.seen = seen

    @step
    async def begin(self, ev: StartEvent) -> Part:
        await run_workflow(Leaf())
        return Part()

    @step
    async def ask(self, ctx: Context, ev: Part) -> StopEvent:
        self.seen.append(await run_workflow(Leaf()))
        answer = await ctx.wait_for_event(HumanResponseEvent)
        return StopEvent(result=answer.response)


async def test_a_call_keeps_its_name_in_a_run_that_goes_on(flavour):
    seen: list[str] = []
    workflow = Waits(seen)
    hooks = Named()
    async with open_run(workflow, hooks=hooks, flavour=flavour) as run:
        await hooks.idle.wait()
        snapshot = run.context.to_dict()
    async with open_run(workflow, context=new_context(workflow, snapshot), hooks=Named(), flavour=flavour) as run:
        run.send_event(HumanResponseEvent(response="yes"))
        assert await run.result() == "yes"
    assert len(seen) >= 2
    assert len(set(seen)) == 1


@pytest.mark.parametrize("how", ["handed on", "cancelled"])
async def test_a_run_knows_whether_it_is_handed_on(flavour, how):
    """Also one inside of it, where its step unwinds."""
    hooks = Named()
    seen: list[bool] = []

    class Inner(Workflow):
        @step
        async def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
            ctx.write_event_to_stream(Part())
            try:
                await anyio.sleep_forever()
            finally:
                seen.append(here().is_handed_on)
            return StopEvent()

    class Outer(Workflow):
        @step
        async def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
            run = start_child_run(Inner(timeout=None), StartEvent())
            assert run is not None
            await anext(RunHandler(run).stream_events())
            ctx.write_event_to_stream(Part())
            return StopEvent(result=await run.result())

    async with open_run(Outer(timeout=None), hooks=hooks, flavour=flavour) as run:
        await anext(run.events())
        hooks.handed_on = how == "handed on"
    assert seen == [how == "handed on"]


class Elsewhere(Workflow):
    """Waits for something far away, which does nothing until `done`."""

    def __init__(self, done: anyio.Event, slot: Slot) -> None:
        super().__init__(timeout=None)
        self.done = done
        self.slot = slot
        self.child: Any = None

    @speaks("anyio")
    @step
    async def wait(self, ev: StartEvent) -> StopEvent:
        activity = current_activity()
        assert activity is not None
        try:
            await activity.wait_elsewhere(self.done.wait)
        finally:
            assert self.slot.held or anyio.get_current_task().has_pending_cancellation()
        return StopEvent(result=caller_library())


class IdleSlot(SlotHooks):
    def __init__(self, slot: Slot) -> None:
        super().__init__(slot)
        self.idle = anyio.Event()

    def on_idle(self) -> None:
        super().on_idle()
        self.idle.set()


async def test_a_step_that_waits_elsewhere_is_idle(flavour, anyio_backend):
    limiter = anyio.CapacityLimiter(1)
    slot, done = Slot(limiter), anyio.Event()
    hooks = IdleSlot(slot)
    async with open_run(Elsewhere(done, slot), hooks=hooks, flavour=flavour) as run:
        await hooks.idle.wait()
        assert run.is_idle
        assert not slot.held
        async with limiter:
            done.set()
            await anyio.wait_all_tasks_blocked()
            assert not run.is_done
            assert not run.is_idle
        # A step that speaks its own flavour does so in every run.
        assert await run.result() == anyio_backend
    slot.release()


async def test_a_step_that_waits_elsewhere_is_cancelled(flavour):
    limiter = anyio.CapacityLimiter(1)
    slot, done = Slot(limiter), anyio.Event()
    hooks = IdleSlot(slot)
    async with open_run(Elsewhere(done, slot), hooks=hooks, flavour=flavour) as run:
        await hooks.idle.wait()
        async with limiter:
            run.cancel()
            with anyio.fail_after(5), pytest.raises(WorkflowCancelledByUser):
                await run.result()


async def test_a_handler_without_a_task(flavour):
    class Inner(Workflow):
        @step
        async def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
            ctx.write_event_to_stream(Part())
            if ev.get("forever", False):
                await anyio.sleep_forever()
            return StopEvent(result=ev.n)

    class Outer(Workflow):
        @step
        async def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
            run = start_child_run(Inner(), StartEvent(n=3))
            assert run is not None
            handler = RunHandler(run)
            assert not handler.done()
            events = [type(event) async for event in handler.stream_events()]
            assert events == [Part, StopEvent]
            assert len([event async for event in handler.stream_events(expose_internal=True)]) > 2
            assert await handler == 3
            assert handler.done()
            assert handler.get_stop_event() is not None
            assert not handler.ctx.is_running

            endless = start_child_run(Inner(), StartEvent(n=3, forever=True))
            assert endless is not None
            async with RunHandler(endless) as handler:
                assert not handler.is_done()
            assert endless.is_done
            assert handler.cancelled()
            assert isinstance(handler.exception(), WorkflowCancelledByUser)
            return StopEvent(result="done")

    assert await run_workflow(Outer(), flavour=flavour) == "done"
    assert start_child_run(Inner(), StartEvent(n=3)) is None  # there is no run around

"""`ctx.store`: one state, many tasks, two libraries."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest
from pydantic import BaseModel
from workflows import Context, Workflow, step
from workflows.events import Event, StartEvent, StopEvent

from llama_corral.runtime import open_run, run_workflow

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


class Add(Event):
    pass


class Added(Event):
    pass


class Counter(Workflow):
    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Add | None:
        for _ in range(12):
            ctx.send_event(Add())
        return None

    @step(num_workers=12)
    async def add(self, ctx: Context, ev: Add) -> Added:
        async with ctx.store.edit_state() as state:
            seen = state.get("count", 0)
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
            state["count"] = seen + 1
        return Added()

    @step
    async def finish(self, ctx: Context, ev: Added) -> StopEvent | None:
        if ctx.collect_events(ev, [Added] * 12) is None:
            return None
        return StopEvent(result=await ctx.store.get("count"))


async def test_edits_do_not_lose_each_other(flavour):
    assert await run_workflow(Counter(), flavour=flavour) == 12


class Gate(Event):
    pass


class Holder(Workflow):
    @step
    async def hold(self, ctx: Context, ev: StartEvent) -> StopEvent:
        async with ctx.store.edit_state() as state:
            state["holder"] = "step"
            ctx.write_event_to_stream(Gate())
            for _ in range(10):
                await anyio.lowlevel.checkpoint()
        await anyio.sleep_forever()
        return StopEvent()


async def test_a_writer_outside_waits_for_the_step(flavour):
    """The writer outside is native on Trio, whatever the step's flavour."""
    async with open_run(Holder(), flavour=flavour) as run:
        async for event in run.events():
            if isinstance(event, Gate):
                break
        assert await run.context.store.get("holder", default=None) is None  # not committed yet
        await run.context.store.set("late", True)
        state = (await run.context.store.get_state()).model_dump()
        assert await run.context.store.get("holder") == "step", state
        assert await run.context.store.get("late") is True


class Nested(Workflow):
    @step
    async def nest(self, ctx: Context, ev: StartEvent) -> StopEvent:
        async with ctx.store.edit_state() as state:
            state["a"] = 1
            await ctx.store.set("b", 2)
        return StopEvent()


async def test_a_nested_writer_is_an_error_and_not_a_deadlock(flavour):
    with pytest.raises(RuntimeError, match="edit_state"):
        await run_workflow(Nested(), flavour=flavour)


class Settings(BaseModel):
    name: str = "unset"
    count: int = 0


class Typed(Workflow):
    @step
    async def start(self, ctx: Context[Settings], ev: StartEvent) -> StopEvent:
        async with ctx.store.edit_state() as state:
            assert isinstance(state, Settings)
            state.count += 1
            state.name = "set"
        state = await ctx.store.get_state()
        return StopEvent(result=(state.name, state.count))


async def test_typed_state(flavour):
    async with open_run(Typed(), flavour=flavour) as run:
        assert await run.result() == ("set", 1)
        assert isinstance(await run.context.store.get_state(), Settings)


class Aborts(Workflow):
    @step
    async def start(self, ctx: Context, ev: StartEvent) -> StopEvent:
        try:
            async with ctx.store.edit_state() as state:
                state["a"] = 1
                raise LookupError
        except LookupError:
            await ctx.store.set("b", 2)
        return StopEvent(result=(await ctx.store.get("a", default=None), await ctx.store.get("b")))


async def test_a_failed_edit_changes_nothing_and_frees_the_lock(flavour):
    assert await run_workflow(Aborts(), flavour=flavour) == (None, 2)


@pytest.mark.promise("P6")
async def test_a_cancelled_writer_frees_the_lock(flavour):
    async with open_run(Holder(), flavour=flavour) as run:
        async for event in run.events():
            if isinstance(event, Gate):
                break
        with anyio.CancelScope() as scope:
            scope.cancel()
            await run.context.store.set("never", True)  # cancelled in the queue
        await run.context.store.set("later", True)
        assert await run.context.store.get("never", default=None) is None

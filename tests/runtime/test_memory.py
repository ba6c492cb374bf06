"""What is left of runs that have ended: nothing (P12)."""

from __future__ import annotations

import contextlib
import gc
import weakref

import anyio
import anyio.lowlevel
import pytest
from workflows import Context, Workflow, step
from workflows.events import Event, StartEvent, StopEvent

from llama_corral.aio import open_asyncio_loop
from llama_corral.runtime import Run, open_run, run_workflow

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left"), pytest.mark.promise("P12")]


class Two(Event):
    pass


class Quick(Workflow):
    @step
    async def one(self, ctx: Context, ev: StartEvent) -> Two:
        ctx.write_event_to_stream(Two())
        await ctx.store.set("x", 1)
        return Two()

    @step
    async def two(self, ev: Two) -> StopEvent:
        await anyio.lowlevel.checkpoint()
        return StopEvent()


class Fails(Workflow):
    @step
    async def fail(self, ev: StartEvent) -> StopEvent:
        raise LookupError


@pytest.mark.parametrize("workflow_class", [Quick, Fails])
async def test_a_finished_runs_workflow_is_collectable(flavour, workflow_class):
    workflow = workflow_class()
    workflow_ref = weakref.ref(workflow)
    async with open_run(workflow, flavour=flavour) as run:
        with contextlib.suppress(LookupError):
            await run.result()
        run_ref = weakref.ref(run)
    del run, workflow
    gc.collect()
    assert run_ref() is None
    assert workflow_ref() is None


async def test_two_thousand_runs_leave_nothing(flavour):
    workflow = Quick()

    async def some(count):
        for _ in range(count):
            await run_workflow(workflow, flavour=flavour)

    async with open_asyncio_loop():
        await some(200)
        gc.collect()
        # Other tests' parameters may be exceptions, whose tracebacks keep the runs that raised them.
        known = {id(obj) for obj in gc.get_objects() if type(obj) is Run}
        before, before_ours = len(gc.get_objects()), sum(map(ours, gc.get_objects()))
        await some(2000)
        gc.collect()
        after, after_ours = len(gc.get_objects()), sum(map(ours, gc.get_objects()))
        assert after_ours - before_ours < 20
        # Of anything else less than one object for two runs: what a process with other tests behind it does by itself.
        assert after - before < 1000
        assert not [obj for obj in gc.get_objects() if type(obj) is Run and id(obj) not in known]


def ours(obj):
    """What a run's history would be made of: events, ticks and states; not what a larger process does besides."""
    return str(type(obj).__module__).partition(".")[0] in (
        "workflows",
        "llama_corral",
        "tests",
        __name__.partition(".")[0],
    )


async def test_a_long_run_keeps_no_history(flavour):
    class Loop(Workflow):
        def __init__(self):
            super().__init__(timeout=None)
            self.sizes = []

        @step
        async def turn(self, ctx: Context, ev: StartEvent | Two) -> Two | StopEvent:
            count = ev.get("n", 0)
            ctx.write_event_to_stream(Event(n=count))
            if count in (200, 1000):
                gc.collect()
                self.sizes.append(sum(map(ours, gc.get_objects())))
            return StopEvent() if count == 1000 else Two(n=count + 1)

    workflow = Loop()
    async with open_run(workflow, flavour=flavour, event_buffer=100) as run:
        await run.result()
        assert run.statistics().lost_events > 0
    assert workflow.sizes[1] - workflow.sizes[0] < 200

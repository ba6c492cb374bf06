"""What is left of runs that have ended: nothing (P12)."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import weakref

import anyio
import anyio.lowlevel
import pytest
from workflows import Context, Workflow, step
from workflows.events import Event, StartEvent, StopEvent

from llama_corral.runtime import open_run

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


SOAK = """
import gc, sys
import anyio
from workflows import Context, Workflow, step
from workflows.events import StartEvent, StopEvent
from llama_corral.aio import open_asyncio_loop
from llama_corral.runtime import Run, run_workflow

class Quick(Workflow):
    @step
    async def one(self, ctx: Context, ev: StartEvent) -> StopEvent:
        await ctx.store.set("x", 1)
        return StopEvent()

async def some(count):
    for _ in range(count):
        await run_workflow(workflow, flavour=sys.argv[2])

async def main():
    async with open_asyncio_loop():
        await some(200)
        gc.collect()
        before = len(gc.get_objects())
        await some(2000)
        gc.collect()
        print(len(gc.get_objects()) - before, sum(type(obj) is Run for obj in gc.get_objects()))

workflow = Quick()
anyio.run(main, backend=sys.argv[1])
"""


@pytest.mark.process
def test_two_thousand_runs_leave_nothing(anyio_backend, flavour):
    """In a process of its own: what other tests left behind in this one moves by itself."""
    done = subprocess.run(
        [sys.executable, "-c", SOAK, anyio_backend, flavour], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    grown, runs = map(int, done.stdout.split())
    assert grown < 200
    assert runs == 0


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

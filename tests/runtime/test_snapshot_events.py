"""A run can be snapshotted at any of its events, and none that is on its way then is lost to the run that is resumed.

Upstream before 2.26 loses them: it is what sets the oldest version that pyproject allows.
"""

from __future__ import annotations

import json

import anyio
import pytest
from workflows import Context, Workflow, catch_error, step
from workflows.events import Event, StartEvent, StepFailedEvent, StepStateChanged, StopEvent
from workflows.retry_policy import retry_policy, stop_after_attempt, wait_fixed

from llama_corral.runtime import RunHooks, open_run, run_workflow

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


class Item(Event):
    n: int = 0


class Done(Event):
    n: int


class Returns(Workflow):
    @step
    async def first(self, ev: StartEvent) -> Item:
        return Item(n=1)

    @step
    async def second(self, ev: Item) -> StopEvent:
        return StopEvent(result=ev.n)


class Sends(Returns):
    @step
    async def first(self, ctx: Context, ev: StartEvent) -> Item | None:
        ctx.send_event(Item(n=1), step="second")
        await anyio.lowlevel.checkpoint()
        return None


class Splits(Workflow):
    @step
    async def split(self, ev: StartEvent) -> list[Item]:
        return [Item(n=n) for n in range(3)]

    @step(num_workers=2)
    async def work(self, ev: Item) -> Done:
        return Done(n=ev.n)

    @step
    async def join(self, done: list[Done]) -> StopEvent:
        return StopEvent(result=sum(event.n for event in done) - 2)


class Rescues(Workflow):
    @step(retry_policy=retry_policy(wait=wait_fixed(0.001), stop=stop_after_attempt(2)))
    async def first(self, ev: StartEvent) -> StopEvent:
        raise ConnectionError

    @catch_error(for_steps=["first"])
    async def rescue(self, ev: StepFailedEvent) -> Item:
        return Item(n=ev.attempts - 1)

    @step
    async def last(self, ev: Item) -> StopEvent:
        return StopEvent(result=ev.n)


class Snapshots(RunHooks):
    def __init__(self):
        self.run = None
        self.taken = []

    def on_event(self, event):
        if isinstance(event, StepStateChanged):
            self.taken.append((f"{event.name} {event.step_state.value}", json.dumps(self.run.context.to_dict())))


@pytest.mark.parametrize("kind", [Returns, Sends, Splits, Rescues])
@pytest.mark.promise("P2")
async def test_no_event_is_lost_whenever_a_run_is_snapshotted(flavour, kind):
    workflow = kind()
    hooks = Snapshots()
    async with open_run(workflow, hooks=hooks, flavour=flavour, internal_events=True) as hooks.run:
        assert await hooks.run.result() == 1
    assert len(hooks.taken) >= 3
    for moment, snapshot in hooks.taken:
        context = Context.from_dict(workflow, json.loads(snapshot))
        with anyio.move_on_after(5) as scope:
            assert await run_workflow(workflow, context=context, flavour=flavour) == 1
        assert not scope.cancelled_caught, f"an event was lost to the run that was resumed at: {moment}"

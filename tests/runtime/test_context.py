"""A Context carries state from run to run, and a run from one place to another."""

from __future__ import annotations

import json

import anyio
import pytest
from workflows import Context, Workflow, step
from workflows.errors import ContextStateError, WorkflowCancelledByUser
from workflows.events import Event, HumanResponseEvent, StartEvent, StopEvent

from llama_corral.runtime import make_run, new_context, open_run, run_workflow

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


class Counter(Workflow):
    @step
    async def count(self, ctx: Context, ev: StartEvent) -> StopEvent:
        async with ctx.store.edit_state() as state:
            state["count"] = state.get("count", 0) + 1
        return StopEvent(result=await ctx.store.get("count"))


async def test_a_context_is_reused(flavour):
    workflow = Counter()
    context = new_context(workflow)
    await context.store.set("count", 10)
    assert await run_workflow(workflow, context=context, flavour=flavour) == 11
    assert await run_workflow(workflow, context=context, flavour=flavour) == 12
    async with open_run(workflow, context=context, flavour=flavour) as run:
        assert run.context is context
        assert await run.result() == 13
    copy = Context.from_dict(workflow, json.loads(json.dumps(context.to_dict())))
    assert await run_workflow(workflow, context=copy, flavour=flavour) == 14
    assert await context.store.get("count") == 13
    another = new_context(workflow, context.to_dict())
    await another.store.set("count", 20)
    assert another.to_dict()["state"] != context.to_dict()["state"]
    assert await run_workflow(workflow, context=another, flavour=flavour) == 21
    assert await run_workflow(workflow, context=Context(workflow), flavour=flavour) == 1


async def test_the_context_of_a_run_without_one(flavour):
    workflow = Counter()
    async with open_run(workflow, flavour=flavour) as run:
        await run.result()
    assert await run_workflow(workflow, context=run.context, flavour=flavour) == 2


class Part(Event):
    n: int


class Asks(Workflow):
    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Part:
        await ctx.store.set("topic", ev.get("topic"))
        return Part(n=7)

    @step
    async def ask(self, ctx: Context, ev: Part) -> StopEvent:
        answer = await ctx.wait_for_event(HumanResponseEvent, requirements={"user": "ada"})
        return StopEvent(result=[await ctx.store.get("topic"), ev.n, answer.response])


@pytest.mark.promise("P7")
async def test_a_run_that_waits_is_resumed_elsewhere(flavour):
    async with open_run(Asks(), topic="llamas", flavour=flavour) as run:
        await anyio.wait_all_tasks_blocked()
        assert run.is_idle
        stored = json.dumps(run.context.to_dict())
    elsewhere = Asks()
    async with open_run(elsewhere, context=Context.from_dict(elsewhere, json.loads(stored)), flavour=flavour) as again:
        again.send_event(HumanResponseEvent(response="no", user="bob"))  # before the step said whom it wants
        again.send_event(HumanResponseEvent(response="yes", user="ada"))
        assert await again.result() == ["llamas", 7, "yes"]


class Works(Workflow):
    def __init__(self, stuck, **kwargs):
        super().__init__(**kwargs)
        self.stuck = stuck

    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Part:
        return Part(n=3)

    @step
    async def work(self, ctx: Context, ev: Part) -> StopEvent:
        if self.stuck:
            await anyio.sleep_forever()
        return StopEvent(result=ev.n)


async def test_a_run_snapshotted_while_working_does_that_step_again(flavour):
    async with open_run(Works(stuck=True), flavour=flavour) as run:
        await anyio.wait_all_tasks_blocked()
        stored = run.context.to_dict()
    elsewhere = Works(stuck=False)
    context = Context.from_dict(elsewhere, stored)
    assert await run_workflow(elsewhere, context=context, flavour=flavour) == 3


async def test_a_cancelled_run_can_go_on(flavour):
    workflow = Works(stuck=True)
    async with open_run(workflow, flavour=flavour) as run:
        await anyio.wait_all_tasks_blocked()
        run.cancel()
        with pytest.raises(WorkflowCancelledByUser):
            await run.result()
    workflow.stuck = False
    assert await run_workflow(workflow, context=run.context, flavour=flavour) == 3


async def test_a_context_runs_one_run_at_a_time(flavour):
    workflow = Works(stuck=True)
    context = Context(workflow)
    async with open_run(workflow, context=context, flavour=flavour):
        with pytest.raises(ContextStateError, match="not ended"):
            await run_workflow(workflow, context=context, flavour=flavour)


async def test_what_was_held_stays_with_a_closed_run(flavour):
    """Its owner hands it to whoever resumes the run."""
    async with open_run(Works(stuck=True), flavour=flavour) as run:
        run.send_event(HumanResponseEvent(response="early"))
        await anyio.wait_all_tasks_blocked()
    assert [event.response for event in run.held_events()] == ["early"]
    undriven = make_run(Works(stuck=True))
    undriven.send_event(HumanResponseEvent(response="earlier"))
    assert [event.response for event in undriven.held_events()] == ["earlier"]


async def test_upstreams_face_works_outside_of_a_run(flavour):
    async with open_run(Asks(), topic="x", flavour=flavour) as run:
        await anyio.wait_all_tasks_blocked()
        assert run.context.is_running
        assert await run.context.running_steps() == []
        run.context.send_event(HumanResponseEvent(response="face", user="ada"))
        assert await run.result() == ["x", 7, "face"]
        assert not run.context.is_running
        events = [event async for event in run.context.stream_events()]
        assert isinstance(events[-1], StopEvent)

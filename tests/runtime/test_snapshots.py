"""A run is stored as JSON at any moment and goes on elsewhere: nothing that had ended is done again."""

from __future__ import annotations

import asyncio
import functools
import json
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from workflows import Context
from workflows.events import Event, StepState, StepStateChanged, WorkflowIdleEvent

from llama_corral.aio import open_asyncio_loop
from llama_corral.runtime import RunHooks, RunOptions, StructuredRuntime, make_run, new_context

from .journeys import JOURNEYS, go_on, outcome_of

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left"), pytest.mark.promise("P7")]

ELSEWHERE = {"trio-anyio": ("asyncio", "anyio"), "trio-asyncio": ("trio", "anyio"), "asyncio": ("trio", "asyncio")}


@dataclass(frozen=True)
class Moment:
    """What can be seen of a run, and what is stored of it: the snapshot, the calls whose end it knows, and the events
    from outside that the run had not taken, which are their sender's affair."""

    what: str
    stored: dict[str, Any]
    ended: set[str]
    held: list[Event]


class Photographer(RunHooks):
    """Keeps every moment of a run: each published event, and when the run is idle."""

    def __init__(self, workflow):
        self.workflow = workflow
        self.run = None
        self.ended = set()
        self.taken = []

    def take(self, what):
        if self.run.broker_state.is_running:  # until the end
            stored = json.loads(json.dumps(self.run.context.to_dict()))
            self.taken.append(Moment(what, stored, set(self.ended), self.run.held_events()))

    def on_event(self, event):
        what = type(event).__name__
        if isinstance(event, StepStateChanged):
            what = f"{event.name} {event.step_state.value}"
            if event.step_state is StepState.NOT_RUNNING:
                self.ended |= {call for call in self.workflow.ended if call.split()[0] == event.name}
        self.take(what)

    def on_step_done(self):
        assert not self.run.is_done
        self.take("a step has ended")

    def on_idle(self):
        self.take("idle")


async def photographed(name, flavour, *, to_the_end, stored=None, answers=()):
    """The moments of a run that goes to its end, or as far as it gets before it is left."""
    journey = JOURNEYS[name]
    workflow = journey.make(stuck=not to_the_end)
    hooks = Photographer(workflow)
    async with AsyncExitStack() as stack:
        if flavour == "asyncio":
            await stack.enter_async_context(open_asyncio_loop())
        hooks.run = run = make_run(
            workflow,
            hooks=hooks,
            context=new_context(workflow, stored) if stored else None,
            options=RunOptions(flavour, internal_events=True),
            start_kwargs=journey.start,
        )
        for answer in answers:
            run.send_event(answer)
        async with anyio.create_task_group() as group:
            group.start_soon(run.drive)
            if to_the_end:
                assert await outcome_of(run.result()) == journey.outcome()
            else:
                await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
    return hooks.taken


async def in_a_thread(backend, function, *args):
    """In an event loop of another library."""
    return await anyio.to_thread.run_sync(functools.partial(anyio.run, function, *args, backend=backend))


@pytest.mark.parametrize("name", JOURNEYS)
async def test_a_snapshot_of_any_moment_goes_on_elsewhere(flavour, configuration, name):
    journey = JOURNEYS[name]
    backend, other = ELSEWHERE[configuration]

    async def all_go_on(moments, answers, ended=frozenset()):
        assert moments
        for moment in moments:
            held = [*moment.held, *answers]
            outcome, ended_there = await in_a_thread(backend, go_on, name, moment.stored, other, held)
            assert outcome == journey.outcome(), moment
            assert not (moment.ended | ended) & set(ended_there), moment

    left = await photographed(name, flavour, to_the_end=False, answers=journey.before)
    await all_go_on(left, journey.answers)
    to_the_end = {"to_the_end": True, "answers": [*journey.before, *journey.answers]}
    await all_go_on(await photographed(name, flavour, **to_the_end), [])
    # And once more, from wherever the run came after it was left.
    last = left[-1]
    again = {"to_the_end": True, "stored": last.stored, "answers": [*last.held, *journey.answers]}
    await all_go_on(await photographed(name, flavour, **again), [], last.ended)


@pytest.mark.process
@pytest.mark.parametrize("name", ["asks-ada", "members"])
async def test_in_another_process_on_another_backend(flavour, configuration, name):
    left = await photographed(name, flavour, to_the_end=False)
    command = [sys.executable, "-m", "tests.runtime.journeys", name, *ELSEWHERE[configuration]]
    root = Path(__file__).parents[2]
    done = await anyio.run_process(command, input=json.dumps(left[-1].stored).encode(), cwd=root, stderr=None)
    outcome, ended = json.loads(done.stdout)
    assert outcome == JOURNEYS[name].outcome()
    assert not left[-1].ended & set(ended)


# Upstream's snapshots and ours are the same thing


async def upstream_goes_on(name, stored, answers):
    journey = JOURNEYS[name]
    workflow = journey.make()
    handler = workflow.run(ctx=Context.from_dict(workflow, stored))
    left = [*answers]
    if not any(answer.items() for answer in answers):
        # It has nothing to do and says nothing. An answer that is for somebody waits until it has asked whom it is for.
        handler.ctx.send_event(left.pop(0))
    async with asyncio.timeout(10):
        async for event in handler.stream_events(expose_internal=True):
            if left and isinstance(event, WorkflowIdleEvent):  # one after the other: it would drop or overwrite them
                handler.ctx.send_event(left.pop(0))
        return await outcome_of(handler)


async def upstream_photographed(name):
    journey = JOURNEYS[name]
    workflow = journey.make(stuck=True)
    handler = workflow.run(**journey.start)
    async with asyncio.timeout(10):
        async for event in handler.stream_events(expose_internal=True):
            if isinstance(event, WorkflowIdleEvent):
                break
    stored = json.loads(json.dumps(handler.ctx.to_dict()))
    await handler.cancel_run()
    return stored, workflow.ended


IDLE_IN_BETWEEN = ["asks", "asks-ada", "members", "takes", "gathers"]


@pytest.mark.parametrize("name", IDLE_IN_BETWEEN)
async def test_a_run_of_ours_goes_on_upstream_and_back(flavour, name):
    journey = JOURNEYS[name]
    left = await photographed(name, flavour, to_the_end=False)
    assert left[-1].what == "idle"
    args = name, left[-1].stored, journey.answers
    assert await in_a_thread("asyncio", upstream_goes_on, *args) == journey.outcome()

    stored, ended = await in_a_thread("asyncio", upstream_photographed, name)
    outcome, ended_here = await go_on_here(name, stored, flavour)
    assert outcome == journey.outcome()
    assert not set(ended) & set(ended_here)


@pytest.mark.parametrize("name", ["asks-ada", "answered-by-ada", "gives-up", "fails-answered", "members"])
async def test_a_run_goes_on_in_plain_run(flavour, configuration, name):
    if configuration != "asyncio":
        pytest.skip("plain run() is asyncio's")
    journey = JOURNEYS[name]
    for moment in await photographed(name, flavour, to_the_end=False, answers=journey.before):
        async with StructuredRuntime() as runtime:
            workflow = journey.make(runtime=runtime)
            handler = workflow.run(ctx=Context.from_dict(workflow, moment.stored))
            for answer in (*moment.held, *journey.answers):
                handler.ctx.send_event(answer)
            assert await outcome_of(handler) == journey.outcome()
        assert not moment.ended & set(workflow.ended)


async def go_on_here(name, stored, flavour):
    async with AsyncExitStack() as stack:
        if flavour == "asyncio":
            await stack.enter_async_context(open_asyncio_loop())
        return await go_on(name, stored, flavour)

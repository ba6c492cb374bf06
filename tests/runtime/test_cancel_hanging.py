"""A run that hangs at a known place is cancelled in every way: the place is left clean and can be passed again (P6)."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import anyio
import anyio.from_thread
import pytest
from anyio.lowlevel import checkpoint
from workflows import Context, Workflow, step
from workflows.errors import WorkflowCancelledByUser
from workflows.events import (
    HumanResponseEvent,
    InputRequiredEvent,
    StartEvent,
    StopEvent,
    WorkflowCancelledEvent,
)
from workflows.resource import Resource

from llama_corral.exceptions import RunClosed
from llama_corral.runtime import RunHooks, open_run, run_workflow

from .hanging import PLACES, Hanging, Next, under_test

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left"), pytest.mark.promise("P6")]


class Left(Exception):
    pass


@pytest.mark.parametrize("way", ["scope", "cancel", "leave", "deadline"])
@pytest.mark.parametrize("place", PLACES)
async def test_hanging(flavour, tasks, place, way):
    workflow = place(flavour)
    under_test[:] = [workflow]
    before = tasks()
    async with workflow.surroundings():
        around = tasks()
        with anyio.CancelScope() as scope, suppress(Left):
            async with open_run(workflow, flavour=flavour, **workflow.options()) as run:
                await anyio.wait_all_tasks_blocked()
                assert (sum(workflow.ledger.began.values()), run.is_idle) == (place.begins, place.idle)
                if way == "scope":
                    scope.cancel()
                elif way == "deadline":
                    scope.deadline = anyio.current_time()
                elif way == "leave":
                    raise Left
                else:
                    run.cancel()
                    with pytest.raises(WorkflowCancelledByUser):
                        await run.result()
                    raise Left
                await run.result()
        assert tasks() == around
        with pytest.raises(WorkflowCancelledByUser if way == "cancel" else RunClosed):
            _ = run.stop_event
        with anyio.fail_after(5):
            await run.context.store.set("free", True)
    assert tasks() == before
    assert workflow.ledger.ended == workflow.ledger.began
    assert workflow.ledger.tidied == workflow.ledger.began
    workflow.opened = True
    async with open_run(workflow, flavour=flavour, **workflow.options()) as run:
        assert await run.result() == "done"


class Tidying(Hanging):
    """Its clean-up takes as long as it is not let go."""

    def __init__(self, flavour) -> None:
        super().__init__(flavour)
        self.tidying = anyio.Event()
        self.let_go = anyio.Event()

    @step
    async def work(self, ev: StartEvent) -> StopEvent:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                self.tidying.set()
                await self.let_go.wait()
                self.ledger.tidied["work"] += 1
        return StopEvent()


@pytest.mark.parametrize("second", ["scope", "cancel", "leave"])
@pytest.mark.parametrize("first", ["scope", "cancel"])
async def test_cancelled_once_more_while_it_unwinds(configuration, first, second):
    if configuration == "trio-asyncio":
        pytest.skip("a shield means nothing to a hosted task")
    workflow = Tidying("anyio")
    left = []

    async def own(*, task_status):
        with scope, suppress(Left):
            async with open_run(workflow) as run:
                task_status.started(run)
                with body:
                    await anyio.sleep_forever()
                raise Left
        left.append(True)

    scope, body = anyio.CancelScope(), anyio.CancelScope()
    async with anyio.create_task_group() as group:
        run = await group.start(own)
        await anyio.wait_all_tasks_blocked()
        ways = {"scope": scope.cancel, "cancel": run.cancel, "leave": body.cancel}
        try:
            for way in (first, second, first):
                ways[way]()
                await workflow.tidying.wait()
                await anyio.wait_all_tasks_blocked()
                assert not left
            assert run.is_done is ("cancel" in (first, second))  # the ending is known, and a step still unwinds
            assert not workflow.ledger.tidied
        finally:
            workflow.let_go.set()
            body.cancel()
    assert left
    assert workflow.ledger.tidied == {"work": 1}
    with pytest.raises(WorkflowCancelledByUser if "cancel" in (first, second) else RunClosed):
        _ = run.stop_event


class Inside(RunHooks):
    """The run's owner, whose code calls `act` once, at the place that is named."""

    def __init__(self, place, act) -> None:
        self.place = place
        self._act = act
        self.heard = []

    def here(self, place):
        if place == self.place:
            self.place = None
            self._act()

    async def before_step(self, step):
        self.here(f"before {step}")

    def on_event(self, event):
        self.heard.append(event)
        self.here(type(event).__name__)

    def on_idle(self):
        self.here("idle")


class Answer(HumanResponseEvent):
    pass


async def make_from_inside() -> str:
    await checkpoint()
    inside[0].here("resource")
    return "made"


inside: list[Inside] = []


class Child(Workflow):
    @step
    async def work(self, ev: StartEvent) -> StopEvent:
        inside[0].here("child")
        await checkpoint()
        return StopEvent()


class FromInside(Hanging):
    @step
    async def work(self, ctx: Context, ev: StartEvent) -> HumanResponseEvent:
        async with self.ledger.working("work"):
            inside[0].here("work")
            ctx.write_event_to_stream(Next())
            await checkpoint()
            ctx.write_event_to_stream(Next())
            return HumanResponseEvent(response="")

    @step
    def crunch(self, ctx: Context, ev: HumanResponseEvent) -> InputRequiredEvent:
        inside[0].here("thread")
        ctx.write_event_to_stream(Next())
        return InputRequiredEvent(prefix="?")

    @step
    async def answered(self, ev: Answer, made: Annotated[str, Resource(make_from_inside)]) -> StopEvent:
        async with self.ledger.working("answered"):
            await run_workflow(Child(), flavour=self.flavour)
            return StopEvent(result="done")


@pytest.mark.parametrize("way", ["scope", "cancel"])
@pytest.mark.parametrize(
    "place",
    [
        "before work",
        "work",
        "Next",
        "before crunch",
        "thread",
        "InputRequiredEvent",
        "idle",
        "before answered",
        "resource",
        "child",
        "StopEvent",
    ],
)
async def test_cancelled_from_inside(flavour, tasks, place, way):
    """By the run's own code: a step, a thread, a hook in the middle of publishing, a child."""
    workflow = FromInside(flavour)
    before = tasks()

    def cancel():
        if place == "thread":
            anyio.from_thread.run_sync(cancel_here)
        else:
            cancel_here()

    def cancel_here():
        scope.cancel() if way == "scope" else run.cancel()

    with anyio.CancelScope() as scope, suppress(WorkflowCancelledByUser):
        inside[:] = [Inside(place, cancel)]
        async with open_run(workflow, flavour=flavour, hooks=inside[0]) as run:
            async for event in run.events():
                if isinstance(event, InputRequiredEvent):
                    with suppress(RunClosed):
                        run.send_event(Answer(response="yes"))
            await run.result()
    assert tasks() == before
    assert inside[0].place is None
    assert workflow.ledger.ended == workflow.ledger.began
    seen = [event async for event in run.events()]
    assert seen == [event for event in inside[0].heard if event in seen]
    if way == "scope":
        assert scope.cancelled_caught or place == "StopEvent"
    if place == "StopEvent":  # the ending won
        assert run.stop_event.result == "done"
    else:
        with pytest.raises(WorkflowCancelledByUser if way == "cancel" else RunClosed):
            _ = run.stop_event
        assert [type(event) for event in seen[-1:]].count(WorkflowCancelledEvent) == (way == "cancel")

"""What the owner of a run is told when a step has ended, and what a snapshot has then."""

from __future__ import annotations

import json
import time
from contextlib import AsyncExitStack

import anyio
import anyio.lowlevel
import pytest
from workflows import Context, Workflow, catch_error, step
from workflows.events import Event, HumanResponseEvent, StartEvent, StepFailedEvent, StopEvent
from workflows.retry_policy import retry_policy, stop_after_attempt, wait_fixed

from llama_corral.aio import open_asyncio_loop
from llama_corral.runtime import RunHooks, RunOptions, make_run, open_run, run_workflow

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]

PATIENCE = 5.0


class Item(Event):
    n: int = 0


class Done(Event):
    n: int = 0


class Told(RunHooks):
    """Notes in one list what the hooks are told and what the steps do."""

    def __init__(self):
        self.run = None
        self.notes = []
        self.idle = anyio.Event()

    async def before_step(self, step):
        self.notes.append(f"{step} starts")

    def on_event(self, event):
        self.notes.append(type(event).__name__)

    def on_step_done(self):
        self.notes.append("done")

    def on_unwinding(self):
        self.notes.append("unwinding")

    def on_idle(self):
        self.idle.set()


async def until(condition):
    """In either library: looks whenever others have run."""
    while not condition():  # noqa: ASYNC110 -- no event is of both libraries
        await anyio.lowlevel.checkpoint()


async def notes_of(workflow, flavour, **start):
    hooks = Told()
    async with open_run(workflow, hooks=hooks, flavour=flavour, **start) as run:
        try:
            await run.result()
        except ConnectionError:
            hooks.notes.append("raised")
    return hooks.notes


class Chain(Workflow):
    @step
    async def first(self, ctx: Context, ev: StartEvent) -> Item:
        ctx.write_event_to_stream(Done())
        return Item()

    @step
    async def second(self, ev: Item) -> StopEvent:
        return StopEvent()


async def test_between_what_a_step_published_and_what_follows_it(flavour):
    notes = await notes_of(Chain(), flavour)
    assert notes == ["first starts", "Done", "done", "second starts", "StopEvent"]  # and not for the last step


class Retries(Workflow):
    def __init__(self, handled):
        super().__init__()
        self.handled = handled
        self.calls = 0

    @step(retry_policy=retry_policy(wait=wait_fixed(0), stop=stop_after_attempt(2)))
    async def first(self, ev: StartEvent) -> Item:
        self.calls += 1
        if self.calls == 1 or self.handled:
            raise ConnectionError
        return Item()

    @step
    async def second(self, ev: Item) -> StopEvent:
        return StopEvent()

    @catch_error
    async def handle(self, ev: StepFailedEvent) -> Item:
        return Item()


async def test_not_where_a_step_is_tried_again(flavour):
    assert await notes_of(Retries(handled=False), flavour) == [
        *("first starts", "first starts", "done", "second starts", "StopEvent")
    ]


async def test_where_an_error_handler_goes_on_and_not_where_the_run_fails(flavour):
    assert await notes_of(Retries(handled=True), flavour) == [
        *("first starts", "first starts", "done", "handle starts", "done", "second starts", "StopEvent")
    ]

    class Fails(Workflow):
        @step
        async def first(self, ev: StartEvent) -> StopEvent:
            raise ConnectionError

    assert await notes_of(Fails(), flavour) == ["first starts", "WorkflowFailedEvent", "raised"]


class Waits(Workflow):
    @step
    async def wait(self, ctx: Context, ev: StartEvent) -> Item:
        await ctx.wait_for_event(HumanResponseEvent, timeout=3600)
        return Item()

    @step
    async def last(self, ev: Item) -> StopEvent:
        return StopEvent()


async def test_not_where_a_step_begins_to_wait(flavour):
    hooks = Told()
    async with open_run(Waits(timeout=None), hooks=hooks, flavour=flavour) as run:
        with anyio.fail_after(PATIENCE):
            await hooks.idle.wait()
            assert hooks.notes == ["wait starts"]
            assert run.is_at_rest
            assert 3500 < run.next_timer - time.time() <= 3601
            run.send_event(HumanResponseEvent())
            assert not run.is_at_rest
            await run.result()
    assert hooks.notes == ["wait starts", "wait starts", "done", "last starts", "StopEvent"]


async def test_the_next_timer_is_the_workflows_own_timeout_too(flavour):
    hooks = Told()
    async with open_run(Waits(timeout=60), hooks=hooks, flavour=flavour) as run:
        assert run.next_timer is None
        with anyio.fail_after(PATIENCE):
            await hooks.idle.wait()
        assert 50 < run.next_timer - time.time() <= 61


class Sends(Workflow):
    """Sends, and works on until the test lets it end."""

    def __init__(self, go=None):
        super().__init__()
        self.go = go or set()
        self.taken = 0

    @step
    async def send(self, ctx: Context, ev: StartEvent) -> Item | Done:
        ctx.send_event(Item())
        await until(lambda: "on" in self.go)
        return Done()

    @step
    async def take(self, ev: Item) -> None:
        self.taken += 1

    @step
    async def last(self, ev: Done) -> StopEvent:
        return StopEvent(result=self.taken)


async def test_a_run_whose_step_has_sent_and_works_is_half_sent(flavour):
    workflow = Sends()
    seen = []

    class Looks(RunHooks):
        def on_step_done(self):
            seen.append(run.has_half_sent)
            workflow.go.add("on")

    async with open_run(workflow, hooks=Looks(), flavour=flavour) as run:
        assert await run.result() == 1
    assert seen == [True, False]


# Nested runs


class Inner(Workflow):
    @step
    async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
        got = await ctx.wait_for_event(HumanResponseEvent)
        return StopEvent(result=got.response)


class Outer(Workflow):
    def __init__(self):
        super().__init__(timeout=None)
        self.notes = []
        self.inner = None
        self.waits = anyio.Event()

    @step
    async def first(self, ev: StartEvent) -> Item:
        self.notes.append("first")
        return Item()

    @step
    async def nest(self, ev: Item) -> Done:
        self.notes.append("nest")
        async with open_run(Inner(timeout=None), flavour="anyio") as self.inner:
            return Done(n=int(await self.inner.result()))

    @step
    async def last(self, ev: Done) -> StopEvent:
        return StopEvent(result=ev.n)


async def test_a_step_that_waits_for_an_idle_run_is_not_at_rest_and_starts_again(flavour):
    async def left():
        hooks = Told()
        async with open_run(Outer(), hooks=hooks) as run:
            with anyio.fail_after(PATIENCE):
                await hooks.idle.wait()
            assert run.is_idle
            assert not run.is_at_rest
            return json.loads(json.dumps(run.context.to_dict()))

    stored = await left()
    workflow = Outer()
    hooks = Told()
    async with open_run(workflow, context=Context.from_dict(workflow, stored), hooks=hooks) as run:
        with anyio.fail_after(PATIENCE):
            await hooks.idle.wait()
            workflow.inner.send_event(HumanResponseEvent(response="7"))
            assert await run.result() == 7
    assert workflow.notes == ["nest"]


async def test_a_run_that_waits_for_its_turn_is_not_at_rest(flavour):
    workflow = Waits(timeout=None, num_concurrent_runs=1)
    first, second = Told(), Told()
    async with open_run(workflow, hooks=first, flavour=flavour) as one:
        with anyio.fail_after(PATIENCE):
            await first.idle.wait()
        async with open_run(workflow, hooks=second, flavour=flavour) as other:
            with anyio.fail_after(PATIENCE):
                await second.idle.wait()
            assert one.is_at_rest
            assert other.is_idle
            assert not other.is_at_rest


# Unwinding


class Lingers(Workflow):
    """One step ends the run, or not, while the other takes its time over its cancellation."""

    def __init__(self, *, ends):
        super().__init__(timeout=None)
        self.ends = ends
        self.lingers = False

    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item | None:
        ctx.send_event(Item(n=1))
        ctx.send_event(Item(n=2))
        return None

    @step
    async def work(self, ev: Item) -> StopEvent | None:
        if ev.n == 1:
            await until(lambda: self.lingers and self.ends)
            return StopEvent(result="ended")
        try:
            self.lingers = True
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)


@pytest.mark.parametrize("how", ["by itself", "cancelled"])
@pytest.mark.promise("P6")
async def test_the_owner_hears_that_steps_are_still_unwinding(flavour, how):
    hooks = Told()
    workflow = Lingers(ends=how == "by itself")
    async with AsyncExitStack() as stack:
        if flavour == "asyncio":
            await stack.enter_async_context(open_asyncio_loop())
        run = make_run(workflow, hooks=hooks, options=RunOptions(flavour), start_kwargs={})
        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run.drive)
                if how == "cancelled":
                    await until(lambda: workflow.lingers)
                    tasks.cancel_scope.cancel()
    assert hooks.notes.count("unwinding") == 1
    assert hooks.notes[-1] == "unwinding"
    assert "unwinding" not in await notes_of(Chain(), flavour)


async def test_a_snapshot_from_the_hook_goes_on_with_the_next_step(flavour):
    class Keeps(RunHooks):
        stored = None

        def on_step_done(self):
            self.stored = json.dumps(hooks.run.context.to_dict())

    hooks = Keeps()
    async with open_run(Chain(), hooks=hooks, flavour=flavour) as hooks.run:
        await hooks.run.result()
    workflow = Chain()
    again = Told()
    context = Context.from_dict(workflow, json.loads(hooks.stored))
    await run_workflow(workflow, context=context, hooks=again, flavour=flavour)
    assert again.notes == ["second starts", "StopEvent"]

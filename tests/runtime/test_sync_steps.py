"""Sync steps: what they may call from their thread, and what becomes of them when nobody waits any more.

`anyio.from_thread.run` is the way from a sync step to everything that is awaited, the store for one.
"""

from __future__ import annotations

import asyncio
import functools
import threading

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
from workflows import Context, Workflow, step
from workflows.errors import WorkflowCancelledByUser
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

from llama_corral.runtime import open_run, run_workflow

from .compare import Case, check, on_ours, on_upstream

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


class Item(Event):
    n: int = 0


class Done(Event):
    n: int = 0


class Note(Event):
    text: str


async def edit(ctx):
    async with ctx.store.edit_state() as state:
        state["edited"] = state["a"]["b"] + 1


async def read(ctx):
    return (await ctx.store.get_state()).to_dict()


class Store(Workflow):
    @step
    def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
        anyio.from_thread.run(ctx.store.set, "a.b", 1)
        anyio.from_thread.run(edit, ctx)
        return StopEvent(result=(anyio.from_thread.run(ctx.store.get, "a"), anyio.from_thread.run(read, ctx)))


async def test_the_store(flavour):
    assert await run_workflow(Store(), flavour=flavour) == ({"b": 1}, {"a": {"b": 1}, "edited": 2})


class Crowd(Workflow):
    """Threads and tasks add to one number."""

    @step
    async def start(self, ev: StartEvent) -> list[Item | Done]:
        return [*(Item() for _ in range(8)), *(Done() for _ in range(8))]

    @step(num_workers=8)
    def in_thread(self, ctx: Context, ev: Item) -> HumanResponseEvent:
        self.add_from_thread(ctx)
        return HumanResponseEvent()

    def add_from_thread(self, ctx):
        anyio.from_thread.run(self.add, ctx)

    @step(num_workers=8)
    async def in_task(self, ctx: Context, ev: Done) -> HumanResponseEvent:
        await self.add(ctx)
        return HumanResponseEvent()

    async def add(self, ctx):
        async with ctx.store.edit_state() as state:
            seen = state.get("count", 0)
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
            state["count"] = seen + 1

    @step
    async def finish(self, ctx: Context, all_of_them: list[HumanResponseEvent]) -> StopEvent:
        return StopEvent(result=await ctx.store.get("count"))


class CrowdOfLoops(Crowd):
    """The same through a loop in each thread: what was written for upstream, where there is no other way."""

    def add_from_thread(self, ctx):
        asyncio.run(self.add(ctx))


@pytest.mark.parametrize("make", [Crowd, CrowdOfLoops])
async def test_threads_and_tasks_do_not_lose_each_others_edits(flavour, make):
    for _ in range(5):
        assert await run_workflow(make(), flavour=flavour) == 16


class Asks(Workflow):
    @step
    def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
        wait = functools.partial(ctx.wait_for_event, HumanResponseEvent, waiter_event=InputRequiredEvent(prefix="?"))
        return StopEvent(result=anyio.from_thread.run(wait).response)


async def test_waiting_for_an_event(flavour):
    async with open_run(Asks(), flavour=flavour) as run:
        async for event in run.events():
            if isinstance(event, InputRequiredEvent):
                await anyio.wait_all_tasks_blocked()
                assert run.is_idle  # no thread is kept while the run waits
                run.send_event(HumanResponseEvent(response="yes"))
        assert await run.result() == "yes"


def noted(function):
    """A decorator that needs the context although the step takes none."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        Context.get_step_context().write_event_to_stream(Note(text=function.__name__))
        return function(*args, **kwargs)

    return wrapper


class Collects(Workflow):
    @step
    @noted
    def start(self, ev: StartEvent) -> Item | None:
        for n in range(3):
            Context.get_step_context().send_event(Item(n=n))
        return None

    @step(num_workers=1)
    def gather(self, ctx: Context, ev: Item) -> StopEvent | None:
        items = ctx.collect_events(ev, [Item] * 3)
        return None if items is None else StopEvent(result=[item.n for item in items])


async def test_sending_publishing_and_collecting_where_upstream_has_no_loop_for_it(flavour):
    case = Case(Collects)
    ours, theirs = await on_ours(case, flavour), await on_upstream(case)
    assert ours.outcome == ("returned", [0, 1, 2])
    assert "Note(text='start')" in ours.events
    assert theirs.outcome == ("raised", ("RuntimeError", "no running event loop"))


class CollectsOnly(Workflow):
    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item | None:
        for n in range(3):
            ctx.send_event(Item(n=n))
        return None

    @step(num_workers=1)
    def gather(self, ctx: Context, ev: Item) -> StopEvent | None:
        items = ctx.collect_events(ev, [Item] * 3)
        info = ctx.retry_info()
        return None if items is None else StopEvent(result=([item.n for item in items], info.retry_number))


async def test_what_upstream_allows(flavour):
    await check(Case(CollectsOnly, result=([0, 1, 2], 0), parallel=True), flavour)


class Left(Workflow):
    """Works on after its run was cancelled."""

    def __init__(self):
        super().__init__(timeout=None)
        self.started = threading.Event()
        self.go_on = threading.Event()
        self.ended = threading.Event()
        self.errors = []

    @step
    def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
        anyio.from_thread.run(ctx.store.set, "early", True)
        self.started.set()
        assert self.go_on.wait(30)
        for call in (
            anyio.from_thread.check_cancelled,
            lambda: ctx.send_event(Item()),
            lambda: ctx.write_event_to_stream(Note(text="late")),
        ):
            try:
                call()
                self.errors.append(None)
            except BaseException as exc:  # noqa: ASYNC103 -- nobody waits for this thread
                self.errors.append(type(exc).__name__)
        self.ended.set()
        return StopEvent(result="late")


@pytest.mark.promise("P6")
async def test_a_step_that_is_left_learns_of_it_and_changes_nothing(flavour, configuration):
    workflow = Left()
    async with open_run(workflow, flavour=flavour) as run:
        assert await anyio.to_thread.run_sync(workflow.started.wait, 10)
        run.cancel()
        with pytest.raises(WorkflowCancelledByUser):
            await run.result()
        workflow.go_on.set()
        assert await anyio.to_thread.run_sync(workflow.ended.wait, 10)
    assert workflow.errors == ["CancelledError" if configuration == "asyncio" else "Cancelled", None, None]
    assert not any(isinstance(event, Note) for event in [event async for event in run.events()])
    assert (await run.context.store.get_state()).to_dict() == {"early": True}

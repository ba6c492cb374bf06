"""Workflows that hang, each at another place, until they are opened."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import Annotated

import anyio
from anyio.lowlevel import checkpoint
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent
from workflows.resource import Resource
from workflows.retry_policy import retry_policy, stop_after_attempt, wait_fixed

from llama_corral.runtime import RunHooks, Slot, SlotHooks, open_run, run_workflow

from .everything import Ledger


class Next(Event):
    n: int = 0


class Hanging(Workflow):
    """Hangs at its place until it is opened. `begins`: how often user code is inside then; `idle`: the run says so."""

    begins = 1
    idle = False

    def __init__(self, flavour) -> None:
        super().__init__(timeout=None)
        self.flavour = flavour
        self.opened = False
        self.ledger = Ledger()

    async def hang(self, name="hang"):
        async with self.ledger.working(name):
            if not self.opened:
                await anyio.sleep_forever()

    def options(self):
        return {}

    @asynccontextmanager
    async def surroundings(self):
        """What makes it hang, where that is not the workflow."""
        yield


class InAStep(Hanging):
    @step
    async def work(self, ev: StartEvent) -> StopEvent:
        await self.hang()
        return StopEvent(result="done")


class InAHook(InAStep):
    begins = 0

    def options(self):
        return {"hooks": self.Hooks(self)}

    class Hooks(RunHooks):
        def __init__(self, workflow):
            self.workflow = workflow

        async def before_step(self, step):
            if not self.workflow.opened:
                await anyio.sleep_forever()


class BehindASlowPublisher(InAHook):
    """What the first step published is not stored yet, so the second does not start."""

    begins = 1

    class Hooks(InAHook.Hooks):
        async def before_step(self, step):
            if step == "second":
                await super().before_step(step)

    @step
    async def work(self, ctx: Context, ev: StartEvent) -> Next:
        async with self.ledger.working("first"):
            ctx.write_event_to_stream(Next())
            return Next()

    @step
    async def second(self, ev: Next) -> StopEvent:
        await self.hang()
        return StopEvent(result="done")


class AtTheLimiter(Hanging):
    """Two steps of the run wait for its one slot: one at the limiter, the other for that one."""

    begins = 0

    def __init__(self, flavour) -> None:
        super().__init__(flavour)
        self.slots = anyio.CapacityLimiter(1)
        self.rival = Slot(self.slots)

    def options(self):
        return {"hooks": SlotHooks(Slot(self.slots))}

    @asynccontextmanager
    async def surroundings(self):
        assert self.rival.take_nowait()
        yield
        assert (self.slots.borrowed_tokens, self.slots.statistics().tasks_waiting) == (1, 0)
        self.rival.release()

    @step
    async def work(self, ev: StartEvent) -> StopEvent:
        await self.hang()
        return StopEvent(result="done")

    @step
    async def other(self, ev: StartEvent) -> None:
        await self.hang("other")


class WhileARetryWaits(Hanging):
    idle = True

    @step(retry_policy=retry_policy(wait=wait_fixed(1e6), stop=stop_after_attempt(3)))
    async def work(self, ev: StartEvent) -> StopEvent:
        async with self.ledger.working("work"):
            if not self.opened:
                raise ConnectionError
            return StopEvent(result="done")


class WaitingForAnEvent(Hanging):
    idle = True
    timeout = None

    @step
    async def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
        async with self.ledger.working("work"):
            if not self.opened:
                await ctx.wait_for_event(
                    HumanResponseEvent, waiter_event=InputRequiredEvent(prefix="?"), timeout=self.timeout
                )
            return StopEvent(result="done")


class WaitingForAnEventForAWhile(WaitingForAnEvent):
    timeout = 1e6


class WaitingForAPerson(Hanging):
    idle = True

    @step
    async def ask(self, ev: StartEvent) -> InputRequiredEvent | StopEvent:
        async with self.ledger.working("ask"):
            return StopEvent(result="done") if self.opened else InputRequiredEvent(prefix="?")

    @step
    async def answered(self, ev: HumanResponseEvent) -> StopEvent:
        return StopEvent(result="answered")


class Collecting(Hanging):
    """Three are awaited, two have come, the third hangs."""

    begins = 5

    @step
    async def spread(self, ev: StartEvent) -> list[Next]:
        async with self.ledger.working("spread"):
            return [Next(n=n) for n in range(3)]

    @step(num_workers=3)
    async def work(self, ev: Next) -> HumanResponseEvent:
        if ev.n == 2:
            await self.hang()
        return HumanResponseEvent(response="")

    @step
    async def collect(self, ctx: Context, ev: HumanResponseEvent) -> StopEvent | None:
        async with self.ledger.working("collect"):
            all_of_them = ctx.collect_events(ev, [HumanResponseEvent] * 3)
            return None if all_of_them is None else StopEvent(result="done")


under_test: list[Hanging] = []
"""The workflow under test, for what is no part of a workflow."""


async def make_slowly() -> str:
    await under_test[0].hang()
    return "made"


Made = Annotated[str, Resource(make_slowly)]


class MakingAResource(Hanging):
    @step
    async def work(self, ev: StartEvent, made: Made) -> StopEvent:
        return StopEvent(result="done")


class MakingAResourceForAThread(Hanging):
    @step
    def work(self, ev: StartEvent, made: Made) -> StopEvent:
        return StopEvent(result="done")


class WhileAnotherMakesTheResource(MakingAResource):
    """Another run is making it, and is cancelled after this one."""

    @asynccontextmanager
    async def surroundings(self):
        async with open_run(self, flavour=self.flavour):
            await anyio.wait_all_tasks_blocked()
            yield


class EditingState(Hanging):
    """One step holds the store's lock, the other waits for it."""

    begins = 2

    @step
    async def hold(self, ctx: Context, ev: StartEvent) -> StopEvent:
        async with ctx.store.edit_state():
            await self.hang()
        return StopEvent(result="done")

    @step
    async def wait(self, ctx: Context, ev: StartEvent) -> None:
        async with self.ledger.working("wait"):
            await checkpoint()  # the other has it by then
            await ctx.store.set("mine", True)


class InAChild(Hanging):
    begins = 2

    @step
    async def work(self, ev: StartEvent) -> StopEvent:
        async with self.ledger.working("parent"):
            child = InAStep(self.flavour)
            child.ledger, child.opened = self.ledger, self.opened
            return StopEvent(result=await run_workflow(child, flavour=self.flavour))


class InAWaitingChild(Hanging):
    begins = 2
    idle = True  # a parent that awaits an idle child is idle

    @step
    async def work(self, ev: StartEvent) -> StopEvent:
        async with self.ledger.working("parent"):
            child = WaitingForAnEvent(self.flavour)
            child.ledger, child.opened = self.ledger, self.opened
            async with open_run(child, flavour=self.flavour) as run:
                return StopEvent(result=await run.result())


class InAGrandchild(Hanging):
    begins = 3

    @step
    async def work(self, ev: StartEvent) -> StopEvent:
        async with self.ledger.working("grandparent"):
            child = InAChild(self.flavour)
            child.ledger, child.opened = self.ledger, self.opened
            async with open_run(child, flavour=self.flavour) as run:
                return StopEvent(result=await run.result())


PLACES = [
    InAStep,
    InAHook,
    BehindASlowPublisher,
    AtTheLimiter,
    WhileARetryWaits,
    WaitingForAnEvent,
    WaitingForAnEventForAWhile,
    WaitingForAPerson,
    Collecting,
    MakingAResource,
    MakingAResourceForAThread,
    WhileAnotherMakesTheResource,
    EditingState,
    InAChild,
    InAWaitingChild,
    InAGrandchild,
]

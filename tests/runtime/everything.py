"""A workflow that passes through everything that a run can await, and a ledger of what its code did."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Annotated, Any

import anyio
from anyio.lowlevel import checkpoint
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent
from workflows.resource import Resource
from workflows.retry_policy import retry_policy, stop_after_attempt, wait_fixed

from llama_corral.runtime import SlotHooks, open_run, run_workflow

ITEMS = 3


class Ledger:
    """`began` and `ended`: how often each piece of user code was entered and left. `tidied`: left with all of its
    clean-up done, which awaits behind a shield."""

    def __init__(self) -> None:
        self.began: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.tidied: Counter[str] = Counter()
        self._thread_ended = threading.Condition()

    @asynccontextmanager
    async def working(self, name: str) -> AsyncIterator[None]:
        self.began[name] += 1
        try:
            yield
        finally:
            try:
                with anyio.CancelScope(shield=True):
                    await checkpoint()
                    await checkpoint()
                    self.tidied[name] += 1
            finally:
                self.ended[name] += 1

    @contextmanager
    def working_in_thread(self, name: str) -> Iterator[None]:
        self.began[name] += 1
        try:
            yield
        finally:
            with self._thread_ended:
                self.ended[name] += 1
                self._thread_ended.notify_all()

    def wait_threads(self, name: str) -> None:
        """Return when the threads that are in that code have left it. Blocks: call it in a thread."""
        with self._thread_ended:
            self._thread_ended.wait_for(lambda: self.ended[name] == self.began[name], 30)


ledger_of_the_run: ContextVar[Ledger] = ContextVar("ledger_of_the_run")


class Item(Event):
    n: int


class Raw(Event):
    n: int


class Done(Event):
    n: int


class Gathered(Event):
    found: list[int]


class Answered(Event):
    found: list[int]


class Note(Event):
    n: int


async def make_tool() -> str:
    async with ledger_of_the_run.get().working("make_tool"):
        await checkpoint()
        return "tool"


Tool = Annotated[str, Resource(make_tool)]


class Inner(Workflow):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__(timeout=None)
        self.ledger = ledger

    @step
    async def call(self, ctx: Context, ev: StartEvent) -> StopEvent:
        async with self.ledger.working("inner"):
            await ctx.store.set("called", True)
            await checkpoint()
            return StopEvent(result=1)


class Everything(Workflow):
    """Fan-out, workers, retry, resource, store, thread, collecting, waiting for an event, nested runs both ways.

    Args:
        sends: Its thread sends its event. What a step sent before it was handed back, it sends again when it is resumed;
            what it returns comes once.
    """

    def __init__(self, ledger: Ledger, flavour: Any, *, sends: bool = True) -> None:
        super().__init__(timeout=None)
        self.sends = sends
        self.ledger = ledger
        self.flavour = flavour

    @step
    async def start(self, ctx: Context, ev: StartEvent) -> list[Item]:
        async with self.ledger.working("start"):
            await checkpoint()
            return [Item(n=n) for n in range(ITEMS)]

    @step(num_workers=2, retry_policy=retry_policy(wait=wait_fixed(0.001), stop=stop_after_attempt(3)))
    async def edit(self, ctx: Context, ev: Item, tool: Tool) -> Raw:
        async with self.ledger.working("edit"):
            async with ctx.store.edit_state() as state:
                await checkpoint()
                if ev.n == 1 and not ctx.retry_info().retry_number:
                    raise ConnectionError(tool)
                state[f"item {ev.n}"] = ev.n  # bears being done twice, as a step of a service must
            return Raw(n=ev.n)

    @step(num_workers=2)
    def crunch(self, ctx: Context, ev: Raw) -> Done | None:
        with self.ledger.working_in_thread("crunch"):
            ctx.write_event_to_stream(Note(n=ev.n))
            if not self.sends:
                return Done(n=ev.n)
            ctx.send_event(Done(n=ev.n))
            return None

    @step
    async def gather(self, ctx: Context, ev: Done) -> Gathered | None:
        async with self.ledger.working("gather"):
            found = ctx.collect_events(ev, [Done] * ITEMS)
            return None if found is None else Gathered(found=sorted(done.n for done in found))

    @step
    async def ask(self, ctx: Context, ev: Gathered) -> Answered:
        async with self.ledger.working("ask"):
            await ctx.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent(prefix="go on?"), timeout=600)
            return Answered(found=ev.found)

    @step
    async def nest(self, ctx: Context, ev: Answered) -> StopEvent:
        async with self.ledger.working("nest"):
            called = await run_workflow(Inner(self.ledger), flavour=self.flavour)
            async with open_run(Inner(self.ledger), flavour=self.flavour) as run:
                opened = await run.result()
            stored = [await ctx.store.get(f"item {n}") for n in ev.found]
            return StopEvent(result=[ev.found, stored, called, opened])


RESULT = [[0, 1, 2], [0, 1, 2], 1, 1]


class Owner(SlotHooks):
    """A slot, awaiting hooks, and what it heard."""

    def __init__(self, slot: Any) -> None:
        super().__init__(slot)
        self.heard: list[Event] = []

    async def before_step(self, step: str) -> None:
        await checkpoint()
        await super().before_step(step)

    def on_event(self, event: Event) -> None:
        self.heard.append(event)

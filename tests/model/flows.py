"""One workflow whose steps leave a trace of everything they do."""

from __future__ import annotations

from collections import Counter

import anyio.lowlevel
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent


class Progress(Event):
    step: str
    n: int


class Middle(Event):
    asks: bool


class Last(Event):
    pass


class ThreeSteps(Workflow):
    """Three steps with two events each; `asks`: a person is asked before the last. Counts its runs in the session.

    `effects` counts what the steps did, as (name, step): effects outside, which no store takes back.
    """

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.effects: Counter[tuple[str, str]] = Counter()

    async def _work(self, ctx: Context, step_name: str) -> None:
        name = await ctx.store.get("name")
        for n in range(2):
            ctx.write_event_to_stream(Progress(step=step_name, n=n))
        await anyio.lowlevel.checkpoint()
        self.effects[name, step_name] += 1

    @step
    async def first(self, ctx: Context, ev: StartEvent) -> Middle:
        await ctx.store.set("name", ev.get("name"))
        await ctx.store.set("runs", await ctx.store.get("runs", default=0) + 1)
        await self._work(ctx, "first")
        return Middle(asks=ev.get("asks", False))

    @step
    async def second(self, ctx: Context, ev: Middle) -> Last | InputRequiredEvent:
        await self._work(ctx, "second")
        return InputRequiredEvent(prefix="go on?") if ev.asks else Last()

    @step
    async def third(self, ctx: Context, ev: Last | HumanResponseEvent) -> StopEvent:
        await self._work(ctx, "third")
        return StopEvent(result=await ctx.store.get("runs"))


STEPS = ("first", "second", "third")
EVENTS = 6
"""Progress events of a whole run."""

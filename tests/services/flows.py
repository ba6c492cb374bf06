"""The workflows of these tests. Their steps run in both flavours: they use AnyIO only."""

from __future__ import annotations

from typing import Any

import anyio.lowlevel
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

from .rig import Probe


class Progress(Event):
    n: int


class Echo(Workflow):
    """Streams `count` events and returns `value`."""

    @step
    async def work(self, ev: StartEvent, ctx: Context) -> StopEvent:
        for n in range(ev.get("count", 0)):
            ctx.write_event_to_stream(Progress(n=n))
        await anyio.lowlevel.checkpoint()
        return StopEvent(result=ev.get("value", None))


class Fails(Workflow):
    @step
    async def work(self, ev: StartEvent, ctx: Context) -> StopEvent:
        ctx.write_event_to_stream(Progress(n=0))
        await ctx.store.set("broken", True)
        if ev.get("fail", True):
            raise ValueError("no such llama")
        return StopEvent(result="fine")


class Counter(Workflow):
    """Counts its runs in the session. `fail` and `odd` spoil the context."""

    @step
    async def work(self, ev: StartEvent, ctx: Context) -> StopEvent:
        count = await ctx.store.get("count", default=0) + 1
        await ctx.store.set("count", count)
        if ev.get("fail", False):
            raise ValueError("spoiled")
        if ev.get("odd", False):
            await ctx.store.set("odd", object())
        return StopEvent(result=count)


class Probed(Workflow):
    """Its step waits, under the eyes of the test, until `name` is opened."""

    def __init__(self, probe: Probe, **options: Any) -> None:
        super().__init__(**options)
        self.probe = probe

    @step
    async def work(self, ev: StartEvent, ctx: Context) -> StopEvent:
        name = ev.get("name", None)
        ctx.write_event_to_stream(Progress(n=1))
        with self.probe.inside(name):
            await self.probe.wait_open(name)
        return StopEvent(result=name)


class Asks(Workflow):
    """Asks a person by an event that a second step takes."""

    def __init__(self, probe: Probe | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.probe = probe or Probe()

    @step
    async def ask(self, ev: StartEvent, ctx: Context) -> InputRequiredEvent:
        await ctx.store.set("asked", await ctx.store.get("asked", default=0) + 1)
        await ctx.store.set("name", ev.get("name", None))
        with self.probe.inside("ask"):
            await anyio.lowlevel.checkpoint()
        return InputRequiredEvent(prefix="go on?")

    @step
    async def answered(self, ev: HumanResponseEvent, ctx: Context) -> StopEvent:
        with self.probe.inside("answered"):
            await anyio.lowlevel.checkpoint()
        return StopEvent(result=[await ctx.store.get("name"), ev.response, await ctx.store.get("asked")])


class WaitsFor(Workflow):
    """Asks within a step, with `wait_for_event`, `times` times; an expired wait counts as 'expired'."""

    def __init__(self, probe: Probe | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.probe = probe or Probe()

    @step
    async def work(self, ev: StartEvent, ctx: Context) -> StopEvent:
        # A step that waits starts again with every answer, and upstream forgets the answers of finished waits.
        answers = await ctx.store.get("answers", default=[])
        with self.probe.inside("work"):
            while len(answers) < ev.get("times", 1):
                n = len(answers)
                try:
                    response = await ctx.wait_for_event(
                        HumanResponseEvent,
                        waiter_id=f"w{n}",
                        waiter_event=InputRequiredEvent(prefix=str(n)),
                        timeout=ev.get("timeout", None),
                    )
                except TimeoutError:
                    answers.append("expired")
                else:
                    answers.append(response.response)
                await ctx.store.set("answers", answers)
        return StopEvent(result=answers)


class First(Event):
    n: int = 0


class Second(Event):
    n: int = 0


class Chain(Workflow):
    """Three steps, each of which publishes and then waits until its name is opened."""

    def __init__(self, probe: Probe, **options: Any) -> None:
        super().__init__(**options)
        self.probe = probe

    async def _work(self, name: str, ctx: Context) -> None:
        with self.probe.inside(name):
            ctx.write_event_to_stream(Progress(n=len(self.probe.entered)))
            await self.probe.wait_open(name)

    @step
    async def one(self, ev: StartEvent, ctx: Context) -> First:
        await self._work("one", ctx)
        await ctx.store.set("one", True)
        return First()

    @step
    async def two(self, ev: First, ctx: Context) -> Second:
        await self._work("two", ctx)
        return Second()

    @step
    async def three(self, ev: Second, ctx: Context) -> StopEvent:
        await self._work("three", ctx)
        return StopEvent(result=sorted((await ctx.store.get_state()).keys()))

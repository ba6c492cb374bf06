"""What runs far away in these tests, and what calls it. Steps use AnyIO only, so that they run in both flavours."""

from __future__ import annotations

import os
from typing import Any

import anyio
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

from llama_corral.client import Client
from llama_corral.remote import RemoteWorkflow


class Progress(Event):
    n: int


class Question(InputRequiredEvent):
    prefix: str
    number: int


class Approval(Event):
    """An answer of a class of its own."""

    by: str


class Report(StopEvent):
    topic: str
    pages: int


# Far away


class Echo(Workflow):
    """Publishes `count` events and returns `value`."""

    @step
    async def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
        for n in range(ev.get("count", 0)):
            ctx.write_event_to_stream(Progress(n=n))
        return StopEvent(result=ev.get("value", None))


class Asks(Workflow):
    """Asks `questions` times and returns the answers."""

    def __init__(self) -> None:
        super().__init__(timeout=None)

    @step
    async def begin(self, ctx: Context, ev: StartEvent) -> Question:
        await ctx.store.set("questions", ev.get("questions", 1))
        await ctx.store.set("answers", [])
        return Question(prefix="Why?", number=0)

    @step
    async def take(self, ctx: Context, ev: HumanResponseEvent) -> Question | StopEvent:
        answers = [*await ctx.store.get("answers"), ev.response]
        await ctx.store.set("answers", answers)
        if len(answers) < await ctx.store.get("questions"):
            return Question(prefix="Why?", number=len(answers))
        return StopEvent(result=answers)


class WaitsForApproval(Workflow):
    def __init__(self) -> None:
        super().__init__(timeout=None)

    @step
    async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
        ctx.write_event_to_stream(Progress(n=0))
        approval = await ctx.wait_for_event(Approval)
        return StopEvent(result=approval.by)


class Fails(Workflow):
    @step
    async def explode(self, ctx: Context, ev: StartEvent) -> StopEvent:
        ctx.write_event_to_stream(Progress(n=0))
        raise ValueError("no such llama")


class Works(Workflow):
    """Works until it is cancelled."""

    def __init__(self) -> None:
        super().__init__(timeout=None)

    @step
    async def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
        ctx.write_event_to_stream(Progress(n=0))
        await anyio.sleep_forever()
        return StopEvent()


class Reports(Workflow):
    @step
    async def work(self, ev: StartEvent) -> Report:
        return Report(topic=ev.topic, pages=3)


class Counts(Workflow):
    """Counts its runs in its session."""

    @step
    async def work(self, ctx: Context, ev: StartEvent) -> StopEvent:
        count = await ctx.store.get("count", default=0) + 1
        await ctx.store.set("count", count)
        return StopEvent(result=count)


FAR = {
    "echo": Echo(),
    "asks": Asks(),
    "approval": WaitsForApproval(),
    "fails": Fails(),
    "works": Works(),
    "reports": Reports(),
    "counts": Counts(),
}


# What calls it


class Calls(Workflow):
    """Runs a remote workflow with what it is given, passes its events through, and what a person answers on."""

    def __init__(self, inner: RemoteWorkflow) -> None:
        super().__init__(timeout=None)
        self.inner = inner

    @step
    async def call(self, ctx: Context, ev: StartEvent) -> StopEvent:
        handler = self.inner.run(**ev.to_dict())
        async for event in handler.stream_events():
            ctx.write_event_to_stream(event)
        return StopEvent(result=await handler)

    @step(num_workers=1)
    async def answer(self, ev: HumanResponseEvent) -> None:
        await self.inner.send_event(ev)


class Awaits(Workflow):
    """Awaits a remote workflow, in a scope of `within` seconds."""

    def __init__(self, inner: RemoteWorkflow, **options: Any) -> None:
        super().__init__(**{"timeout": None, **options})
        self.inner = inner

    @step
    async def call(self, ctx: Context, ev: StartEvent) -> StopEvent:
        within = ev.to_dict().pop("within", None)
        with anyio.move_on_after(within):
            return StopEvent(result=await self.inner.run(**ev.to_dict()))
        return StopEvent(result="left")


# Of programs that tests start

asks = Asks()
calls = Calls(RemoteWorkflow("asks", lambda: Client(os.environ["CORRAL_TEST_FAR"]), events=[Question]))

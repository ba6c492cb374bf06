"""What the workers of a cluster run: three steps with a stream, and for some tasks a person between them."""

from __future__ import annotations

import anyio
from flows import Done, Tick, mark
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent


class Begin(StartEvent):
    name: str
    pause: float
    person: bool = False


class Stage(Event):
    begin: Begin


class Question(Event):
    begin: Begin


class Goal(Event):
    begin: Begin
    answer: str | None = None


class Journey(Workflow):
    """Step 4 is what follows the answer of a person."""

    @step
    async def one(self, ctx: Context, ev: Begin) -> Stage:
        await self.work(ctx, ev, 1)
        return Stage(begin=ev)

    @step
    async def two(self, ctx: Context, ev: Stage) -> Question | Goal:
        await self.work(ctx, ev.begin, 2)
        return Question(begin=ev.begin) if ev.begin.person else Goal(begin=ev.begin)

    @step
    async def ask(self, ctx: Context, ev: Question) -> Goal:
        answer = await ctx.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent(), timeout=None)
        await self.work(ctx, ev.begin, 4)
        return Goal(begin=ev.begin, answer=answer.response)

    @step
    async def three(self, ctx: Context, ev: Goal) -> StopEvent:
        await self.work(ctx, ev.begin, 3)
        return StopEvent(result=ev.begin.name if ev.answer is None else f"{ev.begin.name}: {ev.answer}")

    async def work(self, ctx: Context, begin: Begin, number: int) -> None:
        mark(begin.name, number)
        ctx.write_event_to_stream(Tick(n=number))
        await anyio.sleep(begin.pause)  # the work
        ctx.write_event_to_stream(Done(n=number))


journey = Journey(timeout=None)

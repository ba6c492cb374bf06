"""Workflows that stop somewhere on their way, to go on elsewhere: in another run, flavour, backend or process.

Run as a program it goes on with the snapshot that it reads, and tells how that ended:
`python -m tests.runtime.journeys NAME BACKEND FLAVOUR < snapshot.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import anyio
import anyio.lowlevel
from pydantic import BaseModel
from workflows import Context, Workflow, catch_error, step
from workflows.collect import Collect, Take
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StepFailedEvent, StopEvent
from workflows.retry_policy import retry_policy, stop_after_attempt, wait_fixed

from llama_corral.runtime import open_run


class Item(Event):
    n: int = 0


class Done(Event):
    n: int = 0


class Other(Event):
    n: int = 0


class Question(InputRequiredEvent):
    topic: str


class Answer(HumanResponseEvent):
    text: str


class State(BaseModel):
    count: int = 0
    names: list[str] = []


class Traveller(Workflow):
    """Notes the calls that ended. `stuck` steps never end: the run is left there."""

    def __init__(self, *, stuck: bool = False, runtime: Any = None) -> None:
        super().__init__(timeout=None, runtime=runtime)
        self.stuck = stuck
        self.ended: list[str] = []

    async def end(self, what: str) -> None:
        self.ended.append(what)

    async def maybe_stuck(self) -> None:
        if self.stuck:
            await anyio.sleep_forever()


class Works(Traveller):
    """Is left while a step works."""

    @step
    async def start(self, ctx: Context[State], ev: StartEvent) -> Item:
        async with ctx.store.edit_state() as state:
            state.names.append("start")
        await self.end("start")
        return Item(n=3)

    @step
    async def work(self, ctx: Context[State], ev: Item) -> Done:
        await self.maybe_stuck()
        await ctx.store.set("count", ev.n)
        await self.end("work")
        return Done(n=ev.n)

    @step
    async def finish(self, ctx: Context[State], ev: Done) -> StopEvent:
        state = await ctx.store.get_state()
        await self.end("finish")
        return StopEvent(result=[state.count, state.names, ev.n])


class Asks(Traveller):
    """Is left while it waits for an answer from anybody."""

    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item:
        await ctx.store.set("topic", ev.topic)
        await self.end("start")
        return Item(n=7)

    @step
    async def ask(self, ctx: Context, ev: Item) -> StopEvent:
        got = await ctx.wait_for_event(Answer, waiter_event=Question(topic="?"))
        return StopEvent(result=[await ctx.store.get("topic"), ev.n, got.text])


class AsksAda(Asks):
    """Is left while it waits for an answer from one person: what it requires is not in the snapshot."""

    @step
    async def ask(self, ctx: Context, ev: Item) -> StopEvent:
        got = await ctx.wait_for_event(Answer, waiter_event=Question(topic="?"), requirements={"user": "ada"})
        return StopEvent(result=[await ctx.store.get("topic"), ev.n, got.text])


class Answered(Asks):
    """Is left after an answer, on which it works."""

    user: str | None = None

    @step
    async def ask(self, ctx: Context, ev: Item) -> Done:
        got = await ctx.wait_for_event(Answer, requirements={"user": self.user} if self.user else None)
        await self.maybe_stuck()
        await self.end("ask")
        return Done(n=len(got.text))

    @step
    async def finish(self, ctx: Context, ev: Done) -> StopEvent | None:
        async with ctx.store.edit_state() as state:
            state["done"] = [*state.get("done", []), ev.n]
        if ev.n == 0:
            return None
        for _ in range(20):  # whatever else has been started comes along
            await anyio.lowlevel.checkpoint()
        return StopEvent(result=await ctx.store.get("done"))


class AnsweredByAda(Answered):
    user = "ada"


class GivesUp(Asks):
    """Is left after it has waited in vain."""

    @step
    async def ask(self, ctx: Context, ev: Item) -> StopEvent:
        try:
            await ctx.wait_for_event(Answer, timeout=0.02)
        except TimeoutError:
            await self.maybe_stuck()
            return StopEvent(result="nobody came")
        return StopEvent()


class FailsWaiting(Asks):
    """Is left in the error handler of a step that waited in vain and failed. The handler waits for the same type."""

    @step
    async def ask(self, ctx: Context, ev: Item) -> StopEvent:
        try:
            got = await ctx.wait_for_event(Answer, timeout=0.02)
        except TimeoutError:
            await self.end("ask")  # noqa: ASYNC120
            raise
        await self.end("ask")
        return StopEvent(result=got.text)

    @catch_error
    async def handle(self, ctx: Context, ev: StepFailedEvent) -> StopEvent:
        got = await ctx.wait_for_event(Answer, waiter_event=Question(topic=str(ev.exception)))
        for _ in range(20):  # whatever else has been started comes along
            await anyio.lowlevel.checkpoint()
        return StopEvent(result=got.text)


class FailsAnswered(Asks):
    """Is left in the error handler of a step that had its answer and failed."""

    @step
    async def ask(self, ctx: Context, ev: Item) -> StopEvent:
        got = await ctx.wait_for_event(Answer, requirements={"user": "ada"})
        await self.end("ask")
        raise LookupError(got.text)

    @catch_error
    async def handle(self, ctx: Context, ev: StepFailedEvent) -> StopEvent:
        await self.maybe_stuck()
        await self.end("handle")
        return StopEvent(result=str(ev.exception))


class Retries(Traveller):
    """Is left while a retry waits."""

    @step
    async def start(self, ev: StartEvent) -> Item:
        await self.end("start")
        return Item(n=1)

    @step(retry_policy=retry_policy(wait=wait_fixed(0.02), stop=stop_after_attempt(3)))
    async def flaky(self, ctx: Context, ev: Item) -> StopEvent:
        info = ctx.retry_info()
        if info.retry_number < 2:
            raise ConnectionError(f"attempt {info.retry_number + 1}")
        return StopEvent(result=[info.retry_number, str(info.last_exception)])


class Members(Traveller):
    """Is left between the members of a fan-out: some have ended, one has an answer, others wait for theirs."""

    @step
    async def split(self, ev: StartEvent) -> list[Item]:
        await self.end("split")
        return [Item(n=n) for n in range(4)]

    @step(num_workers=1)
    async def work(self, ctx: Context, ev: Item) -> Done:
        if ev.n % 2:
            got = await ctx.wait_for_event(Answer, requirements={"n": ev.n})
            return Done(n=ev.n * len(got.text))
        await self.end(f"work {ev.n}")
        return Done(n=ev.n)

    @step
    async def join(self, done: list[Done]) -> StopEvent:
        await self.end("join")
        return StopEvent(result=sorted(d.n for d in done))


class Takes(Members):
    @step
    async def join(self, done: Annotated[list[Done], Collect(Take(3))]) -> StopEvent:
        await self.end("join")
        return StopEvent(result=sorted(d.n for d in done))


class Gathers(Traveller):
    """Is left with events in the buffers of `collect_events` and of a join."""

    @step
    async def start(self, ev: StartEvent) -> Item:
        await self.end("start")
        return Item(n=1)

    @step
    async def again(self, ev: Item) -> Item | Done:
        await self.end(f"again {ev.n}")
        return Item(n=ev.n + 1) if ev.n < 3 else Done(n=10)

    @step(num_workers=1)
    async def gather(self, ctx: Context, ev: Item | Answer) -> Other | None:
        events = ctx.collect_events(ev, [Item, Item, Item, Answer])
        if events is None:
            return None
        await self.end("gather")
        return Other(n=sum(item.n for item in events[:3]))

    @step
    async def join(self, done: Done, other: Other) -> StopEvent:
        await self.end("join")
        return StopEvent(result=[done.n, other.n])


class Queued(Traveller):
    """Is left while one event is worked on and others wait for the worker."""

    @step
    async def split(self, ev: StartEvent) -> list[Item]:
        await self.end("split")
        return [Item(n=n) for n in range(4)]

    @step(num_workers=1)
    async def work(self, ev: Item) -> Done:
        if ev.n == 2:
            await self.maybe_stuck()
        await self.end(f"work {ev.n}")
        return Done(n=ev.n)

    @step
    async def join(self, done: list[Done]) -> StopEvent:
        await self.end("join")
        return StopEvent(result=sorted(d.n for d in done))


class Recovers(Traveller):
    """Is left after an error handler was called once; it may be called twice in this line of events."""

    @step
    async def start(self, ev: StartEvent) -> Item:
        await self.end("start")
        return Item()

    @step
    async def work(self, ev: Item) -> StopEvent:
        if ev.n == 1:
            await self.maybe_stuck()
        await self.end(f"work {ev.n}")
        raise LookupError(f"round {ev.n}")

    @catch_error(max_recoveries=2)
    async def handle(self, ev: StepFailedEvent) -> Item:
        return Item(n=ev.input_event.n + 1)


@dataclass(frozen=True)
class Journey:
    """A way and how it ends: with a result, or with an error that says `error`. `answers` are what it asks for; `before`
    are those that it needs to get to where it is left."""

    make: Callable[..., Traveller]
    result: Any = None
    start: dict[str, Any] = field(default_factory=dict)
    answers: Sequence[Event] = ()
    before: Sequence[Event] = ()
    error: str | None = None

    def outcome(self) -> list[Any]:
        return ["raised", self.error] if self.error is not None else ["returned", self.result]


TOPIC = {"topic": "llamas"}

JOURNEYS = {
    "works": Journey(Works, [3, ["start"], 3]),
    "asks": Journey(Asks, ["llamas", 7, "yes"], TOPIC, [Answer(text="yes")]),
    "asks-ada": Journey(
        AsksAda,
        ["llamas", 7, "yes"],
        TOPIC,
        [Answer(text="no", user="bob"), Answer(text="yes", user="ada")],
    ),
    "answered": Journey(Answered, [3], TOPIC, before=[Answer(text="yes")]),
    "answered-by-ada": Journey(AnsweredByAda, [3], TOPIC, before=[Answer(text="yes", user="ada")]),
    "gives-up": Journey(GivesUp, "nobody came", TOPIC),
    "fails-waiting": Journey(FailsWaiting, "yes", TOPIC, [Answer(text="yes")]),
    "fails-answered": Journey(FailsAnswered, "yes", TOPIC, before=[Answer(text="yes", user="ada")]),
    "retries": Journey(Retries, [2, "attempt 2"]),
    "members": Journey(Members, [0, 2, 3, 6], {}, [Answer(text="ab", n=3), Answer(text="abc", n=1)]),
    "takes": Journey(Takes, [0, 2, 3], {}, [Answer(text="abc", n=1)]),
    "gathers": Journey(Gathers, [10, 6], {}, [Answer(text="x")]),
    "queued": Journey(Queued, [0, 1, 2, 3]),
    "recovers": Journey(Recovers, error="round 2"),
}


async def go_on(
    name: str, stored: dict[str, Any], flavour: str = "anyio", answers: Sequence[Event] | None = None
) -> tuple[list[Any], list[str]]:
    """Resume the journey with these answers, or its own; how it ended, and the calls that ended."""
    journey = JOURNEYS[name]
    workflow = journey.make()
    with anyio.fail_after(3):
        async with open_run(workflow, context=Context.from_dict(workflow, stored), flavour=flavour) as run:
            for answer in journey.answers if answers is None else answers:
                run.send_event(answer)
            return await outcome_of(run.result()), workflow.ended


async def outcome_of(result: Awaitable[Any]) -> list[Any]:
    try:
        return ["returned", await result]
    except LookupError as exc:
        return ["raised", str(exc)]


if __name__ == "__main__":
    _, name, backend, flavour = sys.argv
    from tests.runtime import journeys  # by the name under which the snapshot knows its events

    print(json.dumps(anyio.run(journeys.go_on, name, json.load(sys.stdin), flavour, backend=backend)))

"""The same workflows end in the same way on upstream's own runtime and on ours."""

from __future__ import annotations

import anyio
import pytest
from workflows import Context, Workflow, catch_error, step
from workflows.events import Event, StartEvent, StepFailedEvent, StopEvent
from workflows.retry_policy import retry_policy, stop_after_attempt, wait_fixed

from llama_corral.runtime import open_run

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


class Item(Event):
    n: int


class Done(Event):
    n: int


class Own(StopEvent):
    total: int


class Chain(Workflow):
    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item:
        ctx.write_event_to_stream(Done(n=-1))
        return Item(n=0)

    @step
    async def turn(self, ctx: Context, ev: Item) -> Item | Own:
        ctx.write_event_to_stream(Done(n=ev.n))
        return Own(total=ev.n) if ev.n == 5 else Item(n=ev.n + 1)


class FanOut(Workflow):
    @step
    async def split(self, ev: StartEvent) -> list[Item]:
        return [Item(n=n) for n in range(5)]

    @step(num_workers=2)
    async def work(self, ctx: Context, ev: Item) -> Done:
        return Done(n=ev.n)

    @step
    async def join(self, ctx: Context, done: list[Done]) -> StopEvent:
        return StopEvent(result=sorted(d.n for d in done))


class Collect(Workflow):
    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item | None:
        for n in range(6):
            ctx.send_event(Item(n=n))
        return None

    @step(num_workers=3)
    async def gather(self, ctx: Context, ev: Item) -> StopEvent | None:
        items = ctx.collect_events(ev, [Item] * 6)
        return None if items is None else StopEvent(result=sorted(item.n for item in items))


class Retries(Workflow):
    def __init__(self):
        super().__init__()
        self.calls = 0

    @step(retry_policy=retry_policy(wait=wait_fixed(0), stop=stop_after_attempt(3)))
    async def flaky(self, ctx: Context, ev: StartEvent) -> StopEvent:
        self.calls += 1
        if self.calls < 3:
            raise ConnectionError
        return StopEvent(result=(self.calls, ctx.retry_info().retry_number))


class Fails(Workflow):
    @step
    async def fail(self, ev: StartEvent) -> StopEvent:
        raise LookupError("gone")


class Recovers(Workflow):
    @step
    async def fail(self, ev: StartEvent) -> StopEvent:
        raise LookupError("gone")

    @catch_error
    async def handle(self, ev: StepFailedEvent) -> StopEvent:
        return StopEvent(result=(ev.step_name, ev.attempts, str(ev.exception)))


class TimesOut(Workflow):
    def __init__(self):
        super().__init__(timeout=0.02)

    @step
    async def slow(self, ev: StartEvent) -> StopEvent:
        await anyio.sleep_forever()
        return StopEvent()


class Threads(Workflow):
    @step
    def start(self, ev: StartEvent) -> Item:
        return Item(n=1)

    @step
    def finish(self, ev: Item) -> StopEvent:
        return StopEvent(result=ev.n)


class Wrong(Workflow):
    @step
    async def wrong(self, ev: StartEvent) -> StopEvent:
        return "text"  # type: ignore[return-value]


async def outcome(awaitable):
    try:
        return await awaitable
    except Exception as exc:
        return type(exc), str(exc)


def shown(events):
    return [(type(event).__name__, event.get("n", None)) for event in events]


@pytest.mark.parametrize("make", [Chain, FanOut, Collect, Retries, Fails, Recovers, TimesOut, Threads, Wrong])
async def test_the_same_outcome_and_the_same_events(configuration, make):
    if configuration != "asyncio":
        pytest.skip("upstream's own runtime needs asyncio")
    handler = make().run()
    theirs = [event async for event in handler.stream_events()]
    their_outcome = await outcome(handler)
    async with open_run(make()) as run:
        ours = [event async for event in run.events()]
        assert await outcome(run.result()) == their_outcome
    assert shown(ours) == shown(theirs)

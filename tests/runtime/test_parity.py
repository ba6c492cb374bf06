"""The same workflows end in the same way, and publish the same events, on upstream's own runtime and on ours.

What has a file of its own is compared there: test_fan_out, test_retries, test_state, test_waiters, test_sync_steps.
"""

from __future__ import annotations

import functools

import anyio
import anyio.lowlevel
import pytest
from workflows import Context, Workflow, step
from workflows.errors import WorkflowCancelledByUser, WorkflowRuntimeError, WorkflowTimeoutError
from workflows.events import (
    Event,
    HumanResponseEvent,
    InputRequiredEvent,
    StartEvent,
    StepStateChanged,
    StopEvent,
    WorkflowIdleEvent,
)

from .compare import CANCEL, Case, check, on_ours, on_upstream

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


class Item(Event):
    n: int = 0


class Done(Event):
    n: int = 0


class Stranger(Event):
    pass


class Begin(StartEvent):
    topic: str
    rounds: int = 2


class Own(StopEvent):
    total: int


class Computed(StopEvent):
    parts: list[int]

    def _get_result(self):
        return sum(self.parts)


class Chain(Workflow):
    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item:
        ctx.write_event_to_stream(Done(n=-1))
        return Item(n=0)

    @step
    async def turn(self, ctx: Context, ev: Item) -> Item | Own:
        ctx.write_event_to_stream(Done(n=ev.n))
        return Own(total=ev.n) if ev.n == 5 else Item(n=ev.n + 1)


class Typed(Workflow):
    @step
    async def start(self, ev: Begin) -> Computed:
        return Computed(parts=[len(ev.topic)] * ev.rounds)


class Untyped(Workflow):
    """Events carry what they are given, declared or not."""

    @step
    async def start(self, ev: StartEvent) -> Item:
        assert "topic" in ev
        return Item(n=len(ev.topic), topic=ev["topic"], deep={"a": [1]})

    @step
    async def finish(self, ev: Item) -> StopEvent:
        return StopEvent(result=(ev.n, ev.topic, ev.get("deep"), ev.get("none", "default")), note="beside the result")


class Threads(Workflow):
    @step
    def start(self, ev: StartEvent) -> Item:
        return Item(n=1)

    @step
    async def middle(self, ev: Item) -> Done:
        return Done(n=ev.n + 1)

    @step
    def finish(self, ev: Done) -> StopEvent:
        return StopEvent(result=ev.n)


class Both(Workflow):
    """Every step that takes the type gets the event."""

    @step
    async def start(self, ev: StartEvent) -> Item:
        return Item(n=3)

    @step
    async def double(self, ev: Item) -> Done:
        return Done(n=ev.n * 2)

    @step
    async def square(self, ev: Item) -> Done:
        return Done(n=ev.n**2)

    @step(num_workers=1)
    async def finish(self, ctx: Context, ev: Done) -> StopEvent | None:
        done = ctx.collect_events(ev, [Done] * 2)
        return None if done is None else StopEvent(result=sorted(d.n for d in done))


class Unhandled(Workflow):
    """A step sends what no step takes."""

    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item:
        ctx.send_event(Stranger())
        ctx.send_event(Item(n=5), step="finish")
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        return Item(n=1)

    @step(num_workers=1)
    async def finish(self, ctx: Context, ev: Item) -> StopEvent | None:
        items = ctx.collect_events(ev, [Item] * 2)
        return None if items is None else StopEvent(result=[item.n for item in items])


class SubItem(Item):
    pass


class Exactly(Workflow):
    """Without subclasses an event of a derived class is another type."""

    @step
    async def start(self, ev: StartEvent) -> SubItem:
        return SubItem(n=1)

    @step
    async def exact(self, ev: SubItem) -> StopEvent:
        return StopEvent(result=type(ev).__name__)

    @step(skip_graph_checks=["reachability"])
    async def base(self, ev: HumanResponseEvent) -> StopEvent:
        return StopEvent(result="base")


class WithSubclasses(Workflow):
    @step
    async def start(self, ev: StartEvent) -> SubItem:
        return SubItem(n=1)

    @step(accept_event_subclasses=True)
    async def base(self, ev: Item) -> StopEvent:
        return StopEvent(result=type(ev).__name__)


class AnyStart(Workflow):
    @step(accept_event_subclasses=True)
    async def start(self, ev: StartEvent) -> StopEvent:
        return StopEvent(result=type(ev).__name__)


class Base(Workflow):
    @step
    async def start(self, ev: StartEvent) -> Item:
        return Item(n=1)

    @step
    async def finish(self, ev: Item) -> StopEvent:
        return StopEvent(result=self.made_of(ev))

    def made_of(self, ev):
        return ["base", ev.n]


class Inherits(Base):
    def made_of(self, ev):
        return ["inherits", *super().made_of(ev)]


class Overrides(Base):
    @step
    async def start(self, ev: StartEvent) -> Item:
        return Item(n=2)


class Mixin:
    @step
    async def middle(self, ev: Item) -> Done:
        return Done(n=ev.n + 10)


class Mixes(Mixin, Workflow):
    @step
    async def start(self, ev: StartEvent) -> Item:
        return Item(n=1)

    @step
    async def finish(self, ev: Done) -> StopEvent:
        return StopEvent(result=ev.n)


class OfTheClass(Workflow):
    """Class methods are steps too. (Static methods are not: upstream does not see them.)"""

    @classmethod
    @step
    async def start(cls, ev: StartEvent) -> Item:
        return Item(n=1)

    @classmethod
    @step
    def finish(cls, ev: Item) -> StopEvent:
        return StopEvent(result=(cls.__name__, ev.n))


class Free(Workflow):
    pass


@step(workflow=Free)
async def free_start(ctx: Context, ev: StartEvent) -> Item:
    return Item(n=3)


@step(workflow=Free, num_workers=1)
def free_finish(ev: Item) -> StopEvent:
    return StopEvent(result=ev.n)


def told(function):
    """A decorator below @step: the step's context without a parameter for it."""

    @functools.wraps(function)
    async def wrapper(*args, **kwargs):
        Context.get_step_context().write_event_to_stream(Done(n=99))
        return await function(*args, **kwargs)

    return wrapper


class Decorated(Workflow):
    @step
    @told
    async def start(self, ev: StartEvent) -> StopEvent:
        await Context.get_step_context().store.set("a", 1)
        return StopEvent(result=await Context.get_step_context().store.get("a"))


class Outlives(Workflow):
    """Stops while others work: they are cancelled, and what they would say is not heard."""

    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item | Done | None:
        ctx.send_event(Item())
        ctx.send_event(Done())
        return None

    @step
    async def slow(self, ctx: Context, ev: Item) -> StopEvent:
        try:
            await anyio.sleep_forever()
        finally:
            ctx.write_event_to_stream(Item(n=99))
        return StopEvent(result="slow")

    @step
    async def quick(self, ev: Done) -> StopEvent:
        await anyio.lowlevel.checkpoint()
        return StopEvent(result="quick")


class Asks(Workflow):
    """What a step returns asks, what a step takes answers; in between the run is idle."""

    @step
    async def ask(self, ev: StartEvent) -> InputRequiredEvent:
        return InputRequiredEvent(prefix="name?")

    @step
    async def answer(self, ev: HumanResponseEvent) -> StopEvent:
        return StopEvent(result=ev.response)


class Sleeps(Workflow):
    """Of several steps one takes too long."""

    def __init__(self):
        super().__init__(timeout=0.5)  # a busy machine must have begun the second step by then

    @step
    async def start(self, ev: StartEvent) -> Item:
        return Item()

    @step
    async def slow(self, ev: Item) -> StopEvent:
        await anyio.sleep_forever()
        return StopEvent()


class Fails(Workflow):
    @step
    async def fail(self, ev: StartEvent) -> StopEvent:
        raise LookupError("gone")


class WrongReturn(Workflow):
    @step
    async def wrong(self, ev: StartEvent) -> StopEvent:
        return "text"  # type: ignore[return-value]


class WrongTarget(Workflow):
    @step
    async def start(self, ctx: Context, ev: StartEvent) -> StopEvent:
        ctx.send_event(Item(), step=ev.to)
        return StopEvent()


class Loose(Workflow):
    """Runs although its graph has loose ends."""

    @step
    async def start(self, ev: StartEvent) -> Item | Stranger:
        return Item(n=2)

    @step
    async def finish(self, ev: Item) -> StopEvent:
        return StopEvent(result=ev.n)


def loose():
    return Loose(disable_validation=True)


CASES = [
    Case(Chain, result=Own(total=5)),
    Case(Typed, {"topic": "llamas"}, result=Computed(parts=[6, 6])),
    Case(Typed, {"start_event": Begin(topic="llamas", rounds=1)}, result=Computed(parts=[6]), name="event"),
    Case(Untyped, {"topic": "llamas"}, result=(6, "llamas", {"a": [1]}, "default")),
    Case(Threads, result=2),
    Case(Both, result=[6, 9], parallel=True),
    Case(Unhandled, result=[5, 1], parallel=True),
    Case(Exactly, result="SubItem"),
    Case(WithSubclasses, result="SubItem"),
    Case(AnyStart, {"start_event": Begin(topic="")}, result="Begin"),
    Case(Inherits, result=["inherits", "base", 1]),
    Case(Overrides, result=["base", 2]),
    Case(Mixes, result=11),
    Case(OfTheClass, result=("OfTheClass", 1)),
    Case(Free, result=3),
    Case(Decorated, result=1),
    Case(Outlives, result="quick", cut=True),
    Case(Asks, script=[(InputRequiredEvent, HumanResponseEvent(response="ada"))], result="ada"),
    Case(Asks, script=[(WorkflowIdleEvent, HumanResponseEvent(response="ada"))], result="ada", name="when-idle"),
    Case(Asks, script=[(WorkflowIdleEvent, CANCEL)], error=WorkflowCancelledByUser, name="cancelled"),
    Case(Sleeps, error=WorkflowTimeoutError, match="active steps: slow"),
    Case(Outlives, script=[(StepStateChanged, CANCEL)], error=WorkflowCancelledByUser, cut=True, name="cancelled"),
    Case(Fails, error=LookupError, match="gone"),
    Case(WrongReturn, error=WorkflowRuntimeError, match="wrong returned str"),
    Case(WrongTarget, {"to": "nowhere"}, error=WorkflowRuntimeError, match="nowhere", name="no-step"),
    Case(WrongTarget, {"to": "start"}, error=WorkflowRuntimeError, match="does not accept", name="refused"),
    Case(loose, result=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_the_same_outcome_and_the_same_events(flavour, case):
    await check(case, flavour)


# Where ours differs, on purpose. (About waiters: test_waiters; about sync steps: test_sync_steps.)


class StopsTwice(Workflow):
    """Publishes a stop event of its own before the one that ends the run."""

    @step
    async def start(self, ctx: Context, ev: StartEvent) -> StopEvent:
        ctx.write_event_to_stream(StopEvent(result="not yet"))
        ctx.write_event_to_stream(Item(n=1))
        return StopEvent(result="now")


async def test_a_stream_ends_with_the_run_where_upstreams_ends_at_the_first_stop_event(flavour):
    case = Case(StopsTwice)
    ours, theirs = await on_ours(case, flavour), await on_upstream(case)
    assert ours.outcome == theirs.outcome == ("returned", "now")
    stops = "StopEvent(result='not yet')", "StopEvent(result='now')"
    assert [event for event in ours.events if event.startswith("StopEvent")] == [*stops]
    assert theirs.events[-1] == stops[0]


class Exits(Workflow):
    @step
    async def exits(self, ev: StartEvent) -> StopEvent:
        raise SystemExit(3)


async def test_a_step_that_exits_fails_its_run_where_upstream_ends_the_loop(flavour):
    ours = await on_ours(Case(Exits), flavour)
    assert ours.outcome == ("raised", ("WorkflowRuntimeError", "step 'exits' raised SystemExit: 3"))
    assert [event.partition("(")[0] for event in ours.events] == ["StepStateChanged"] * 2 + ["WorkflowFailedEvent"]

"""The workflows that `benchmarks.runtime` runs, and what one operation of each workload is.

Nothing here knows who runs them: a candidate (`candidates.Side`) does. Every operation checks its answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, StartEvent, StopEvent

if TYPE_CHECKING:
    from .candidates import Side

CHAIN = 20
FAN = 100
STREAM = 1_000
CAPPED_RUNS = 500
CAP = 8


class WrongAnswer(Exception):
    """A run that did not do what a working runtime does."""


def expect(value: Any, wanted: Any) -> None:
    if value != wanted:
        raise WrongAnswer(f"{value!r} instead of {wanted!r}")


# One step, and a chain of them


class Greet(StartEvent):
    name: str


class OneStep(Workflow):
    @step
    async def greet(self, ev: Greet) -> StopEvent:
        return StopEvent(result=f"Hello, {ev.name}!")


class Begin(StartEvent):
    number: int


class Link(Event):
    number: int


def _chain_of(length: int) -> type[Workflow]:
    """A workflow of so many different steps, each with an event of its own, each adding one."""
    accepted: list[type[Event]] = [Begin, *(type(f"Link{index}", (Link,), {}) for index in range(1, length))]
    produced: list[type[Event]] = [*accepted[1:], StopEvent]

    def one_step(index: int) -> Any:
        async def link(self: Any, ev: Any) -> Any:  # noqa: ARG001 -- it stands for a method
            if index == length - 1:
                return StopEvent(result=ev.number + 1)
            return produced[index](number=ev.number + 1)

        link.__name__ = f"step_{index:02d}"
        link.__qualname__ = f"Chain.{link.__name__}"  # with a dot: @step takes it for a method
        link.__annotations__ = {"ev": accepted[index], "return": produced[index]}
        return step(link)

    return type("Chain", (Workflow,), {f"step_{index:02d}": one_step(index) for index in range(length)})


Chain = _chain_of(CHAIN)


# Fan-out


class Split(StartEvent):
    size: int


class Item(Event):
    number: int


class Done(Event):
    number: int


class FanList(Workflow):
    """A list fans out, a step takes the whole list."""

    @step
    async def split(self, ev: Split) -> list[Item]:
        return [Item(number=number) for number in range(ev.size)]

    @step(num_workers=4)
    async def work(self, ev: Item) -> Done:
        return Done(number=ev.number)

    @step
    async def join(self, events: list[Done]) -> StopEvent:
        return StopEvent(result=sorted(done.number for done in events))


class FanSend(Workflow):
    """The older form: `ctx.send_event` and `ctx.collect_events`."""

    @step
    async def split(self, ctx: Context, ev: Split) -> Item | None:
        for number in range(ev.size):
            ctx.send_event(Item(number=number))
        return None

    @step(num_workers=4)
    async def work(self, ev: Item) -> Done:
        return Done(number=ev.number)

    @step
    async def join(self, ctx: Context, ev: Done) -> StopEvent | None:
        events = ctx.collect_events(ev, [Done] * FAN)
        return None if events is None else StopEvent(result=sorted(done.number for done in events))


# Streaming, runs under a cap


class Publish(StartEvent):
    count: int


class Delta(Event):
    number: int


class Stream(Workflow):
    """Publishes events, all in one go or with a checkpoint after each."""

    def __init__(self, checkpoint: Callable[[], Awaitable[None]] | None = None) -> None:
        super().__init__()
        self.checkpoint = checkpoint

    @step
    async def publish(self, ctx: Context, ev: Publish) -> StopEvent:
        for number in range(ev.count):
            ctx.write_event_to_stream(Delta(number=number))
            if self.checkpoint is not None:
                await self.checkpoint()
        return StopEvent(result=ev.count)


class Capped(Workflow):
    """One step with one checkpoint. Knows how many of its runs were working at once."""

    def __init__(self, checkpoint: Callable[[], Awaitable[None]], num_concurrent_runs: int | None) -> None:
        super().__init__(num_concurrent_runs=num_concurrent_runs)
        self.checkpoint = checkpoint
        self.working = self.most = 0

    @step
    async def work(self, ev: Begin) -> StopEvent:
        self.working += 1
        self.most = max(self.most, self.working)
        await self.checkpoint()
        self.working -= 1
        return StopEvent(result=ev.number + 1)


# Waiting


class Ask(StartEvent):
    number: int


class Answer(HumanResponseEvent):
    text: str


class Waiter(Workflow):
    """Waits for one answer. `on_asked` is called where a run is about to wait, and once more when it has its answer."""

    def __init__(self, on_asked: Callable[[], None]) -> None:
        super().__init__(timeout=3600)
        self.on_asked = on_asked

    @step
    async def ask(self, ctx: Context, ev: Ask) -> StopEvent:
        self.on_asked()
        answer = await ctx.wait_for_event(Answer)
        return StopEvent(result=f"{ev.number}: {answer.text}")


# What one operation is


Operation = Callable[[], Awaitable[None]]


def one_step(side: Side) -> Operation:
    workflow = OneStep()

    async def run() -> None:
        expect(await side.run(workflow, name="Ada"), "Hello, Ada!")

    return run


def handled(side: Side) -> Operation:
    workflow = OneStep()

    async def run() -> None:
        expect(await side.run_handled(workflow, name="Ada"), "Hello, Ada!")

    return run


def chain(side: Side) -> Operation:
    workflow = Chain()

    async def run() -> None:
        expect(await side.run(workflow, number=0), CHAIN)

    return run


def fan_list(side: Side) -> Operation:
    return _fan(side, FanList())


def fan_send(side: Side) -> Operation:
    return _fan(side, FanSend())


def _fan(side: Side, workflow: Workflow) -> Operation:
    wanted = list(range(FAN))

    async def run() -> None:
        expect(await side.run(workflow, size=FAN), wanted)

    return run


def stream(side: Side) -> Operation:
    return _stream(side, Stream())


def stream_slowly(side: Side) -> Operation:
    return _stream(side, Stream(side.checkpoint))


def _stream(side: Side, workflow: Workflow) -> Operation:
    async def run() -> None:
        came = 0

        def take(event: Event) -> None:
            nonlocal came
            if isinstance(event, Delta):
                expect(event.number, came)
                came += 1

        expect(await side.stream(workflow, take, count=STREAM), STREAM)
        expect(came, STREAM)

    return run


def capped(side: Side) -> Operation:
    return _capped(side, None)


def under_slots(side: Side) -> Operation:
    return _capped(side, CAP if side.has_slots else None)


def _capped(side: Side, slots: int | None) -> Operation:
    workflow = Capped(side.checkpoint, num_concurrent_runs=None if slots else CAP)

    async def run() -> None:
        workflow.most = 0
        starts = [{"number": number} for number in range(CAPPED_RUNS)]
        expect(await side.run_all(workflow, starts, slots), list(range(1, CAPPED_RUNS + 1)))
        expect(workflow.most, CAP)

    return run


@dataclass(frozen=True, slots=True)
class Workload:
    """`operations` are measured together; each is so many `units` of work."""

    title: str
    unit: str
    units: int
    operations: int
    prepare: Callable[[Side], Operation]


WORKLOADS = {
    "one-step": Workload("one step", "run", 1, 1_500, one_step),
    "handled": Workload("one step, through a handle", "run", 1, 1_500, handled),
    "chain": Workload(f"chain of {CHAIN} steps", "step", CHAIN, 100, chain),
    "fan-list": Workload(f"fan-out of {FAN}, list and collect step", "event", FAN, 20, fan_list),
    "fan-send": Workload(f"fan-out of {FAN}, send_event and collect_events", "event", FAN, 10, fan_send),
    "stream": Workload(f"{STREAM:,} streamed events, in one go", "event", STREAM, 60, stream),
    "stream-slowly": Workload(
        f"{STREAM:,} streamed events, a checkpoint after each", "event", STREAM, 40, stream_slowly
    ),
    "capped": Workload(f"{CAPPED_RUNS} runs at once, num_concurrent_runs={CAP}", "run", CAPPED_RUNS, 3, capped),
    "slots": Workload(
        f"{CAPPED_RUNS} runs at once, ours under {CAP} slots, the others as before", "run", CAPPED_RUNS, 3, under_slots
    ),
}


@dataclass(frozen=True, slots=True)
class Waiting:
    """Many runs that wait at the same time. `own_workflows`: each is of a workflow of its own, whose size counts."""

    title: str
    runs: int
    own_workflows: bool = False
    driven: bool = False


WAITING = {
    "waiting": Waiting("runs waiting for an event", 10_000),
    "waiting-driven": Waiting("runs waiting for an event, ours driven by their owner (make_run)", 10_000, driven=True),
    "waiting-own": Waiting("runs waiting for an event, each of a workflow of its own", 1_000, own_workflows=True),
}

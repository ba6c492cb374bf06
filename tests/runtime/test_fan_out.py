"""Fan-out and fan-in: lists and collect steps, joins of several events, `collect_events`, workers. As upstream."""

from __future__ import annotations

from typing import Annotated

import anyio.lowlevel
import pytest
from workflows import Context, Workflow, catch_error, step
from workflows.collect import All, Collect, Take
from workflows.errors import WorkflowRuntimeError
from workflows.events import (
    Event,
    HumanResponseEvent,
    InputRequiredEvent,
    StartEvent,
    StepFailedEvent,
    StopEvent,
    WorkflowIdleEvent,
)
from workflows.retry_policy import retry_policy, stop_after_attempt, wait_none

from .compare import Case, check

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]

AT_ONCE = retry_policy(wait=wait_none(), stop=stop_after_attempt(3))


class Item(Event):
    n: int


class Other(Event):
    n: int


class Done(Event):
    n: int


class Finish(Event):
    pass


def numbers(events):
    return sorted(event.n for event in events)


class FanOut(Workflow):
    @step
    async def split(self, ev: StartEvent) -> list[Item]:
        return [Item(n=n) for n in range(ev.count)]

    @step(num_workers=2)
    async def work(self, ev: Item) -> Done:
        return Done(n=ev.n)

    @step
    async def join(self, done: list[Done]) -> StopEvent:
        return StopEvent(result=numbers(done))


class OneWorker(FanOut):
    @step(num_workers=1)
    async def work(self, ev: Item) -> Done:
        return Done(n=ev.n)

    @step
    async def join(self, done: list[Done]) -> StopEvent:
        return StopEvent(result=[d.n for d in done])  # in order: one after the other


class InThreads(FanOut):
    @step
    def split(self, ev: StartEvent) -> list[Item]:
        return [Item(n=n) for n in range(ev.count)]

    @step
    def work(self, ev: Item) -> Done:
        return Done(n=ev.n)

    @step
    def join(self, done: list[Done]) -> StopEvent:
        return StopEvent(result=numbers(done))


class NoFanOut(Workflow):
    """Returns None where a list would fan out: no stream, no join."""

    @step
    async def split(self, ev: StartEvent) -> list[Item] | None:
        return None

    @step
    async def join(self, items: list[Item]) -> StopEvent:
        return StopEvent(result="joined")

    @step(skip_graph_checks=["reachability"])
    async def finish(self, ev: HumanResponseEvent) -> StopEvent:
        return StopEvent(result="not joined")


class ListOrBare(Workflow):
    @step
    async def split(self, ev: StartEvent) -> list[Item] | Other | Item:
        return {"list": [Item(n=1), Item(n=2)], "other": Other(n=3), "single": Item(n=4)}[ev.kind]

    @step
    async def work(self, ev: Item) -> Done:
        return Done(n=ev.n)

    @step
    async def join(self, done: list[Done]) -> StopEvent:
        return StopEvent(result=numbers(done))

    @step
    async def alone(self, ev: Other) -> StopEvent:
        return StopEvent(result=ev.n)

    @step
    async def single(self, ctx: Context, ev: Done) -> StopEvent | None:
        return StopEvent(result=("single", ev.n)) if ev.n == 4 else None


class Mixed(Workflow):
    @step
    async def split(self, ev: StartEvent) -> list[Item | Other]:
        return [Item(n=1), Other(n=2), Item(n=3)]

    @step
    async def join(self, items: list[Item | Other]) -> StopEvent:
        return StopEvent(result=[(type(item).__name__, item.n) for item in items])


class Sub(Item):
    pass


class Subclasses(Workflow):
    @step
    async def split(self, ev: StartEvent) -> list[Sub]:
        return [Sub(n=1), Sub(n=2)]

    @step(accept_event_subclasses=True)
    async def join(self, items: list[Item]) -> StopEvent:
        return StopEvent(result=[(type(item).__name__, item.n) for item in items])


class Nested(Workflow):
    @step
    async def rows(self, ev: StartEvent) -> list[Item]:
        return [Item(n=n) for n in range(ev.rows)]

    @step
    async def cells(self, ev: Item) -> list[Other]:
        return [Other(n=10 * ev.n + n) for n in range(ev.n)]

    @step
    async def row(self, cells: list[Other]) -> Done:
        return Done(n=sum(cell.n for cell in cells))

    @step
    async def join(self, rows: list[Done]) -> StopEvent:
        return StopEvent(result=numbers(rows))


class JoinFansOut(Workflow):
    @step
    async def split(self, ev: StartEvent) -> list[Item]:
        return [Item(n=1), Item(n=2)]

    @step
    async def again(self, items: list[Item]) -> list[Other]:
        return [Other(n=item.n * 10) for item in items]

    @step
    async def join(self, others: list[Other]) -> StopEvent:
        return StopEvent(result=numbers(others))


class TwoJoins(Workflow):
    @step
    async def split(self, ev: StartEvent) -> list[Item]:
        return [Item(n=1), Item(n=2)]

    @step
    async def total(self, items: list[Item]) -> Done:
        return Done(n=sum(item.n for item in items))

    @step
    async def count(self, items: list[Item]) -> Other:
        for _ in range(10):  # comes last
            await anyio.lowlevel.checkpoint()
        return Other(n=len(items))

    @step
    async def both(self, done: Done, other: Other) -> StopEvent:
        return StopEvent(result=(done.n, other.n))


class TakeTwo(FanOut):
    @step(num_workers=1)
    async def work(self, ev: Item) -> Done:
        return Done(n=ev.n)

    @step
    async def join(self, done: Annotated[list[Done], Collect(Take(2))]) -> StopEvent:
        return StopEvent(result=numbers(done))


class CollectAll(FanOut):
    @step
    async def join(self, done: Annotated[list[Done], Collect(All())]) -> StopEvent:
        return StopEvent(result=numbers(done))


class Drops(FanOut):
    @step
    async def work(self, ev: Item) -> Done | None:
        return Done(n=ev.n) if ev.n % 2 else None


class FlakyMember(FanOut):
    def __init__(self):
        super().__init__()
        self.failed = set()

    @step(retry_policy=AT_ONCE)
    async def work(self, ev: Item) -> Done:
        if ev.n not in self.failed:
            self.failed.add(ev.n)
            raise ConnectionError("first time")
        return Done(n=ev.n)


class RecoveredMember(FanOut):
    @step
    async def work(self, ev: Item) -> Done:
        if ev.n == 1:
            raise ConnectionError("lost")
        return Done(n=ev.n)

    @catch_error(for_steps=["work"])
    async def recover(self, ev: StepFailedEvent) -> Done:
        return Done(n=100 + ev.input_event.n)


class WaitingMember(FanOut):
    @step
    async def work(self, ctx: Context, ev: Item) -> Done:
        answer = await ctx.wait_for_event(
            HumanResponseEvent, waiter_event=InputRequiredEvent(prefix=str(ev.n)), requirements={"n": ev.n}
        )
        return Done(n=answer.value)


class FlakyJoin(FanOut):
    def __init__(self):
        super().__init__()
        self.batches = []

    @step(retry_policy=AT_ONCE)
    async def join(self, done: list[Done]) -> StopEvent:
        self.batches.append(numbers(done))
        if len(self.batches) < 3:
            raise ConnectionError
        return StopEvent(result=self.batches)


class FailedJoin(FanOut):
    @step
    async def join(self, done: list[Done]) -> StopEvent:
        raise LookupError("no room")

    @catch_error
    async def handle(self, ev: StepFailedEvent) -> StopEvent:
        return StopEvent(result=(ev.step_name, type(ev.input_event).__name__, numbers(ev.input_event.events)))


class WaitingJoin(FanOut):
    @step
    async def join(self, ctx: Context, done: list[Done]) -> StopEvent:
        answer = await ctx.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent(prefix="all?"))
        return StopEvent(result=(answer.response, numbers(done)))


class SendsToJoin(FanOut):
    @step
    async def split(self, ctx: Context, ev: StartEvent) -> list[Item]:
        ctx.send_event(Done(n=99), step="join" if ev.targeted else None)
        return [Item(n=1)]


class WrongList(Workflow):
    @step
    async def split(self, ev: StartEvent) -> list[Item]:
        return [Item(n=1), "no event"] if ev.kind == "element" else Item(n=1)  # type: ignore[list-item, return-value]

    @step
    async def join(self, items: list[Item]) -> StopEvent:
        return StopEvent()


class StopsInside(FanOut):
    """A member ends the run while its siblings work or wait for a worker."""

    @step(num_workers=1)
    async def work(self, ev: Item) -> Done | StopEvent:
        return StopEvent(result="stopped") if ev.n == 1 else Done(n=ev.n)


FAN_OUTS = [
    *(Case(FanOut, {"count": n}, result=[*range(n)], parallel=n > 1, name=str(n)) for n in (0, 1, 5, 100)),
    Case(OneWorker, {"count": 4}, result=[0, 1, 2, 3]),
    Case(InThreads, {"count": 4}, result=[0, 1, 2, 3], parallel=True),
    Case(NoFanOut, script=[(WorkflowIdleEvent, HumanResponseEvent())], result="not joined"),
    Case(ListOrBare, {"kind": "list"}, result=[1, 2], parallel=True, name="list"),
    Case(ListOrBare, {"kind": "other"}, result=3, name="other"),
    Case(ListOrBare, {"kind": "single"}, result=("single", 4), name="single"),
    Case(Mixed, result=[("Item", 1), ("Other", 2), ("Item", 3)]),
    Case(Subclasses, result=[("Sub", 1), ("Sub", 2)]),
    Case(Nested, {"rows": 4}, result=[0, 10, 41, 93], parallel=True, name="4"),
    Case(Nested, {"rows": 1}, result=[0], name="1"),
    Case(JoinFansOut, result=[10, 20]),
    Case(TwoJoins, result=(3, 2), parallel=True),
    Case(TakeTwo, {"count": 5}, result=[0, 1], cut=True, name="5"),
    Case(TakeTwo, {"count": 1}, result=[0], name="1"),
    Case(TakeTwo, {"count": 0}, result=[], name="0"),
    Case(CollectAll, {"count": 3}, result=[0, 1, 2], parallel=True),
    Case(Drops, {"count": 4}, result=[1, 3], parallel=True),
    Case(FlakyMember, {"count": 3}, result=[0, 1, 2], parallel=True),
    Case(RecoveredMember, {"count": 3}, result=[0, 2, 101], parallel=True),
    Case(
        WaitingMember,
        {"count": 3},
        script=[(WorkflowIdleEvent, [HumanResponseEvent(n=n, value=n * 7) for n in (2, 0, 1)])],
        result=[0, 7, 14],
        parallel=True,
    ),
    Case(FlakyJoin, {"count": 2}, result=[[0, 1]] * 3, parallel=True),
    Case(FailedJoin, {"count": 2}, result=("join", "CollectionReleaseEvent", [0, 1]), parallel=True, name="2"),
    Case(FailedJoin, {"count": 0}, result=("join", "CollectionReleaseEvent", []), name="0"),
    Case(
        WaitingJoin,
        {"count": 2},
        script=[(WorkflowIdleEvent, HumanResponseEvent(response="yes"))],
        result=("yes", [0, 1]),
        parallel=True,
    ),
    Case(SendsToJoin, {"targeted": False}, result=[1], name="anywhere"),
    Case(SendsToJoin, {"targeted": True}, error=WorkflowRuntimeError, match="collect step 'join'", cut=True, name="to"),
    Case(WrongList, {"kind": "element"}, error=WorkflowRuntimeError, match="containing str", name="element"),
    Case(WrongList, {"kind": "bare"}, error=WorkflowRuntimeError, match="bare Item", words=False, name="bare"),
    Case(StopsInside, {"count": 4}, result="stopped", cut=True),
]


@pytest.mark.parametrize("case", FAN_OUTS, ids=str)
async def test_lists_fan_out_and_in(flavour, case):
    await check(case, flavour)


class Join(Workflow):
    """One call for one event of each kind, round after round."""

    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item | Other | None:
        for n in range(2):
            ctx.send_event(Item(n=n))
        for n in range(2):
            ctx.send_event(Other(n=10 + n))
        return None

    @step
    async def join(self, ctx: Context, item: Item, other: Other) -> Done:
        return Done(n=item.n + other.n)

    @step
    async def finish(self, ctx: Context, ev: Done) -> StopEvent | None:
        done = ctx.collect_events(ev, [Done] * 2)
        return None if done is None else StopEvent(result=numbers(done))


class JoinOfSubclasses(Workflow):
    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item | Other | None:
        ctx.send_event(Other(n=1))
        ctx.send_event(Sub(n=2))
        return None

    @step(accept_event_subclasses=True)
    async def join(self, item: Item, other: Other) -> StopEvent:
        return StopEvent(result=(item.n, other.n))


class Gather(Workflow):
    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item | None:
        for n in range(6):
            ctx.send_event(Item(n=n))
        return None

    @step(num_workers=3)
    async def gather(self, ctx: Context, ev: Item) -> StopEvent | None:
        items = ctx.collect_events(ev, [Item] * 6)
        return None if items is None else StopEvent(result=numbers(items))


class GatherKinds(Workflow):
    """In the order asked for, whatever the order in which they come; what is too many is dropped."""

    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item | Other | Done | None:
        for event in (Other(n=1), Other(n=2), Done(n=3), Item(n=4)):
            ctx.send_event(event)
        return None

    @step(num_workers=1)
    async def gather(self, ctx: Context, ev: Item | Other | Done) -> StopEvent | None:
        events = ctx.collect_events(ev, [Item, Done, Other])
        return None if events is None else StopEvent(result=[event.n for event in events])


class Buffers(Workflow):
    """Two buffers in one step, and one of them filled twice."""

    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item | None:
        for n in range(6):
            ctx.send_event(Item(n=n))
        return None

    @step(num_workers=1)
    async def gather(self, ctx: Context, ev: Item) -> StopEvent | None:
        assert ctx.collect_events(ev, []) == []
        batch = ctx.collect_events(ev, [Item] * 2, buffer_id="even" if ev.n % 2 == 0 else "odd")
        if batch is None:
            return None
        async with ctx.store.edit_state() as state:
            state["batches"] = batches = [*state.get("batches", []), numbers(batch)]
        return StopEvent(result=batches) if len(batches) == 2 else None


class GatherAfterFailing(Workflow):
    """A call that fails after it took its events finds them again."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item | None:
        for n in range(2):
            ctx.send_event(Item(n=n))
        return None

    @step(num_workers=1, retry_policy=AT_ONCE)
    async def gather(self, ctx: Context, ev: Item) -> StopEvent | None:
        items = ctx.collect_events(ev, [Item] * 2)
        if items is None:
            return None
        self.calls += 1
        if self.calls < 3:
            raise ConnectionError
        return StopEvent(result=numbers(items))


class Slow(Workflow):
    """One worker: the calls of a step go one after the other, in the order of their events."""

    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item | None:
        for n in range(4):
            ctx.send_event(Item(n=n))
        return None

    @step(num_workers=1)
    async def work(self, ctx: Context, ev: Item) -> Done:
        async with ctx.store.edit_state() as state:
            state["order"] = [*state.get("order", []), ev.n]
        await anyio.lowlevel.checkpoint()
        return Done(n=ev.n)

    @step(num_workers=1)
    async def finish(self, ctx: Context, ev: Done) -> StopEvent | None:
        return StopEvent(result=await ctx.store.get("order")) if ev.n == 3 else None


GATHERINGS = [
    Case(Join, result=[10, 12], parallel=True),
    Case(JoinOfSubclasses, result=(2, 1), parallel=True),
    Case(Gather, result=[0, 1, 2, 3, 4, 5], parallel=True),
    Case(GatherKinds, result=[4, 3, 1], parallel=True),
    Case(Buffers, result=[[0, 2], [1, 3]], parallel=True),
    Case(GatherAfterFailing, result=[0, 1], parallel=True),
    Case(Slow, result=[0, 1, 2, 3], parallel=True),
]


@pytest.mark.parametrize("case", GATHERINGS, ids=str)
async def test_events_are_gathered(flavour, case):
    await check(case, flavour)

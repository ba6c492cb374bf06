"""`wait_for_event`: as upstream, and where ours holds what upstream drops (runtime/mailbox.py)."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest
from workflows import Context, Workflow, catch_error, step
from workflows.errors import ContextStateError, WorkflowCancelledByUser, WorkflowTimeoutError
from workflows.events import (
    Event,
    HumanResponseEvent,
    InputRequiredEvent,
    StartEvent,
    StepFailedEvent,
    StepStateChanged,
    StopEvent,
    UnhandledEvent,
    WorkflowIdleEvent,
)
from workflows.retry_policy import retry_policy, stop_after_attempt, wait_none

from llama_corral.runtime import open_run

from .compare import CANCEL, Case, check, on_ours, on_upstream

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]

AT_ONCE = retry_policy(wait=wait_none(), stop=stop_after_attempt(3))


class Question(InputRequiredEvent):
    topic: str


class Answer(HumanResponseEvent):
    text: str


class Short(Answer):
    pass


class Item(Event):
    n: int = 0


class Done(Event):
    n: int = 0


def answer(text, **fields):
    return Answer(text=text, **fields)


class Ask(Workflow):
    """Whatever is given for `requirements`, `waiter_id` and `timeout` goes to the call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = 0

    @step
    async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
        self.calls += 1
        got = await ctx.wait_for_event(Answer, waiter_event=Question(topic="name"), **dict(ev.items()))
        return StopEvent(result=(got.text, self.calls))


class AskBriefly(Ask):
    def __init__(self):
        super().__init__(timeout=0.3)


class AskTwice(Workflow):
    """One after the other in a step; under one id the first answer serves both."""

    @step
    async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
        first = await ctx.wait_for_event(Answer, waiter_event=Question(topic="one"), waiter_id=ev.first)
        second = await ctx.wait_for_event(Answer, waiter_event=Question(topic="two"), waiter_id=ev.second)
        return StopEvent(result=[first.text, second.text])


class AskInASecondStep(Workflow):
    @step
    async def start(self, ev: StartEvent) -> Item:
        return Item(n=3)

    @step
    async def ask(self, ctx: Context, ev: Item) -> Done:
        got = await ctx.wait_for_event(Answer, waiter_event=Question(topic=str(ev.n)))
        return Done(n=ev.n + len(got.text))

    @step
    async def finish(self, ev: Done) -> StopEvent:
        return StopEvent(result=ev.n)


class FailsAfterTheAnswer(Workflow):
    """A retry finds the answer that the failed call had."""

    def __init__(self):
        super().__init__()
        self.answers = []

    @step(retry_policy=AT_ONCE)
    async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
        got = await ctx.wait_for_event(Answer, waiter_event=Question(topic="name"))
        self.answers.append(got.text)
        if len(self.answers) < 3:
            raise ConnectionError
        return StopEvent(result=self.answers)


class HandlerAsks(Workflow):
    @step
    async def fail(self, ev: StartEvent) -> StopEvent:
        raise LookupError("gone")

    @catch_error
    async def handle(self, ctx: Context, ev: StepFailedEvent) -> StopEvent:
        got = await ctx.wait_for_event(Answer, waiter_event=Question(topic=str(ev.exception)))
        return StopEvent(result=got.text)


class BothGetIt(Workflow):
    """An event goes to a step that takes its type and to a step that waits for it."""

    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Item | None:
        return Item()

    @step
    async def ask(self, ctx: Context, ev: Item) -> Done:
        got = await ctx.wait_for_event(Answer)
        return Done(n=len(got.text))

    @step
    async def take(self, ctx: Context, ev: Answer) -> Done:
        return Done(n=100)

    @step(num_workers=1)
    async def finish(self, ctx: Context, ev: Done) -> StopEvent | None:
        done = ctx.collect_events(ev, [Done] * 2)
        return None if done is None else StopEvent(result=sorted(d.n for d in done))


class TwoWait(Workflow):
    """Two steps wait for the same type: the first event is for both."""

    @step
    async def left(self, ctx: Context, ev: StartEvent) -> Done:
        return Done(n=len((await ctx.wait_for_event(Answer)).text))

    @step
    async def right(self, ctx: Context, ev: StartEvent) -> Done:
        return Done(n=10 * len((await ctx.wait_for_event(Answer)).text))

    @step(num_workers=1)
    async def finish(self, ctx: Context, ev: Done) -> StopEvent | None:
        done = ctx.collect_events(ev, [Done] * 2)
        return None if done is None else StopEvent(result=sorted(d.n for d in done))


class OwnType(Workflow):
    """Waits for the type that it takes itself."""

    @step
    async def start(self, ev: StartEvent) -> Answer:
        return answer("first")

    @step
    async def ask(self, ctx: Context, ev: Answer) -> StopEvent:
        got = await ctx.wait_for_event(Answer)
        return StopEvent(result=[ev.text, got.text])


class WaitsForAStep(Workflow):
    """What one step sends, another waits for."""

    @step
    async def wait(self, ctx: Context, ev: StartEvent) -> StopEvent:
        got = await ctx.wait_for_event(Done, waiter_event=Question(topic="done?"))
        return StopEvent(result=got.n)

    @step(skip_graph_checks=["reachability"])
    async def work(self, ctx: Context, ev: HumanResponseEvent) -> Item:
        ctx.send_event(Done(n=7))
        return Item()

    @step
    async def rest(self, ev: Item) -> StopEvent | None:
        return None


class Subclasses(Workflow):
    @step(accept_event_subclasses=True)
    async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
        got = await ctx.wait_for_event(Answer, waiter_event=Question(topic="any"))
        return StopEvent(result=(type(got).__name__, got.text))


class Late(Workflow):
    """Goes on without an answer, and may ask again under the same id."""

    @step
    async def ask(self, ctx: Context, ev: StartEvent | Item) -> Item | StopEvent:
        try:
            got = await ctx.wait_for_event(Answer, waiter_event=Question(topic="late"), waiter_id="id", timeout=0.01)
        except TimeoutError as exc:
            if isinstance(ev, Item):
                return StopEvent(result=str(exc))
            return Item()
        return StopEvent(result=got.text)


class ByTurns(Workflow):
    """People and steps: what a step returns asks, what a step takes answers."""

    @step
    async def ask(self, ev: StartEvent | Item) -> Question:
        return Question(topic=f"round {ev.get('n', 0) if isinstance(ev, StartEvent) else ev.n}")

    @step
    async def take(self, ev: Answer) -> Item | StopEvent:
        return StopEvent(result=ev.text) if ev.text == "enough" else Item(n=1)


ASKED = (Question, answer("ada"))

WAITERS = [
    Case(Ask, script=[ASKED], result=("ada", 2)),
    Case(Ask, {"waiter_id": "mine", "timeout": None}, [ASKED], result=("ada", 2), name="id"),
    Case(
        Ask,
        {"requirements": {"user": "ada", "where": {"room": 1}}},
        [(Question, answer("ada", user="ada", where={"room": 1}))],
        result=("ada", 2),
        name="requirements",
    ),
    Case(Ask, script=[(WorkflowIdleEvent, CANCEL)], error=WorkflowCancelledByUser, name="cancelled"),
    Case(Ask, {"timeout": 0.01}, error=TimeoutError, match="Answer", name="timeout"),
    Case(AskTwice, {"first": None, "second": None}, [ASKED], result=["ada", "ada"], name="no-id"),
    Case(AskInASecondStep, script=[ASKED], result=6),
    Case(FailsAfterTheAnswer, script=[ASKED], result=["ada"] * 3),
    Case(HandlerAsks, script=[ASKED], result="ada"),
    Case(BothGetIt, script=[(WorkflowIdleEvent, answer("four"))], result=[4, 100], parallel=True),
    Case(TwoWait, script=[(WorkflowIdleEvent, answer("x"))], result=[1, 10], parallel=True),
    Case(OwnType, script=[(WorkflowIdleEvent, answer("second"))], result=["first", "second"]),
    Case(WaitsForAStep, script=[(Question, HumanResponseEvent())], result=7, cut=True),
    Case(Subclasses, script=[(Question, Short(text="s"))], result=("Short", "s")),
    Case(Late, result="Timed out waiting for Answer"),
    Case(ByTurns, script=[(Question, answer("more")), (Question, answer("enough"))], result="enough"),
    Case(AskBriefly, error=WorkflowTimeoutError, match="No steps active"),
]


@pytest.mark.parametrize("case", WAITERS, ids=str)
async def test_waiting_as_upstream(flavour, case):
    await check(case, flavour)


# Where ours differs, on purpose: an event from outside waits until something can take it, and a waiter gets one event.


class SlowToAsk(Ask):
    @step
    async def ask(self, ctx: Context, ev: StartEvent) -> StopEvent:
        for _ in range(50):
            await anyio.lowlevel.checkpoint()
        got = await ctx.wait_for_event(Answer)
        return StopEvent(result=got.text)


async def test_an_answer_before_the_question_is_held_where_upstream_drops_it(flavour):
    case = Case(SlowToAsk, script=[(StepStateChanged, answer("early")), (WorkflowIdleEvent, answer("late"))])
    ours, theirs = await on_ours(case, flavour), await on_upstream(case)
    assert (ours.outcome, theirs.outcome) == (("returned", "early"), ("returned", "late"))
    assert not any("UnhandledEvent" in told for told in ours.events)
    assert sum("UnhandledEvent" in told for told in theirs.events) == 1


async def test_a_second_answer_goes_to_the_second_question_where_upstream_overwrites_the_first(flavour):
    start = {"first": "a", "second": "b"}
    case = Case(AskTwice, start, [(Question, answer("x")), (Question, answer("y"))])
    ours, theirs = await on_ours(case, flavour), await on_upstream(case)
    assert (ours.outcome, theirs.outcome) == (("returned", ["x", "y"]), ("returned", ["y", "y"]))


async def test_what_nobody_takes_is_reported_at_the_end_where_upstream_reports_it_at_once(flavour):
    start = {"requirements": {"user": "ada"}}
    script = [(WorkflowIdleEvent, [answer("no", user="bob"), answer("yes", user="ada")])]
    case = Case(Ask, start, script)
    ours, theirs = await on_ours(case, flavour), await on_upstream(case)
    assert ours.outcome == theirs.outcome == ("returned", ("yes", 2))
    unhandled = [[index for index, told in enumerate(it.events) if "Unhandled" in told] for it in (ours, theirs)]
    assert unhandled[0] == [len(ours.events) - 2]  # before the stop event, at which readers stop
    assert len(unhandled[1]) == 1
    assert unhandled[1] < [len(theirs.events) - 3]


async def test_one_answer_too_many_is_reported(flavour):
    async with open_run(Ask(), flavour=flavour, internal_events=True) as run:
        await anyio.wait_all_tasks_blocked()
        for text in ("one", "two"):
            run.send_event(answer(text))
        assert (await run.result())[0] == "one"
        assert [event.event_type async for event in run.events() if isinstance(event, UnhandledEvent)] == ["Answer"]


# What no observer sees


@pytest.mark.parametrize(("timeout", "timers"), [({}, 1), ({"timeout": 5.0}, 1), ({"timeout": None}, 0)])
async def test_a_waiter_has_a_timer_unless_it_waits_for_ever(flavour, timeout, timers):
    async with open_run(Ask(timeout=None), start_event=StartEvent(**timeout), flavour=flavour) as run:
        await anyio.wait_all_tasks_blocked()
        assert run.statistics().timers == timers


class Crowd(Workflow):
    @step
    async def start(self, ev: StartEvent) -> list[Item]:
        return [Item(n=n) for n in range(ev.count)]

    @step(num_workers=30)
    async def ask(self, ctx: Context, ev: Item) -> Done:
        got = await ctx.wait_for_event(Answer, requirements={"n": ev.n})
        return Done(n=ev.n - int(got.text))

    @step
    async def finish(self, done: list[Done]) -> StopEvent:
        return StopEvent(result=[d.n for d in done])


@pytest.mark.parametrize("when", ["early", "idle"])
async def test_thirty_waiters_each_get_their_own_answer(flavour, when):
    async with open_run(Crowd(), count=30, flavour=flavour) as run:
        if when == "idle":
            await anyio.wait_all_tasks_blocked()
            assert run.is_idle
        for n in reversed(range(30)):
            run.send_event(answer(str(n), n=n))
        assert await run.result() == [0] * 30
        assert run.held_events() == []


async def test_waiters_in_other_runs_of_the_workflow_are_their_own(flavour):
    workflow = Ask()
    async with open_run(workflow, flavour=flavour) as one, open_run(workflow, flavour=flavour) as other:
        await anyio.wait_all_tasks_blocked()
        one.send_event(answer("one"))
        assert (await one.result())[0] == "one"
        assert other.is_idle
        other.send_event(answer("other"))
        assert (await other.result())[0] == "other"


async def test_waiting_outside_of_a_step_is_refused(flavour):
    async with open_run(Ask(), flavour=flavour) as run:
        with pytest.raises(ContextStateError, match="within step"):
            await run.context.wait_for_event(Answer)

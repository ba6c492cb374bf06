"""Published events and events from outside: order, readers, limits, and what nothing takes."""

from __future__ import annotations

import logging

import anyio
import anyio.lowlevel
import pytest
from workflows import Context, Workflow, step
from workflows.errors import WorkflowCancelledByUser
from workflows.events import (
    Event,
    HumanResponseEvent,
    InputRequiredEvent,
    StartEvent,
    StopEvent,
    UnhandledEvent,
    WorkflowIdleEvent,
)

from llama_corral.exceptions import EventsLost, MailboxFull, RunClosed
from llama_corral.runtime import RunHooks, RunOptions, make_run, open_run, run_workflow

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


class Note(Event):
    n: int = 0


class Go(Event):
    pass


class Stranger(Event):
    pass


class Talker(Workflow):
    @step
    async def talk(self, ctx: Context, ev: StartEvent) -> StopEvent:
        for n in range(ev.get("count")):
            ctx.write_event_to_stream(Note(n=n))
            if ev.get("pause", False):
                await anyio.lowlevel.checkpoint()
        return StopEvent(result="said")


def numbers(events):
    return [event.n for event in events if isinstance(event, Note)]


@pytest.mark.promise("P3")
@pytest.mark.parametrize("pause", [True, False])
async def test_several_readers_see_everything_in_order(flavour, pause):
    seen: list[list[Event]] = [[], [], []]

    async def read(run, into):
        async for event in run.events():
            into.append(event)

    async with open_run(Talker(), count=200, pause=pause, flavour=flavour) as run:
        async with anyio.create_task_group() as group:
            for into in seen:
                group.start_soon(read, run, into)
        for into in seen:
            assert numbers(into) == list(range(200))
            assert isinstance(into[-1], StopEvent)


async def test_a_late_reader_reads_from_the_first_event(flavour):
    async with open_run(Talker(), count=5, flavour=flavour) as run:
        await run.result()
        assert numbers([event async for event in run.events()]) == list(range(5))
    assert numbers([event async for event in run.events()]) == list(range(5))


@pytest.mark.promise("P12")
async def test_nobody_reads_and_the_ring_keeps_the_latest(flavour):
    async with open_run(Talker(), count=100, flavour=flavour, event_buffer=10) as run:
        assert await run.result() == "said"
        reader = run.events()
        with pytest.raises(EventsLost) as lost:
            await anext(reader)
        assert lost.value.fields["lost"] == 91
        assert numbers([event async for event in reader]) == list(range(91, 100))
        assert run.statistics().lost_events == 91


async def test_a_cancelled_reader_loses_no_event(flavour):
    async with open_run(Talker(), count=300, flavour=flavour) as run:
        await run.result()
        reader = run.events()
        seen = []
        while True:
            try:
                with anyio.CancelScope() as scope:
                    scope.cancel()
                    seen.append(await anext(reader))
                if scope.cancelled_caught:
                    seen.append(await anext(reader))
            except StopAsyncIteration:
                break
        assert numbers(seen) == list(range(300))


async def test_internal_events_on_request(flavour):
    async with open_run(Talker(), count=1, flavour=flavour, internal_events=True) as run:
        names = [type(event).__name__ async for event in run.events()]
    assert names == ["StepStateChanged", "Note", "StepStateChanged", "StopEvent"]


class Listener(Workflow):
    """Takes Go at any time, answers one HumanResponseEvent."""

    @step
    async def start(self, ctx: Context, ev: StartEvent) -> Go | None:
        await ctx.store.set("started", True)
        return None

    @step
    async def go(self, ctx: Context, ev: Go) -> StopEvent:
        answer = await ctx.wait_for_event(HumanResponseEvent)
        return StopEvent(result=answer.response)


async def test_an_event_before_its_waiter_is_held(flavour):
    async with open_run(Listener(), flavour=flavour) as run:
        run.send_event(HumanResponseEvent(response="early"))
        await anyio.wait_all_tasks_blocked()
        assert [type(event) for event in run.held_events()] == [HumanResponseEvent]
        assert run.is_idle
        run.send_event(Go())
        assert await run.result() == "early"
        assert run.held_events() == []


class Quiz(Workflow):
    """Asks three times, one step after the other, always for the same type."""

    @step
    async def ask(self, ctx: Context, ev: StartEvent | Note) -> Note | StopEvent:
        answer = await ctx.wait_for_event(HumanResponseEvent)
        async with ctx.store.edit_state() as state:
            answers = [*state.get("answers", []), answer.response]
            state["answers"] = answers
        return StopEvent(result=answers) if len(answers) == 3 else Note()


@pytest.mark.parametrize("when", ["before", "idle"])
async def test_answers_sent_in_a_burst_go_one_to_a_question(flavour, when):
    run = make_run(Quiz(), options=RunOptions(flavour="anyio"))

    def send() -> None:
        for n in range(3):
            run.send_event(HumanResponseEvent(response=str(n)))

    async with anyio.create_task_group() as group:
        if when == "before":
            send()
            group.start_soon(run.drive)
        else:
            group.start_soon(run.drive)
            await anyio.wait_all_tasks_blocked()
            send()
        assert await run.result() == ["0", "1", "2"]


class Picky(Workflow):
    @step
    async def start(self, ctx: Context, ev: StartEvent) -> StopEvent:
        first = await ctx.wait_for_event(HumanResponseEvent, requirements={"user": "ada"})
        return StopEvent(result=first.response)


async def test_requirements_decide_who_answers(flavour):
    async with open_run(Picky(), flavour=flavour) as run:
        await anyio.wait_all_tasks_blocked()
        run.send_event(HumanResponseEvent(response="no", user="bob"))
        await anyio.wait_all_tasks_blocked()
        assert not run.is_done
        assert len(run.held_events()) == 1
        run.send_event(HumanResponseEvent(response="yes", user="ada"))
        assert await run.result() == "yes"


@pytest.mark.promise("P9")
async def test_an_event_that_nothing_takes_is_reported(flavour, caplog):
    caplog.set_level(logging.WARNING)
    async with open_run(Listener(), flavour=flavour, internal_events=True) as run:
        await anyio.wait_all_tasks_blocked()
        run.send_event(Stranger())
        run.send_event(Go())
        run.send_event(HumanResponseEvent(response="done"))
        assert await run.result() == "done"
        events = [event async for event in run.events()]
    unhandled = [event for event in events if isinstance(event, UnhandledEvent)]
    assert [event.event_type for event in unhandled] == ["Stranger"]
    assert isinstance(events[-1], StopEvent)  # reported before the end, for readers who stop there
    assert "Stranger" in caplog.text


async def test_events_that_come_at_the_very_end_are_reported_too(flavour, caplog):
    class Late(RunHooks):
        def on_event(self, event):
            if isinstance(event, Note):
                run.send_event(Stranger())  # while the run is reducing

    run = make_run(Talker(), hooks=Late(), start_kwargs={"count": 1}, options=RunOptions(internal_events=True))
    await run.drive()
    assert any(isinstance(event, UnhandledEvent) for event in [event async for event in run.events()])


@pytest.mark.promise("P12")
async def test_the_mailbox_has_a_limit(flavour):
    async with open_run(Listener(), flavour=flavour, mailbox=3) as run:
        await anyio.wait_all_tasks_blocked()
        for _ in range(3):
            run.send_event(HumanResponseEvent(response="x"))
        with pytest.raises(MailboxFull):
            run.send_event(HumanResponseEvent(response="too many"))
        with pytest.raises(MailboxFull):
            run.context.send_event(HumanResponseEvent(response="too many"))


class Flood(Workflow):
    @step
    async def flood(self, ctx: Context, ev: StartEvent) -> Go | Note | None:
        for _ in range(30):
            ctx.send_event(Note())
        return None

    @step(num_workers=1)
    async def slow(self, ctx: Context, ev: Note) -> StopEvent | None:
        await anyio.sleep_forever()
        return None

    @step
    async def other(self, ctx: Context, ev: Go) -> StopEvent:
        return StopEvent()


@pytest.mark.promise("P12")
async def test_a_step_that_floods_its_run_fails_by_name(flavour, monkeypatch):
    monkeypatch.setattr("llama_corral.runtime.driver.INTERNAL_MAILBOX", 20)
    with pytest.raises(MailboxFull, match="'flood'") as caught:
        await run_workflow(Flood(), flavour=flavour)
    assert caught.value.fields["step"] == "flood"


async def test_a_run_that_has_ended_takes_nothing(flavour):
    async with open_run(Talker(), count=0, flavour=flavour) as run:
        await run.result()
        with pytest.raises(RunClosed):
            run.send_event(Go())
        run.cancel()  # nothing to cancel
        assert await run.result() == "said"


class Idler(Workflow):
    @step
    async def wait(self, ctx: Context, ev: StartEvent) -> StopEvent:
        answer = await ctx.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent(prefix="?"))
        return StopEvent(result=answer.response)


async def test_idle_is_told_once_each_time(flavour):
    idle = []

    class Hooks(RunHooks):
        def on_idle(self):
            idle.append(run.is_idle)

    async with open_run(Idler(), hooks=Hooks(), flavour=flavour, internal_events=True) as run:
        await anyio.wait_all_tasks_blocked()
        assert idle == [True]
        run.send_event(Stranger())
        await anyio.wait_all_tasks_blocked()
        assert idle == [True]
        run.send_event(HumanResponseEvent(response="x"))
        await run.result()
        events = [event async for event in run.events()]
    assert idle == [True]
    assert sum(isinstance(event, WorkflowIdleEvent) for event in events) == 1


async def test_a_hook_may_send_when_the_run_is_idle(flavour):
    class Hooks(RunHooks):
        def on_idle(self):
            run.send_event(HumanResponseEvent(response="from the hook"))

    async with open_run(Idler(), hooks=Hooks(), flavour=flavour) as run:
        assert await run.result() == "from the hook"


class Refuses(RunHooks):
    def __init__(self, where):
        self.where = where

    async def before_step(self, step):
        if self.where == "before_step":
            raise LookupError("hook")

    def on_event(self, event):
        if self.where == "on_event" and isinstance(event, InputRequiredEvent):
            raise LookupError("hook")

    def on_idle(self):
        if self.where == "on_idle":
            raise LookupError("hook")


@pytest.mark.parametrize("where", ["before_step", "on_event", "on_idle"])
async def test_an_error_of_a_hook_ends_the_run_with_it(flavour, where, caplog):
    async with open_run(Idler(), hooks=Refuses(where), flavour=flavour) as run:
        with pytest.raises(LookupError, match="hook"):
            await run.result()
    assert "failed inside the runtime" in caplog.text


async def test_a_hook_that_refuses_an_event_fails_the_step_that_publishes(flavour):
    class Full(RunHooks):
        def on_event(self, event):
            if isinstance(event, Note):
                raise LookupError("full")

    async with open_run(Talker(), count=1, hooks=Full(), flavour=flavour, internal_events=True) as run:
        with pytest.raises(LookupError, match="full"):
            await run.result()
        failed = [event async for event in run.events()][-1]
    assert failed.step_name == "talk"


class Relay(Workflow):
    """Watches and answers another run from inside of a step."""

    @step
    async def watch(self, ctx: Context, ev: StartEvent) -> StopEvent:
        other = ev.get("other")
        async for event in other.events():
            if isinstance(event, InputRequiredEvent):
                other.send_event(HumanResponseEvent(response="across"))
        return StopEvent(result=await other.result())


@pytest.mark.parametrize("watched", ["anyio", "asyncio"])
async def test_a_run_can_be_watched_and_answered_from_the_other_flavour(flavour, watched):
    async with open_run(Idler(), flavour=watched) as other:
        start = StartEvent(other=other)
        assert await run_workflow(Relay(), start_event=start, flavour=flavour) == "across"


class Host(Workflow):
    """Opens a run in its own library and hands it out."""

    def __init__(self, box):
        super().__init__()
        self.box = box

    @step
    async def host(self, ev: StartEvent) -> StopEvent:
        async with open_run(Idler()) as run:
            self.box["run"] = run
            return StopEvent(result=await run.result())


@pytest.mark.parametrize("then", ["answer", "cancel"])
async def test_a_nested_run_can_be_answered_from_outside_of_its_library(flavour, then):
    box = {}
    async with open_run(Host(box), flavour=flavour) as outer:
        await anyio.wait_all_tasks_blocked()
        reader = box["run"].events()
        assert isinstance(await anext(reader), InputRequiredEvent)
        if then == "answer":
            box["run"].send_event(HumanResponseEvent(response="from outside"))
            assert await box["run"].result() == "from outside"
            assert await outer.result() == "from outside"
        else:
            box["run"].cancel()
            with pytest.raises(WorkflowCancelledByUser):
                await outer.result()

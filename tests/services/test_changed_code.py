"""Stored runs and contexts whose workflow has changed since."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace

import anyio
import pytest
from pydantic import BaseModel
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

from llama_corral.exceptions import UsageError

from .flows import Counter, WaitsFor
from .rig import PATIENCE, Probe, Recorder, until

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P1", "P2")]


class Draft(Event):
    text: str = ""


class Review(Event):
    text: str = ""


class Kept(BaseModel):
    n: int = 0


class Other(BaseModel):
    m: int = 0


class Version1(Workflow):
    """Works, asks, and goes on with the answer."""

    def __init__(self, probe=None):
        super().__init__(timeout=None)
        self.probe = probe or Probe()

    @step
    async def write(self, ev: StartEvent, ctx: Context) -> Draft:
        self.probe.entered.append("write")
        return Draft(text=ev.get("text", ""))

    @step
    async def ask(self, ev: Draft, ctx: Context) -> StopEvent:
        self.probe.entered.append("ask")
        got = await ctx.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent())
        return StopEvent(result=f"{ev.text} {got.response}")


class NewStart(StartEvent):
    text: str
    more: str


class WantsMoreAtTheStart(Version1):
    @step
    async def write(self, ev: NewStart, ctx: Context) -> Draft:
        return Draft(text=ev.more)


class AddsAStep(Version1):
    """Whatever waited still has its place."""

    @step
    async def more(self, ev: Review) -> Draft:
        return Draft(text=ev.text)

    @step
    async def never(self, ev: Draft, ctx: Context) -> Review | None:
        return None


class RenamesTheStep(Workflow):
    def __init__(self, probe=None):
        super().__init__(timeout=None)
        self.probe = probe or Probe()

    @step
    async def write(self, ev: StartEvent, ctx: Context) -> Draft:
        self.probe.entered.append("write")
        return Draft(text=ev.get("text", ""))

    @step
    async def question(self, ev: Draft, ctx: Context) -> StopEvent:
        self.probe.entered.append("question")
        got = await ctx.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent())
        return StopEvent(result=f"{ev.text} {got.response}!")


async def left_by(rig, workflow, session=None, **arguments):
    """A task that waits, stored, with nobody to take it."""
    service = await rig.serve(workflow)
    task_id = await rig.submit(session=session, text="a", **arguments)
    await rig.wait_status(task_id, "waiting")
    await rig.stop(service)
    return task_id


@pytest.mark.parametrize("on_change", ["resume", "restart", "fail"])
async def test_unchanged_code_goes_on(rig, on_change):
    task_id = await left_by(rig, Version1())
    probe = Probe()
    await rig.serve(Version1(probe), on_change=on_change)
    await rig.answer(task_id)
    assert (await rig.result(task_id)).result == '"a yes"'
    assert "write" not in probe.entered


async def test_what_still_fits_goes_on(rig):
    task_id = await left_by(rig, Version1())
    probe = Probe()
    await rig.serve(AddsAStep(probe))
    await rig.answer(task_id)
    assert (await rig.result(task_id)).result == '"a yes"'
    assert "write" not in probe.entered


async def test_a_start_that_would_be_refused_now_is_over(rig):
    task_id = await left_by(rig, Version1())
    service = await rig.serve(WantsMoreAtTheStart())
    await rig.answer(task_id)
    assert (await rig.result(task_id)).result == '"a yes"'
    await rig.stop(service)
    task_id = await left_by(rig, Version1())
    await rig.serve(WantsMoreAtTheStart(), on_change="restart")
    record = await rig.result(task_id)
    assert (record.status, record.error.type) == ("failed", "BadInput")


async def test_what_does_not_fit_fails_and_says_what_to_do(rig):
    task_id = await left_by(rig, Version1())
    service = await rig.serve(RenamesTheStep())
    record = await rig.result(task_id)
    assert (record.status, record.error.type, record.error.retryable) == ("failed", "workflow_changed", True)
    assert "step 'ask', which had work to do, is gone" in record.error.message
    assert "corral retry --fresh" in record.error.message
    # The code is changed back, and the task repeated: it goes on where it was.
    await rig.stop(service)
    again = (await rig.store.retry(task_id, time.time())).task_id
    probe = Probe()
    await rig.serve(Version1(probe))
    rig.plane._effects.tickets(await rig.store.due_tickets())
    await rig.answer(again)
    assert (await rig.result(again)).result == '"a yes"'
    assert "write" not in probe.entered


@pytest.mark.parametrize("workflow", [AddsAStep, RenamesTheStep])
async def test_restart_begins_again_with_every_event_that_came(rig, workflow, caplog):
    task_id = await left_by(rig, Version1())
    await rig.plane.send_event(
        task_id, '{"qualified_name": "workflows.events.HumanResponseEvent", "value": {"response": "x"}}'
    )
    probe = Probe()
    with caplog.at_level(logging.WARNING):
        await rig.serve(workflow(probe), on_change="restart")
        assert (await rig.result(task_id)).result.startswith('"a x')
    assert probe.entered[0] == "write"
    assert any("starts without its checkpoint" in message for message in caplog.messages)
    (mark,) = [json.loads(event.payload) for event in await rig.events(task_id) if event.type == "RunResumed"]
    assert (mark["epoch"], mark["from_index"], mark["dropped"]) == (2, 0, ["checkpoint"])
    assert "has changed" in mark["reason"]


async def test_restart_takes_events_again_that_the_checkpoint_had_taken(rig):
    class AsksMore(WaitsFor):
        @step
        async def more(self, ev: Draft) -> StopEvent | None:
            return None

        @step
        async def source(self, ev: StartEvent) -> Draft | None:
            return None

    recorder = Recorder(rig.plane)
    service = await rig.serve(WaitsFor(timeout=None), coordinator=recorder)
    task_id = await rig.submit(times=2)
    await rig.wait_status(task_id, "waiting")
    await rig.answer(task_id, "first")
    await until(lambda: recorder.checkpoints and recorder.checkpoints[-1].inbox_applied == 1)
    await rig.stop(service)
    await rig.serve(AsksMore(timeout=None), on_change="restart")
    await rig.answer(task_id, "second")
    assert (await rig.result(task_id)).result == '["first","second"]'


@pytest.mark.parametrize("workflow", [AddsAStep, RenamesTheStep])
async def test_fail_fails_whenever_it_differs(rig, workflow):
    task_id = await left_by(rig, Version1())
    probe = Probe()
    await rig.serve(workflow(probe), on_change="fail")
    record = await rig.result(task_id)
    assert (record.status, record.error.type, record.error.retryable) == ("failed", "workflow_changed", True)
    assert not probe.entered


# What exactly does not fit


class Typed(Workflow):
    @step
    async def write(self, ev: StartEvent, ctx: Context[Kept]) -> Draft:
        return Draft()

    @step
    async def ask(self, ev: Draft, ctx: Context[Kept]) -> StopEvent:
        got = await ctx.wait_for_event(HumanResponseEvent)
        return StopEvent(result=got.response)


class TypedOtherwise(Workflow):
    @step
    async def write(self, ev: StartEvent, ctx: Context[Other]) -> Draft:
        return Draft()

    @step
    async def ask(self, ev: Draft, ctx: Context[Other]) -> StopEvent:
        got = await ctx.wait_for_event(HumanResponseEvent)
        return StopEvent(result=got.response)


class Member(Event):
    n: int


class Done(Event):
    n: int


class Fans(Workflow):
    @step
    async def split(self, ev: StartEvent) -> list[Member]:
        return [Member(n=n) for n in range(2)]

    @step
    async def work(self, ev: Member, ctx: Context) -> Done:
        await ctx.wait_for_event(HumanResponseEvent, waiter_id=str(ev.n))
        return Done(n=ev.n)

    @step
    async def join(self, done: list[Done]) -> StopEvent:
        return StopEvent()


class FansElsewhere(Workflow):
    """The list comes from a step of another name, and is collected elsewhere."""

    @step
    async def split2(self, ev: StartEvent) -> list[Member]:
        return [Member(n=n) for n in range(2)]

    @step
    async def work(self, ev: Member, ctx: Context) -> Done:
        await ctx.wait_for_event(HumanResponseEvent, waiter_id=str(ev.n))
        return Done(n=ev.n)

    @step
    async def join2(self, done: list[Done]) -> StopEvent:
        return StopEvent()


class TakesOther(Workflow):
    """`ask` takes another event than the one on which it worked."""

    @step
    async def write(self, ev: StartEvent, ctx: Context) -> Review:
        return Review()

    @step
    async def ask(self, ev: Review, ctx: Context) -> StopEvent:
        got = await ctx.wait_for_event(HumanResponseEvent)
        return StopEvent(result=got.response)


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        (Typed, TypedOtherwise, "type tests.services.test_changed_code.Kept is refused"),
        (Fans, FansElsewhere, "step 'split', whose events are being collected, is gone"),
        (Version1, TakesOther, "type tests.services.test_changed_code.Draft is refused"),
        (Version1, Typed, "its state is a workflows.context.state_store.DictState, and the workflow's is a"),
    ],
)
async def test_other_changes_that_do_not_fit(rig, before, after, why):
    task_id = await left_by(rig, before() if before is Version1 else before(timeout=None))
    await rig.serve(after(timeout=None))
    record = await rig.result(task_id)
    assert (record.status, record.error.type) == ("failed", "workflow_changed")
    assert why in record.error.message


async def test_a_step_at_work_that_takes_other_events_now(rig):
    class Works(Version1):
        @step
        async def ask(self, ev: Draft, ctx: Context) -> StopEvent:
            with probe.inside("ask"):
                await probe.wait_open("ask")
            return StopEvent()

    class WorksOnReviews(Version1):
        @step
        async def write(self, ev: StartEvent, ctx: Context) -> Draft | Review:
            return Review()

        @step
        async def ask(self, ev: Review, ctx: Context) -> StopEvent:
            return StopEvent()

        @step
        async def drafts(self, ev: Draft) -> StopEvent | None:
            return None

    probe = Probe()
    service = await rig.serve(Works(), drain_timeout=0)
    task_id = await rig.submit()
    await probe.wait_entered(1)
    await rig.stop(service)
    await rig.serve(WorksOnReviews())
    record = await rig.result(task_id)
    assert "step 'ask' does not take Draft any more" in record.error.message


# The session's context


class CountsToo(Counter):
    @step
    async def more(self, ev: Draft) -> StopEvent | None:
        return None

    @step
    async def source(self, ev: StartEvent) -> Draft | None:
        return None


class Broken:
    """The way to the coordinator, on which a context becomes something else."""

    def __init__(self, plane, payload):
        self.plane = plane
        self.payload = payload

    def __getattr__(self, name):
        return getattr(self.plane, name)

    async def claim(self, *args):
        claim = await self.plane.claim(*args)
        return claim and replace(claim, context=replace(claim.context, payload=self.payload))


async def counted(rig):
    service = await rig.serve(Counter())
    await rig.plane.sessions.create("s")
    assert (await rig.run(session="s")).result == "1"
    await rig.stop(service)


@pytest.mark.promise("P4")
@pytest.mark.parametrize("on_change", ["resume", "restart"])
async def test_a_context_that_still_fits_is_used(rig, on_change):
    await counted(rig)
    await rig.serve(CountsToo(), on_change=on_change)
    record = await rig.run(session="s")
    assert record.result == "2"
    assert not [event for event in await rig.events(record.task_id) if event.type == "RunResumed"]


@pytest.mark.promise("P4")
@pytest.mark.parametrize("payload", ["[]", '{"version": 77}', "no JSON"])
async def test_a_context_that_does_not_fit(rig, payload):
    await counted(rig)
    broken = Broken(rig.plane, payload)
    service = await rig.serve(Counter(), coordinator=broken)
    service.reserve = lambda: None
    record = await rig.run(session="s")
    assert (record.status, record.error.type, record.error.retryable) == ("failed", "workflow_changed", True)
    await rig.stop(service)
    service = await rig.serve(Counter(), coordinator=broken, on_change="restart")
    service.reserve = lambda: None
    record = await rig.run(session="s")
    assert (record.status, record.result, record.context_saved) == ("completed", "1", True)
    (mark,) = [json.loads(event.payload) for event in await rig.events(record.task_id) if event.type == "RunResumed"]
    assert mark["dropped"] == ["context"]


@pytest.mark.promise("P4")
async def test_a_context_of_other_code_fails_where_that_is_asked(rig):
    await counted(rig)
    await rig.serve(CountsToo(), on_change="fail")
    record = await rig.run(session="s")
    assert (record.status, record.error.type) == ("failed", "workflow_changed")


@pytest.mark.promise("P11")
async def test_state_that_somebody_changed_is_refused(rig):
    class Refusing:
        def __getattr__(self, name):
            return getattr(rig.plane, name)

        async def claim(self, *args):
            return replace(await rig.plane.claim(*args), state_error="the checkpoint does not carry our seal")

    probe = Probe()
    service = await rig.serve(Version1(probe), coordinator=Refusing())
    service.reserve = lambda: None
    record = await rig.run()
    assert (record.status, record.error.type, record.error.retryable) == ("failed", "state_refused", False)
    assert "seal" in record.error.message
    assert not probe.entered


async def test_an_event_that_was_held_and_is_not_known_any_more(rig):
    class Knows(Version1):
        @step
        async def reviews(self, ev: Review) -> StopEvent | None:
            return None

        @step
        async def source(self, ev: StartEvent) -> Review | None:
            return None

    with anyio.fail_after(PATIENCE):
        service = await rig.serve(Version1())
        task_id = await rig.submit(text="a")
        await rig.wait_status(task_id, "waiting")
        await rig.plane.send_event(task_id, '{"type": "InputRequiredEvent", "value": {}}')
        await until(lambda: service.executions[task_id].inbox_read)
        await rig.stop(service)
    with pytest.raises(UsageError):
        service.codec.decode_event('{"type": "Review"}')
    await rig.serve(Knows())
    await rig.answer(task_id)
    assert (await rig.result(task_id)).result == '"a yes"'

"""When a run is stored, with what, and that it goes on from there."""

from __future__ import annotations

import json
import logging

import anyio
import pytest
from workflows import Context, Workflow, step
from workflows.events import Event, HumanResponseEvent, InputRequiredEvent, StartEvent, StopEvent

from llama_corral.services import checkpoints

from .flows import Asks, Chain, First, Progress, Second, WaitsFor
from .link import Link
from .rig import PATIENCE, Probe, Recorder, take_away, until

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P2")]


@pytest.fixture
def at_once(monkeypatch):
    """A checkpoint is due after every step."""
    monkeypatch.setattr(checkpoints, "CHECKPOINT_AGE", 0.0)
    monkeypatch.setattr(checkpoints, "COST_SHARE", 0.0)


@pytest.fixture
def recorder(rig):
    return Recorder(rig.plane)


async def chain(rig, recorder, policy, **options):
    probe = Probe()
    probe.open("all")
    service = await rig.serve(Chain(probe), coordinator=recorder, checkpoints=policy, **options)
    service.reserve = lambda: None
    return service, probe


@pytest.mark.parametrize(("policy", "stored"), [("auto", 0), ("every_step", 2), ("on_wait", 0), ("none", 0)])
async def test_a_short_task_is_not_stored_in_the_middle_unless_that_is_asked(rig, recorder, policy, stored):
    await chain(rig, recorder, policy)
    record = await rig.run()
    assert record.status == "completed"
    assert len(recorder.checkpoints) == stored


async def test_every_step_is_stored_before_the_next_one_starts_and_the_last_one_is_not(rig, recorder):
    seen = []

    class Notes(Chain):
        async def _work(self, name, ctx):
            seen.append((name, len(recorder.checkpoints)))
            await super()._work(name, ctx)

    probe = Probe()
    probe.open("all")
    service = await rig.serve(Notes(probe), coordinator=recorder, checkpoints="every_step")
    service.reserve = lambda: None
    assert (await rig.run()).result == '["one"]'
    assert seen == [("one", 0), ("two", 1), ("three", 2)]
    assert recorder.reports[-1].checkpoint is None


async def test_a_step_waits_until_the_checkpoint_before_it_is_stored(rig):
    link = Link(rig.plane)
    probe = Probe()
    probe.open("all")
    await rig.serve(Chain(probe), coordinator=link, checkpoints="every_step")
    with link.held("report", "before"):
        task_id = await rig.submit()
        await probe.wait_entered(1)
        await link.wait_caught()
        await anyio.wait_all_tasks_blocked()
        assert probe.entered == ["one"]
    assert (await rig.result(task_id)).status == "completed"


@pytest.mark.usefixtures("at_once")
async def test_what_is_due_by_its_age_goes_with_the_events_before_it(rig, recorder):
    await chain(rig, recorder, "auto")
    record = await rig.run()
    events = 0
    for report in recorder.reports:
        events += len(report.events)
        if report.checkpoint is not None:
            snapshot = json.loads(report.checkpoint.snapshot)
            done = snapshot["context"]["invocation_seq"] + len(snapshot["context"]["deliveries"]) - 1
            assert events == done
            assert report.checkpoint.progress
    assert recorder.checkpoints
    assert events == record.event_count == 4


@pytest.mark.promise("P3")
async def test_a_checkpoint_that_is_not_sent_yet_is_replaced_by_the_next(rig, at_once):
    link = Link(rig.plane)
    recorder = Recorder(link)
    probe = Probe()
    await rig.serve(Chain(probe), coordinator=recorder, checkpoints="auto")
    with link.held("report", "before"):
        task_id = await rig.submit()
        await probe.wait_entered(1)
        await link.wait_caught()  # the report with the first event
        probe.open("one", "two")
        await probe.wait_entered(3)
        await anyio.wait_all_tasks_blocked()
        assert not recorder.reports
    await until(lambda: recorder.checkpoints)
    probe.open("three")
    await rig.result(task_id)
    (checkpoint,) = recorder.checkpoints
    assert "Second" in checkpoint.snapshot
    # The event of the second step was published before it, that of the third one after it.
    assert [len(report.events) for report in recorder.reports] == [1, 1, 1, 1]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("policy", ["auto", "every_step"])
async def test_no_step_runs_again_once_a_checkpoint_after_it_is_stored(rig, recorder, policy):
    probe = Probe()
    service = await rig.serve(Chain(probe), coordinator=recorder, checkpoints=policy)
    task_id = await rig.submit()
    for count, (name, following) in enumerate((("one", "two"), ("two", "three")), 1):
        probe.open(name)
        await until(lambda count=count: len(recorder.checkpoints) == count)
        await until(lambda following=following: following in probe.entered)
        await take_away(rig, service)
        await until(lambda following=following: probe.entered.count(following) == 2)
    probe.open("three")
    record = await rig.result(task_id)
    assert (record.status, record.result, record.epoch) == ("completed", '["one"]', 3)
    assert probe.entered == ["one", "two", "two", "three", "three"]
    assert record.attempts == 1  # the second loss: before it a step was done
    events = await rig.events(task_id)
    assert [event.index for event in events] == list(range(len(events)))
    assert [event.type for event in events] == [
        *("Progress", "Progress", "RunResumed", "Progress", "Progress", "RunResumed", "Progress", "StopEvent")
    ]
    marks = [json.loads(event.payload) for event in events if event.type == "RunResumed"]
    assert marks[0] == {"epoch": 2, "attempt": 2, "from_index": 1}
    assert marks[1]["epoch"] == 3
    # From there on up to the mark: what the step published that is done again.
    assert [event.type for event in events[marks[1]["from_index"] : 5]] == ["Progress"]


@pytest.mark.promise("P3")
async def test_a_run_that_was_never_stored_starts_again_and_says_so(rig):
    probe = Probe()
    service = await rig.serve(Chain(probe), checkpoints="none")
    task_id = await rig.submit()
    probe.open("one")
    await probe.wait_entered(2)
    await anyio.wait_all_tasks_blocked()
    await take_away(rig, service)
    await probe.wait_entered(4)
    probe.open("all")
    assert (await rig.result(task_id)).result == '["one"]'
    events = await rig.events(task_id)
    assert probe.entered == ["one", "two", "one", "two", "three"]
    assert [json.loads(event.payload)["from_index"] for event in events if event.type == "RunResumed"] == [0]


async def test_a_task_that_did_nothing_yet_is_not_resumed(rig):
    """Its second epoch is the first one that anybody sees."""
    probe = Probe()
    link = Link(rig.plane)
    service = await rig.serve(Chain(probe), coordinator=link)
    with link.held("report", "before"):
        task_id = await rig.submit()
        await probe.wait_entered(1)
        await take_away(rig, service)
        await probe.wait_entered(2)
    probe.open("all")
    await rig.result(task_id)
    assert [event.type for event in await rig.events(task_id)] == ["Progress", "Progress", "Progress", "StopEvent"]


# Waiting and handing back


@pytest.mark.parametrize("policy", ["auto", "every_step", "on_wait", "none"])
async def test_a_run_that_begins_to_wait_is_stored_unless_that_is_unwanted(rig, recorder, policy):
    service = await rig.serve(WaitsFor(), coordinator=recorder, checkpoints=policy)
    task_id = await rig.submit(times=2)
    await rig.wait_status(task_id, "waiting")
    stored = [report for report in recorder.reports if report.checkpoint is not None]
    assert [report.waiting for report in stored] == ([] if policy == "none" else [True])
    await take_away(rig, service)
    await until(lambda: task_id in service.executions and service.executions[task_id].claim.epoch == 2)
    await rig.wait_status(task_id, "waiting")
    for text in ("a", "b"):
        await rig.answer(task_id, text)
    assert (await rig.result(task_id)).result == '["a","b"]'
    questions = [event for event in await rig.events(task_id) if event.type == "InputRequiredEvent"]
    assert len(questions) == (3 if policy == "none" else 2)


@pytest.mark.promise("P7")
@pytest.mark.parametrize("policy", ["auto", "none"])
async def test_what_is_handed_back_goes_on_or_starts_again(rig, recorder, policy):
    probe = Probe()
    probe.open("one")
    service = await rig.serve(Chain(probe), coordinator=recorder, checkpoints=policy, drain_timeout=0)
    task_id = await rig.submit()
    await probe.wait_entered(2)
    await rig.stop(service)
    ((checkpoint, how),) = recorder.releases
    assert how == {}
    assert (checkpoint is None) == (policy == "none")
    probe.open("all")
    await rig.serve(Chain(probe))
    assert (await rig.result(task_id)).result == '["one"]'
    assert probe.entered[2:] == (["two", "three"] if policy == "auto" else ["one", "two", "three"])


@pytest.mark.promise("P3")
async def test_what_a_step_publishes_while_it_is_cancelled_is_not_part_of_what_is_handed_back(rig, recorder):
    class Talks(Workflow):
        @step
        async def work(self, ev: StartEvent, ctx: Context) -> StopEvent:
            ctx.write_event_to_stream(Progress(n=1))
            try:
                with probe.inside("work"):
                    await probe.wait_open("work")
            finally:
                ctx.write_event_to_stream(Progress(n=2))
            return StopEvent()

    probe = Probe()
    service = await rig.serve(Talks(), coordinator=recorder, drain_timeout=0)
    task_id = await rig.submit()
    await probe.wait_entered(1)
    await rig.stop(service)
    assert (await rig.plane.get_task(task_id)).event_count == 1
    probe.open("work")
    await rig.serve(Talks())
    assert (await rig.result(task_id)).status == "completed"
    told = [(event.type, json.loads(event.payload).get("n")) for event in await rig.events(task_id)]
    expected = [("Progress", 1), ("RunResumed", None), ("Progress", 1), ("Progress", 2), ("StopEvent", None)]
    assert told == expected


def built(events):
    """What a reader has in the end that does as the markers say."""
    kept: list[tuple[int, int]] = []
    for event in events:
        fields = json.loads(event.payload)
        if event.type == "RunResumed":
            kept = [(index, n) for index, n in kept if index < fields["from_index"]]
        elif event.type == "Progress":
            kept.append((event.index, fields["n"]))
    return [n for _, n in kept]


@pytest.mark.promise("P3")
@pytest.mark.parametrize("times", [1, 2])
async def test_a_reader_is_told_of_what_a_step_had_published_when_it_was_handed_back(rig, times):
    class Talks(Workflow):
        @step
        async def begin(self, ev: StartEvent, ctx: Context) -> First:
            ctx.write_event_to_stream(Progress(n=0))
            return First()

        @step
        async def work(self, ev: First, ctx: Context) -> StopEvent:
            ctx.write_event_to_stream(Progress(n=1))
            with probe.inside("work"):
                await probe.wait_open("work")
            ctx.write_event_to_stream(Progress(n=2))
            return StopEvent()

    probe = Probe()
    task_id = None
    for n in range(times):
        service = await rig.serve(Talks(), drain_timeout=0)
        task_id = task_id or await rig.submit()
        await probe.wait_entered(n + 1)
        await rig.stop(service)
    probe.open("work")
    await rig.serve(Talks())
    await rig.result(task_id)
    events = await rig.events(task_id)
    assert built(events) == [0, 1, 2]
    told = [json.loads(event.payload)["from_index"] for event in events if event.type == "RunResumed"]
    assert told == [1, 3][:times]


@pytest.mark.promise("P3")
async def test_a_question_that_was_asked_beside_a_step_at_work_is_not_taken_back(rig):
    class AsksBeside(Workflow):
        @step
        async def begin(self, ev: StartEvent) -> list[First | Second]:
            return [First(), Second()]

        @step
        async def work(self, ev: First, ctx: Context) -> StopEvent | None:
            with probe.inside("work"):
                await probe.wait_open("work")
            return None

        @step
        async def ask(self, ev: Second, ctx: Context) -> StopEvent:
            await probe.wait_entered(1)
            got = await ctx.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent())
            return StopEvent(result=got.response)

    probe = Probe()
    service = await rig.serve(AsksBeside(), drain_timeout=0)
    task_id = await rig.submit()

    async def was_asked():
        return (await rig.plane.get_task(task_id)).event_count == 1

    await until(was_asked)
    await rig.stop(service)
    await rig.answer(task_id)
    await rig.serve(AsksBeside())
    assert (await rig.result(task_id)).result == '"yes"'
    events = await rig.events(task_id)
    assert [event.type for event in events] == ["InputRequiredEvent", "RunResumed", "StopEvent"]
    assert json.loads(events[1].payload)["from_index"] == 1


async def test_nothing_is_encoded_again_while_nothing_changes(rig, recorder, monkeypatch):
    encoded = []
    service = await rig.serve(Asks(), coordinator=recorder)
    encode = service.codec.encode_context
    monkeypatch.setattr(service.codec, "encode_context", lambda context: encoded.append(1) or encode(context))
    task_id = await rig.submit(name="x")
    await rig.wait_status(task_id, "waiting")
    await rig.stop(service)
    assert len(recorder.checkpoints) == len(recorder.releases) == len(encoded) == 1


class Item(Event):
    n: int


class Sends(Workflow):
    """A step that has sent events and works on; what they start counts itself."""

    def __init__(self, probe):
        super().__init__()
        self.probe = probe

    @step
    async def send(self, ev: StartEvent, ctx: Context) -> Item | None:
        ctx.send_event(Item(n=1))
        ctx.send_event(Item(n=2))
        with self.probe.inside("send"):
            await self.probe.wait_open("send")
        return None

    @step
    async def gather(self, ev: Item, ctx: Context) -> StopEvent | None:
        await ctx.store.set("n", await ctx.store.get("n", default=0) + 1)
        with self.probe.inside("gather"):
            await anyio.lowlevel.checkpoint()
        events = ctx.collect_events(ev, [Item, Item])
        return None if events is None else StopEvent(result=sum(event.n for event in events))


@pytest.mark.usefixtures("at_once")
async def test_a_run_is_not_stored_while_a_step_has_sent_half_of_what_it_sends(rig, recorder):
    """Going on from there it would send all of it again, beside what has come of the first half."""

    class Three(Sends):
        @step
        async def send(self, ev: StartEvent, ctx: Context) -> Item | None:
            ctx.send_event(Item(n=1))
            with self.probe.inside("send"):
                await self.probe.wait_open("send")
            ctx.send_event(Item(n=2))
            return None

    probe = Probe()
    service = await rig.serve(Three(probe), coordinator=recorder, drain_timeout=0)
    task_id = await rig.submit()
    await until(lambda: set(probe.entered) == {"send", "gather"})
    await anyio.wait_all_tasks_blocked()
    assert not recorder.checkpoints
    await rig.stop(service)
    assert recorder.releases == [(None, {})]
    probe.open("send")
    await rig.serve(Three(probe))
    assert (await rig.result(task_id)).result == "3"


@pytest.mark.usefixtures("at_once")
@pytest.mark.promise("P4")
async def test_state_that_is_not_json_is_warned_about_once_and_the_run_goes_on(rig, recorder, caplog):
    class Odd(Chain):
        async def _work(self, name, ctx):
            await ctx.store.set("odd", object())
            await super()._work(name, ctx)
            if name == "three":
                await ctx.store.set("odd", 1)

    probe = Probe()
    probe.open("all")
    await rig.serve(Odd(probe), coordinator=recorder, checkpoints="every_step")
    with caplog.at_level(logging.WARNING):
        assert (await rig.run()).status == "completed"
    assert not recorder.checkpoints
    assert sum("cannot be checkpointed" in message for message in caplog.messages) == 1


@pytest.mark.usefixtures("at_once")
async def test_a_snapshot_that_is_too_large_is_not_taken(rig, recorder, caplog, monkeypatch):
    monkeypatch.setattr(checkpoints, "CHECKPOINT_LIMIT", 100)
    await chain(rig, recorder, "every_step")
    with caplog.at_level(logging.WARNING):
        assert (await rig.run()).status == "completed"
    assert not recorder.checkpoints
    assert sum("at most 100" in message for message in caplog.messages) == 1


async def test_what_is_slow_to_encode_is_encoded_less_often(monkeypatch):
    now = 0.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)

    class Codec:
        class serializer:
            serialize = None

        def encode_context(self, context):
            nonlocal now
            now += 1.0
            return "{}"

    class Run:
        is_done = has_half_sent = False
        half_told = 0
        context = None
        ticks = 0

        def held_events(self):
            return []

        def statistics(self):
            self.ticks += 1
            return self

    checkpointer = checkpoints.Checkpointer("auto", Codec(), "print", "t")
    run = Run()
    assert checkpointer.after_step(run, 0) is None
    now = checkpoints.CHECKPOINT_AGE
    assert checkpointer.after_step(run, 0) is not None
    now += 5.0
    assert checkpointer.after_step(run, 0) is None
    now += 5.0
    assert checkpointer.after_step(run, 0) is not None


@pytest.mark.promise("P1")
async def test_fan_outs_survive_any_number_of_losses(rig, recorder, at_once):
    """Members at work are done again, those that ended are not."""

    class Member(Event):
        n: int

    class Done(Event):
        n: int

    class Fans(Workflow):
        @step
        async def split(self, ev: StartEvent) -> list[Member]:
            probe.entered.append("split")
            return [Member(n=n) for n in range(4)]

        @step(num_workers=4)
        async def work(self, ev: Member, ctx: Context) -> Done:
            with probe.inside(ev.n):
                await probe.wait_open(ev.n)
            return Done(n=ev.n)

        @step
        async def join(self, done: list[Done]) -> StopEvent:
            return StopEvent(result=sum(event.n for event in done))

    probe = Probe()
    service = await rig.serve(Fans(), coordinator=recorder)
    task_id = await rig.submit()
    for n in range(3):
        await until(lambda n=n: probe.working == 4 - n)
        probe.open(n)
        await until(lambda n=n: at_work(recorder.checkpoints) == 3 - n)
        await take_away(rig, service)
    probe.open("all")
    with anyio.fail_after(PATIENCE):
        assert (await rig.result(task_id)).result == "6"
    assert probe.entered.count("split") == 1
    assert [probe.entered.count(n) for n in range(4)] == [1, 2, 3, 4]


def at_work(stored):
    """Calls of the step `work` that the latest checkpoint has at work."""
    return len(json.loads(stored[-1].snapshot)["context"]["workers"]["work"]["in_progress"]) if stored else None

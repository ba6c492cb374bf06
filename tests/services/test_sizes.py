"""What is large: several reports, records that say so, and nothing that is asked again for ever."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import anyio
import pytest
from workflows import Context, Workflow, step
from workflows.events import Event, StartEvent, StopEvent

from llama_corral.exceptions import BadInput, TooLarge
from llama_corral.protocol.lifecycle import TaskStatus
from llama_corral.protocol.messages import ErrorRecord
from llama_corral.protocol.records import Checkpoint, Claim, ContextUpdate, EventRecord, ReportAnswer, Terminal
from llama_corral.services import codec as codecs
from llama_corral.services import outcome, reporter
from llama_corral.services.reporter import Reporter
from llama_corral.services.sizes import shortened, size_of

from .flows import Asks, Chain, Counter
from .rig import Probe, Recorder, until

pytestmark = [pytest.mark.anyio, pytest.mark.promise("P1", "P12")]


class Big(Event):
    text: str


class Talks(Workflow):
    """Publishes texts of these lengths."""

    @step
    async def work(self, ev: StartEvent, ctx: Context) -> StopEvent:
        for length in ev.get("lengths", []):
            ctx.write_event_to_stream(Big(text="x" * length))
        await ctx.store.set("kept", "x" * ev.get("kept", 0))
        return StopEvent(result="x" * ev.get("result", 0))


@pytest.mark.promise("P3")
async def test_a_report_takes_about_so_much_and_a_large_event_travels_alone(rig, monkeypatch):
    monkeypatch.setattr(reporter, "REPORT_LIMIT", 1_000)
    monkeypatch.setattr(codecs, "EVENT_LIMIT", 5_000)
    recorder = Recorder(rig.plane)
    service = await rig.serve(Talks(), coordinator=recorder)
    service.reserve = lambda: None
    record = await rig.run(lengths=[300, 300, 300, 300, 2_000, 300, 6_000, 300])
    sizes = [sum(size_of(event.payload) for event in report.events) for report in recorder.reports]
    assert all(size <= 1_000 or len(report.events) == 1 for size, report in zip(sizes, recorder.reports, strict=True))
    assert max(sizes) < 2_100
    assert [report.terminal is not None for report in recorder.reports] == [False] * (len(sizes) - 1) + [True]
    events = await rig.events(record.task_id)
    assert [event.index for event in events] == list(range(9))
    told = [json.loads(event.payload) for event in events[:-1]]
    assert [len(each["text"]) for each in told if "text" in each] == [300, 300, 300, 300, 2_000, 300, 300]
    assert "takes 60" in told[6]["error"]
    assert "may take 5000" in told[6]["error"]


async def test_a_result_that_is_too_large_fails_the_task(rig, monkeypatch):
    monkeypatch.setattr(outcome, "RESULT_LIMIT", 1_000)
    await rig.serve(Talks())
    assert (await rig.run(result=900)).status == "completed"
    record = await rig.run(result=1_100)
    assert (record.status, record.error.type, record.error.retryable) == ("failed", "too_large", False)
    assert "takes 1102 bytes" in record.error.message


@pytest.mark.promise("P4")
async def test_a_context_that_is_too_large_is_not_saved(rig, monkeypatch):
    monkeypatch.setattr(outcome, "CONTEXT_LIMIT", 5_000)
    await rig.serve(Talks())
    await rig.plane.sessions.create("s")
    assert (await rig.run(session="s", kept=10)).context_saved is True
    record = await rig.run(session="s", kept=6_000)
    assert (record.status, record.context_saved) == ("completed", False)
    assert "TooLarge: the context takes" in record.context_error


async def test_an_error_of_any_length_is_shortened(rig):
    class Shouts(Workflow):
        @step
        async def work(self, ev: StartEvent) -> StopEvent:
            raise ValueError("x" * 10_000_000)

    await rig.serve(Shouts(), debug=True)
    record = await rig.run()
    assert record.status == "failed"
    assert len(record.error.message) < 70_000
    assert len(record.error.traceback) < 300_000
    assert "characters left out" in record.error.message


def test_sizes():
    assert size_of("abc") == 3
    assert size_of("häß") == 5
    assert shortened("abc") == "abc"
    assert shortened("a" * 50 + "b" * 50, 10) == "aaaaa ... 90 characters left out ... bbbbb"


# A coordinator whose limits are lower than ours


class Narrow:
    """Takes no report that is larger."""

    def __init__(self, plane, limit, *, counts=("events", "terminal", "context", "checkpoint")):
        self.plane = plane
        self.limit = limit
        self.counts = counts
        self.refused = 0

    def __getattr__(self, name):
        return getattr(self.plane, name)

    def size(self, report):
        size = sum(size_of(event.payload) for event in report.events) if "events" in self.counts else 0
        if report.terminal is not None and "terminal" in self.counts:
            size += size_of(report.terminal.result or "") + size_of(report.terminal.result_text)
        if report.context is not None and "context" in self.counts:
            size += size_of(report.context.payload)
        if report.checkpoint is not None and "checkpoint" in self.counts:
            size += size_of(report.checkpoint.snapshot)
        return size

    async def report(self, report):
        if self.size(report) > self.limit:
            self.refused += 1
            raise TooLarge("too large")
        return await self.plane.report(report)

    async def release(self, task_id, epoch, checkpoint, **how):
        if checkpoint is not None and size_of(checkpoint.snapshot) > self.limit:
            self.refused += 1
            raise TooLarge("too large")
        return await self.plane.release(task_id, epoch, checkpoint, **how)


async def narrow(rig, workflow, limit, **options):
    coordinator = Narrow(
        rig.plane, limit, counts=options.pop("counts", ("events", "terminal", "context", "checkpoint"))
    )
    service = await rig.serve(workflow, coordinator=coordinator, **options)
    service.reserve = lambda: None
    return coordinator


@pytest.mark.promise("P3")
async def test_its_reports_become_smaller(rig):
    coordinator = await narrow(rig, Talks(), 1_000)
    record = await rig.run(lengths=[200] * 20, result=300)
    assert (record.status, record.event_count) == ("completed", 21)
    assert 0 < coordinator.refused < 10


async def test_an_event_that_it_does_not_take_is_named(rig):
    await narrow(rig, Talks(), 1_000)
    record = await rig.run(lengths=[200, 2_000, 200])
    assert record.status == "completed"
    events = [json.loads(event.payload) for event in await rig.events(record.task_id)]
    assert "too much for the coordinator" in events[1]["error"]
    assert len(events) == 4


async def test_a_context_and_a_result_that_it_does_not_take(rig):
    await narrow(rig, Talks(), 1_000)
    await rig.plane.sessions.create("s")
    record = await rig.run(session="s", kept=2_000, result=100)
    assert (record.status, record.context_saved) == ("completed", False)
    assert "too large for the coordinator" in record.context_error
    record = await rig.run(session="s", result=2_000)
    assert (record.status, record.error.type) == ("failed", "too_large")
    assert "too large for the coordinator" in record.error.message


async def test_a_checkpoint_that_it_does_not_take(rig, caplog):
    probe = Probe()
    probe.open("all")
    with caplog.at_level(logging.WARNING):
        await narrow(rig, Chain(probe), 10, checkpoints="every_step", counts=["checkpoint"])
        assert (await rig.run()).status == "completed"
    assert any("a checkpoint of task" in message for message in caplog.messages)


@pytest.mark.promise("P2")
async def test_a_waiting_run_whose_checkpoint_it_does_not_take_stays_in_memory(rig):
    probe, leaves = Probe(), []
    coordinator = Narrow(rig.plane, 10, counts=["checkpoint"])
    service = await rig.serve(Asks(probe), coordinator=coordinator, idle_timeout=0.01)
    service.reserve = lambda: None
    task_id = await rig.submit(name="x")
    await rig.wait_status(task_id, "waiting")
    waiting = service.executions[task_id]
    leave = waiting.leave
    waiting.leave = lambda: leaves.append(leave()) or leaves[-1]
    await until(lambda: len(leaves) > 2)
    assert not any(leaves)
    await rig.answer(task_id)
    record = await rig.result(task_id)
    assert (record.result, record.epoch) == ('["x","yes",1]', 1)
    assert probe.entered == ["ask", "answered"]  # a person is not asked twice


@pytest.mark.promise("P7")
async def test_a_hand_back_without_the_checkpoint_that_it_does_not_take(rig):
    coordinator = Narrow(rig.plane, 10, counts=["checkpoint"])
    service = await rig.serve(Asks(), coordinator=coordinator)
    task_id = await rig.submit(name="x")
    await rig.wait_status(task_id, "waiting")
    await rig.stop(service)
    assert (await rig.plane.get_task(task_id)).status == "queued"
    await rig.serve(Asks())
    await rig.answer(task_id)
    assert (await rig.result(task_id)).result == '["x","yes",1]'


@pytest.mark.parametrize("call", ["report", "claim", "pull", "release", "heartbeat"])
async def test_a_coordinator_that_refuses_everything_does_not_end_the_service(rig, call):
    class Refuses:
        on = True

        def __getattr__(self, name):
            async def refuse(*args, **how):
                self.refused = True
                raise BadInput("no")

            return refuse if name == call and self.on else getattr(rig.plane, name)

        async def register(self, *args, **how):
            return replace(await rig.plane.register(*args, **how), heartbeat_interval=0.01)

        refused = False

    refuses = Refuses()
    service = await rig.serve(Asks(), coordinator=refuses)
    service.reserve = lambda: None
    task_id = await rig.submit(name="x")
    if call == "pull":
        await rig.wait_status(task_id, "waiting")
        await rig.answer(task_id)
    elif call == "release":
        await rig.wait_status(task_id, "waiting")
        service.executions[task_id].release()
    await until(lambda: refuses.refused)
    await anyio.wait_all_tasks_blocked()
    refuses.on = False
    assert service.statistics().running
    again = await rig.submit(name="again")
    await rig.answer(again)
    assert (await rig.result(again)).result == '["again","yes",1]'


# The reporter alone


class Host:
    """Takes reports; `refuse` says of each whether it is too large."""

    def __init__(self, refuse=lambda report: False):
        self.reports = []
        self.refuse = refuse
        self.coordinator = self

    def now(self):
        return 0.0

    def needs_flush(self, reporter):
        pass

    def tickets_due(self, tickets):
        pass

    async def ask(self, question, what):
        return await question()

    async def report(self, report):
        await anyio.lowlevel.checkpoint()
        if self.refuse(report):
            raise TooLarge("no")
        self.reports.append(report)
        return ReportAnswer("ok")


def reporter_of(host, events=0):
    lost = []
    made = Reporter(host, Claim("t", "svc", "t", True, 1, 1, "{}", 0.0), lambda: lost.append(1) or settle())

    def settle():
        made.settled = True

    made._events = [EventRecord("E", json.dumps({"n": n})) for n in range(events)]
    return made, lost


DONE = Terminal(TaskStatus.COMPLETED, "1", "1")
FAILED = Terminal(TaskStatus.FAILED, error=ErrorRecord(type="E", message="m", retryable=True))


@pytest.mark.promise("P3")
async def test_events_are_split_at_the_snapshot(anyio_backend):
    host = Host()
    made, _ = reporter_of(host, 3)
    made.add_checkpoint(Checkpoint("first", 0))
    made._events.append(EventRecord("E", "{}"))
    made.add_checkpoint(Checkpoint("second", 0))
    made._events.append(EventRecord("Late", "{}"))
    made.set_waiting(True)
    await made.flush()
    first, second = host.reports
    assert (len(first.events), first.checkpoint, first.waiting) == (4, Checkpoint("second", 0), None)
    assert (len(second.events), second.checkpoint, second.waiting) == (1, None, True)
    assert [first.seq, second.seq] == [1, 2]


async def test_an_ending_makes_a_checkpoint_useless_unless_the_task_may_go_on(anyio_backend):
    for terminal, expected in ((DONE, [None]), (FAILED, [Checkpoint("c", 0), None])):
        host = Host()
        made, _ = reporter_of(host, 2)
        made.add_checkpoint(Checkpoint("c", 0))
        made._events.append(EventRecord("Late", "{}"))
        await made.flush(terminal)
        assert [report.checkpoint for report in host.reports] == expected
        assert host.reports[-1].terminal == terminal
        assert sum(len(report.events) for report in host.reports) == 3
        assert made.settled


async def test_what_comes_after_the_cut_is_dropped_or_goes_with_the_ending(anyio_backend):
    for ends in (False, True):
        host = Host()
        made, _ = reporter_of(host, 2)
        made.add_checkpoint(Checkpoint("c", 0))
        made.cut()
        made.add_checkpoint(Checkpoint("late", 0))
        made._events.append(EventRecord("Late", "{}"))
        await made.flush(DONE if ends else None)
        made.drop_rest()
        await made.flush()
        assert [len(report.events) for report in host.reports] == [3 if ends else 2]
        assert host.reports[0].checkpoint is None


@pytest.mark.parametrize("refused", ["all", "terminal", "events"])
async def test_what_cannot_be_made_smaller_is_given_up(anyio_backend, refused):
    """Whatever is refused, it is not asked again for ever, and nothing is said twice."""

    def refuse(report):
        return refused == "all" or (report.terminal is not None if refused == "terminal" else bool(report.events))

    host = Host(refuse)
    made, lost = reporter_of(host, 5)
    made.add_checkpoint(Checkpoint("c", 0))
    with anyio.fail_after(5):
        await made.flush(Terminal(TaskStatus.COMPLETED, "1", "1"), ContextUpdate(0, "{}"))
    assert lost == [1]
    told = [event for report in host.reports for event in report.events]
    assert told == ([EventRecord("E", json.dumps({"n": n})) for n in range(5)] if refused == "terminal" else [])


async def test_a_session_goes_on_after_an_ending_that_was_made_smaller(rig):
    await narrow(rig, Counter(), 10, counts=["context"])
    await rig.plane.sessions.create("s")
    for _ in range(2):
        record = await rig.run(session="s")
        assert (record.result, record.context_saved) == ("1", False)

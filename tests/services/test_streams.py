"""What a run publishes and returns, and what becomes of it when it is large, odd, or cannot be encoded."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime

import anyio
import pytest
from pydantic import BaseModel, PrivateAttr
from workflows import Context, Workflow, step
from workflows.events import Event, StartEvent, StopEvent

from .flows import Echo, Progress
from .rig import Probe, until

pytestmark = pytest.mark.anyio


class Model(BaseModel):
    when: datetime
    names: set[str]


class Odd(Event):
    what: object = None


class Next(Event):
    pass


class Secret(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.promise("P3")
@pytest.mark.parametrize("store", ["rig", "file_rig"])
async def test_five_thousand_events_are_stored_without_a_gap(request, store, rig, file_rig):
    rig = {"rig": rig, "file_rig": file_rig}[store]
    service = await rig.serve(Echo())
    record = await rig.run(count=5000, value="done")
    events = await rig.events(record.task_id)
    assert [event.index for event in events] == list(range(5001))
    assert [json.loads(event.payload).get("n") for event in events[:-1]] == list(range(5000))
    assert events[-1].type == "StopEvent"
    assert record.event_count == 5001
    assert not service.executions


@pytest.mark.promise("P12")
@pytest.mark.parametrize("limit", ["BEHIND", "BEHIND_BYTES"])
async def test_no_step_starts_while_the_publisher_is_behind(rig, monkeypatch, limit):
    monkeypatch.setattr(f"llama_corral.services.reporter.{limit}", 1_000)

    class Held:
        def __init__(self) -> None:
            self.go = anyio.Event()

        def __getattr__(self, name):
            return getattr(rig.plane, name)

        async def report(self, report):
            await self.go.wait()
            return await rig.plane.report(report)

    class TwoSteps(Workflow):
        @step
        async def first(self, ev: StartEvent, ctx: Context) -> Next:
            for n in range(1500):
                ctx.write_event_to_stream(Progress(n=n))
            probe.entered.append("first")
            probe.gate.changed()
            return Next()

        @step
        async def second(self, ev: Next) -> StopEvent:
            probe.entered.append("second")
            return StopEvent()

    probe, held = Probe(), Held()
    await rig.serve(TwoSteps(), coordinator=held)
    task_id = await rig.submit()
    await probe.wait_entered(1)
    await anyio.wait_all_tasks_blocked()
    assert probe.entered == ["first"]
    held.go.set()
    assert (await rig.result(task_id)).status == "completed"
    assert [event.index for event in await rig.events(task_id)] == list(range(1501))


@pytest.mark.promise("P12")
async def test_a_step_that_publishes_too_fast_fails_by_name(rig, monkeypatch):
    monkeypatch.setattr("llama_corral.services.reporter.OVERFLOW", 100)
    await rig.serve(Echo())
    record = await rig.run(count=200)
    assert (record.status, record.error.type) == ("failed", "TooLarge")
    events = await rig.events(record.task_id)
    assert [event.index for event in events] == list(range(len(events)))


@pytest.mark.promise("P12")
async def test_a_step_that_publishes_too_much_fails_by_name(rig, monkeypatch):
    monkeypatch.setattr("llama_corral.services.reporter.OVERFLOW_BYTES", 500)
    await rig.serve(Echo())
    record = await rig.run(count=200)
    assert (record.status, record.error.type) == ("failed", "TooLarge")
    assert "bytes" in record.error.message


@pytest.mark.promise("P1")
async def test_sync_steps_stream_and_fail(rig):
    class Sync(Workflow):
        @step
        def work(self, ev: StartEvent, ctx: Context) -> StopEvent:
            for n in range(20):
                ctx.write_event_to_stream(Progress(n=n))
            if ev.get("fail", False):
                raise ValueError("sync")
            return StopEvent(result="sync")

    service = await rig.serve(Sync(), cap=2)
    tasks = [await rig.submit(fail=n % 2 == 1) for n in range(6)]
    records = [await rig.result(task_id) for task_id in tasks]
    assert [record.status for record in records] == ["completed", "failed"] * 3
    for task_id in tasks:
        numbers = [json.loads(event.payload).get("n") for event in await rig.events(task_id)]
        assert numbers[:20] == list(range(20))
    await until(lambda: not service.statistics().working)


@pytest.mark.promise("P1")
@pytest.mark.parametrize(
    "what", [object(), math.nan, {"a": object()}, "\ud800"], ids=["object", "nan", "nested", "surrogate"]
)
async def test_an_event_that_cannot_be_encoded_is_a_clear_record(rig, what):
    class Streams(Workflow):
        @step
        async def work(self, ev: StartEvent, ctx: Context) -> StopEvent:
            ctx.write_event_to_stream(Odd(what=what))
            ctx.write_event_to_stream(Progress(n=1))
            return StopEvent(result="fine")

    await rig.serve(Streams())
    record = await rig.run()
    assert (record.status, record.result) == ("completed", '"fine"')
    odd, progress, _ = await rig.events(record.task_id)
    assert odd.type == "Odd"
    if what == "\ud800":
        assert json.loads(odd.payload) == {"what": what}
    elif what is math.nan:
        assert json.loads(odd.payload) == {"what": None}
    else:
        assert "cannot be encoded" in json.loads(odd.payload)["error"]
    assert json.loads(progress.payload) == {"n": 1}


@pytest.mark.promise("P1")
@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (None, None),
        (Model(when=datetime(2026, 1, 1, tzinfo=UTC), names={"a"}), {"when": "2026-01-01T00:00:00Z", "names": ["a"]}),
        (datetime(2026, 1, 1, tzinfo=UTC), "2026-01-01T00:00:00Z"),
        ({1}, [1]),
        (b"bytes", "bytes"),
        (b"\xff", "b'\\xff'"),
        (math.nan, None),
        ([math.inf], [None]),
        (2**80, 2**80),
        ({(1, 2): 3}, {"1,2": 3}),
        ("\ud800", "\\ud800"),
        ({"a": "\ud800"}, "{'a': '\\ud800'}"),
    ],
)
async def test_results_of_odd_types(rig, value, stored):
    class Returns(Workflow):
        @step
        async def work(self, ev: StartEvent) -> StopEvent:
            return StopEvent(result=value)

    await rig.serve(Returns())
    record = await rig.run()
    assert record.status == "completed"
    assert json.loads(record.result) == stored
    record.result_text.encode()


@pytest.mark.promise("P1")
async def test_a_result_that_knows_no_json_is_its_text(rig):
    class Thing:
        def __str__(self) -> str:
            return "a thing"

    class Own(StopEvent):
        _hidden: int = PrivateAttr(default=1)
        total: int

    class Returns(Workflow):
        @step
        async def work(self, ev: StartEvent) -> StopEvent:
            cycle: list = []
            cycle.append(cycle)
            return StopEvent(result={"thing": Thing(), "cycle": cycle}[ev.kind])

    class ReturnsOwn(Workflow):
        @step
        async def work(self, ev: StartEvent) -> Own:
            return Own(total=3)

    await rig.serve(Returns(), "returns")
    await rig.serve(ReturnsOwn(), "own")
    assert json.loads((await rig.run("returns", kind="thing")).result) == "a thing"
    assert json.loads((await rig.run("returns", kind="cycle")).result) == "[[...]]"
    assert json.loads((await rig.run("own")).result) == {"total": 3}


@pytest.mark.promise("P1")
@pytest.mark.parametrize(
    "error", [ValueError("\ud800 text"), Secret(), KeyError("key"), BaseExceptionGroup("g", [ValueError("x")])]
)
@pytest.mark.parametrize("debug", [False, True])
async def test_errors_whose_text_is_odd(rig, error, debug):
    class Raises(Workflow):
        @step
        async def work(self, ev: StartEvent) -> StopEvent:
            raise error

    await rig.serve(Raises(), debug=debug)
    record = await rig.run()
    assert (record.status, record.error.type, record.error.step) == ("failed", type(error).__name__, "work")
    assert bool(record.error.traceback) is debug
